"""Recipes: the one way to say what a job does.

A recipe is a frozen pydantic model. People write it as TOML, sparse and commented; machines write the resolved one
as JSON. Several TOML files merge from left to right, `--set a.b=c` comes last, unknown keys are errors, and every
field carries its unit and range in the docstring beneath it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from janus_ray.errors import ConfigError
from janus_ray.paths import checked_path

IfExists = Literal["fail", "resume", "overwrite"]

_LARGEST_FILE_BYTES = 8 * 1024**2
_LARGEST_NUMBER = 2**63 - 1
_SHOWN_CHARACTERS = 80


class Recipe(BaseModel):
    """Base of every recipe and of every section of one.

    A number is a number: `true` or "5" in its place is an error, as are nan and infinity.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, values: Any) -> Any:
        """TOML and JSON know lists only."""
        if not isinstance(values, dict):
            return values
        tuples = {name for name, field in cls.model_fields.items() if get_origin(field.annotation) is tuple}
        return {key: tuple(v) if key in tuples and isinstance(v, list) else v for key, v in values.items()}


PathText = Annotated[str, AfterValidator(checked_path)]
"""A file or folder, "~" expanded, or one on an object storage (s3://bucket/..., gs://..., abfs://...); where a field
says so, also the id of something on the Hugging Face hub."""


# On fields that say how hard and where, not what: a resume may change them, because they cannot change a result.
OPERATIONAL: dict[str, Any] = {"operational": True}


class RayConfig(Recipe):
    """The Ray cluster a job runs on. RAY_ADDRESS, when set, names a running one and the sizes are its own."""

    logical_cpus: int | None = Field(default=None, ge=1, le=100_000)
    """CPUs that a local cluster claims to have; None takes the machine's. A two-core laptop claims more than it has,
    because Ray counts one for every actor, also for those that only wait."""
    object_store_gib: float | None = Field(default=None, ge=0.08, le=100_000)
    """Shared memory for objects in GiB, at least 0.08 (Ray's own limit is 75 MiB); None leaves the choice to Ray."""
    dashboard: bool = False
    """Start the Ray dashboard with a local cluster."""
    wait_for_nodes_s: float = Field(default=0.0, ge=0, le=86_400)
    """How long a job waits for a cluster at RAY_ADDRESS that is too small for it, in seconds, after having asked its
    autoscaler for what is missing; 0 refuses at once."""


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def load_recipe(recipe_type: type[AnyRecipe], files: Sequence[Path | str], overrides: Sequence[str] = ()) -> AnyRecipe:
    """Reads, merges and validates TOML files and `a.b=c` overrides.

    Raises:
        ConfigError: one line with the file, the field's path, the value, and what is allowed.
    """
    origin = " + ".join(str(file) for file in files) or recipe_type.__name__
    merged: dict[str, Any] = {}
    try:
        for file in files:
            merged = _merge(merged, _read_toml(Path(file)))
        for override in overrides:
            merged = _overridden(merged, override, recipe_type)
        return validate(recipe_type, merged, origin)
    except RecursionError:
        raise ConfigError(f"{origin}: nested too deeply") from None


def validate(recipe_type: type[AnyRecipe], values: dict[str, Any], origin: str) -> AnyRecipe:
    """Builds the recipe; a validation error becomes one line.

    Raises:
        ConfigError: as `load_recipe`.
    """
    if too_large := _too_large(values, ()):
        raise ConfigError(f"{origin}: {'.'.join(too_large)}: a number so large cannot be meant")
    try:
        return recipe_type.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_one_line(error, recipe_type, origin)) from None


