"""Recipes: the one way to say what a job does.

A recipe is a frozen pydantic model. People write it as TOML, sparse and commented; machines write the resolved one
as JSON. Several TOML files merge from left to right, `--set a.b=c` comes last, unknown keys are errors, and every
field carries its unit and range in the docstring beneath it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeGuard, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from janus_ray.errors import ConfigError

IfExists = Literal["fail", "resume", "overwrite"]


class Recipe(BaseModel):
    """Base of every recipe and of every section of one."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


# On fields that say how hard and where, not what: a resume may change them, because they cannot change a result.
OPERATIONAL: dict[str, Any] = {"operational": True}


class RayConfig(Recipe):
    """The Ray cluster a job runs on. RAY_ADDRESS, when set, names a running one and the sizes are its own."""

    logical_cpus: int | None = Field(default=None, ge=1)
    """CPUs that a local cluster claims to have; None takes the machine's. A two-core laptop claims more than it has,
    because Ray counts one for every actor, also for those that only wait."""
    object_store_gib: float | None = Field(default=None, gt=0)
    """Shared memory for objects in GiB; None leaves the choice to Ray."""
    dashboard: bool = False
    """Start the Ray dashboard with a local cluster."""


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def load_recipe(recipe_type: type[AnyRecipe], files: Sequence[Path | str], overrides: Sequence[str] = ()) -> AnyRecipe:
    """Reads, merges and validates TOML files and `a.b=c` overrides.

    Raises:
        ConfigError: one line with the file, the field's path, the value, and what is allowed.
    """
    merged: dict[str, Any] = {}
    for file in files:
        merged = _merge(merged, _read_toml(Path(file)))
    for override in overrides:
        merged = _merge(merged, _parse_override(override))
    origin = " + ".join(str(file) for file in files) or recipe_type.__name__
    return validate(recipe_type, merged, origin)


def validate(recipe_type: type[AnyRecipe], values: dict[str, Any], origin: str) -> AnyRecipe:
    """Builds the recipe; a validation error becomes one line.

    Raises:
        ConfigError: as `load_recipe`.
    """
    try:
        return recipe_type.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_one_line(error, recipe_type, origin)) from None


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every default filled in, as JSON-ready values. Recipes hold no secrets, so this may be stored."""
    return recipe.model_dump(mode="json")


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
        return tomllib.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"recipe {file}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"recipe {file}: is a folder, expected a TOML file") from None
    except OSError as error:
        raise ConfigError(f"recipe {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {file}: not valid TOML: {error}") from None


def _parse_override(override: str) -> dict[str, Any]:
    """`a.b=c` as nested tables; c is read as TOML and, failing that, as plain text."""
    path, separator, text = override.partition("=")
    if not separator or not path.strip():
        raise ConfigError(f"--set {override}: expected the form section.field=value")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    first, *inner = path.strip().split(".")
    for key in reversed(inner):
        value = {key: value}
    return {first: value}


def _merge(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """Tables merge key by key, everything else (lists too) is replaced by the right side."""
    merged = dict(left)
    for key, value in right.items():
        both_tables = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_tables else value
    return merged


def _one_line(error: ValidationError, recipe_type: type[Recipe], origin: str) -> str:
    first, *rest = error.errors()
    path = ".".join(str(part) for part in first["loc"]) or "recipe"
    if first["type"] == "extra_forbidden":
        allowed = _allowed_keys(recipe_type, first["loc"][:-1])
        problem = f"unknown key{f'; allowed: {allowed}' if allowed else ''}"
    elif first["type"] == "missing":
        problem = "is required"
    else:
        # These may hold a secret by mistake.
        secret = path.endswith(("api_key_env", "base_url"))
        problem = first["msg"].removeprefix("Value error, ") + ("" if secret else f" (got {first['input']!r})")
    more = f" (and {len(rest)} more)" if rest else ""
    return f"{origin}: {path}: {problem}{more}"


def _allowed_keys(recipe_type: type[BaseModel], path: Sequence[int | str]) -> str:
    """The keys of the section at the path, for the message about an unknown one; empty where it is not a section."""
    section: Any = recipe_type
    for part in path:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        if field is None:
            return ""
        inner = [arg for arg in (field.annotation, *getattr(field.annotation, "__args__", ())) if _is_model(arg)]
        if not inner:
            return ""
        section = inner[0]
    # What a job fills in itself is kept out of the representation, and out of this list.
    return ", ".join(name for name, field in section.model_fields.items() if field.repr)


def _is_model(candidate: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)