def _too_large(value: Any, path: tuple[str, ...]) -> tuple[str, ...]:
    """The path of the first whole number that no library below us takes; empty where there is none."""
    if isinstance(value, int) and abs(value) > _LARGEST_NUMBER:
        return path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next((found for key, one in inner if (found := _too_large(one, (*path, str(key))))), ())


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every default filled in, as JSON-ready values. Recipes hold no secrets, so this may be stored."""
    return recipe.model_dump(mode="json")


def named_paths(recipe: BaseModel, path: str = "") -> Iterator[tuple[str, str]]:
    """Every field that names a file or folder, as its path in the recipe and its value."""
    for name, field in type(recipe).model_fields.items():
        value, where = getattr(recipe, name), f"{path}{name}"
        for index, one in enumerate(value if isinstance(value, list) else []):
            if isinstance(one, BaseModel):
                yield from named_paths(one, f"{where}.{index}.")
        if isinstance(value, BaseModel):
            yield from named_paths(value, f"{where}.")
        elif isinstance(value, str) and any(getattr(each, "func", None) is checked_path for each in field.metadata):
            yield where, value


def result_relevant(recipe: BaseModel) -> dict[str, Any]:
    """The resolved recipe without its operational fields: what a resume must share with the run that it continues."""
    return recipe.model_dump(mode="json", exclude=_operational(type(recipe)))


def _operational(recipe_type: type[BaseModel]) -> dict[str, Any]:
    """Paths of the operational fields, in the form that pydantic's `exclude` takes."""
    found: dict[str, Any] = {}
    for name, field in recipe_type.model_fields.items():
        if field.json_schema_extra == OPERATIONAL:
            found[name] = True
        elif _is_model(field.annotation) and (inner := _operational(field.annotation)):
            found[name] = inner
    return found


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _LARGEST_FILE_BYTES:
            raise ConfigError(f"recipe {file}: has more than {_LARGEST_FILE_BYTES // 1024**2} MiB; is it a recipe?")
        text = file.read_bytes().decode("utf-8-sig")
        return tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"recipe {file}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"recipe {file}: is a folder, expected a TOML file") from None
    except OSError as error:
        raise ConfigError(f"recipe {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"recipe {file}: not UTF-8; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {file}: not valid TOML: {_first_line(str(error))}") from None
    # What tomllib lets through from int() and from dates.
    except ValueError as error:
        raise ConfigError(
            f"recipe {file}: holds a number or date that cannot be read ({_first_line(str(error))})"
        ) from None


def _overridden(merged: dict[str, Any], override: str, recipe_type: type[Recipe]) -> dict[str, Any]:
    """The values with `a.b=c` in place; a number as a key reaches into a list ("models.0.path=...").

    Raises:
        ConfigError: the override has another form, or names an entry that a list does not have.
    """
    path, separator, text = override.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not separator or not all(keys):
        raise ConfigError(f"--set {_shown(override, quoted=False)}: expected the form section.field=value")
    return _placed(merged, keys, _value(text.strip(), recipe_type, keys), override.partition("=")[0])


def _placed(values: Any, keys: list[str], value: Any, path: str) -> Any:
    if not keys:
        return value
    first, *rest = keys
    if isinstance(values, list):
        if not (first.isdecimal() and int(first) < len(values)):
            raise ConfigError(f"--set {path}: expected the number of an entry, 0 to {len(values) - 1}, not {first!r}")
        changed = list(values)
        changed[int(first)] = _placed(values[int(first)], rest, value, path)
        return changed
    table = values if isinstance(values, dict) else {}
    placed = _placed(table.get(first), rest, value, path)
    both_tables = not rest and isinstance(table.get(first), dict) and isinstance(placed, dict)
    return {**table, first: _merge(table[first], placed) if both_tables else placed}


def _value(text: str, recipe_type: type[Recipe], keys: Sequence[str]) -> Any:
    """The override's value: TOML, or plain text where it is none, or where the field takes nothing but text."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    if parsed.keys() != {"value"} or (not isinstance(parsed["value"], str) and _takes_only_text(recipe_type, keys)):
        return text
    return parsed["value"]


def _takes_only_text(recipe_type: type[Recipe], keys: Sequence[str]) -> bool:
    section = _section(recipe_type, keys[:-1])
    field = section.model_fields.get(keys[-1]) if section else None
    kinds = {field.annotation, *get_args(field.annotation)} if field else set()
    return str in kinds and kinds <= {str, type(None), field.annotation if field else None}


def _merge(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """Tables merge key by key, everything else (lists too) is replaced by the right side."""
    merged = dict(left)
    for key, value in right.items():
        both_tables = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_tables else value
    return merged


def _one_line(error: ValidationError, recipe_type: type[Recipe], origin: str) -> str:
    first, *rest = error.errors(include_url=False, include_context=False)
    path = ".".join(_shown(str(part), quoted=False) for part in first["loc"]) or "recipe"
    if first["type"] == "extra_forbidden":
        allowed = _allowed_keys(recipe_type, first["loc"][:-1])
        problem = f"unknown key{f'; allowed: {allowed}' if allowed else ''}"
    elif first["type"] == "missing":
        problem = "is required"
    else:
        problem = _first_line(first["msg"].removeprefix("Value error, "))
        # A whole section is no help; and what stands where a key or an address belongs may be a secret.
        if isinstance(first["input"], str | int | float | list | None) and not _SECRET.search(path):
            problem += f" (got {_shown(first['input'])})"
    more = f" (and {len(rest)} more)" if rest else ""
    return f"{origin}: {path}: {problem}{more}"


_SECRET = re.compile(r"key|url|token|password|secret", re.IGNORECASE)
_LOOKS_SECRET = re.compile(r"://[^/\s]*@|\b(sk|pk|hf|gsk|xai|ghp)[-_]\w{6}|bearer ", re.IGNORECASE)


def _shown(value: object, *, quoted: bool = True) -> str:
    """A value for a message: short, on one line, and not where it looks like a secret."""
    text = repr(value) if quoted else str(value)
    if _LOOKS_SECRET.search(text):
        return "something that looks like a secret"
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _first_line(text: str) -> str:
    return _shown(next(iter(text.splitlines()), ""), quoted=False) if len(text) > 400 else " ".join(text.split())


def _section(recipe_type: type[BaseModel], path: Sequence[int | str]) -> type[BaseModel] | None:
    """The section's type at the path, through lists; None where the path leads elsewhere."""
    section: type[BaseModel] = recipe_type
    for part in path:
        if isinstance(part, int) or part.isdecimal():
            continue
        field = section.model_fields.get(part)
        inner = [arg for arg in (field.annotation, *get_args(field.annotation)) if _is_model(arg)] if field else []
        if not inner:
            return None
        section = inner[0]
    return section


def _allowed_keys(recipe_type: type[BaseModel], path: Sequence[int | str]) -> str:
    """The keys of the section at the path, for the message about an unknown one; empty where it is not a section."""
    section = _section(recipe_type, path)
    return ", ".join(section.model_fields) if section else ""


def _is_model(candidate: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)
