"""Recipes: the one way to say what a job does.

A recipe is a frozen pydantic model. People write it as TOML, sparse and commented; machines write the resolved one
as JSON. Several TOML files merge from left to right, `--set a.b=c` comes last, unknown keys are errors, and every
field carries its unit and range in the docstring beneath it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeGuard, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from janus_ray.env import log_level, native_log_path, set_quiet_defaults
from janus_ray.errors import ConfigError, JanusError

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


def keep_native_logs_off_the_terminal() -> None:
    """Sends what native code writes to file descriptor 2 to a log file; Python's own stderr stays on the terminal.

    Ray's C++ core reports harmless matters there, at level error and without a switch. JANUS_LOG_LEVEL=DEBUG shows
    everything.
    """
    if log_level() == "DEBUG":
        return
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    log = os.open(native_log_path(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 2)
    os.close(log)


def _is_model(candidate: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)


def _our_error(error: BaseException | None) -> JanusError | None:
    """The error for a person behind an exception: Ray wraps what crossed a process, sometimes more than once."""
    while error is not None:
        inner = getattr(error, "cause", None)
        if isinstance(error, JanusError) and not isinstance(inner, JanusError):
            return error
        error = inner if isinstance(inner, BaseException) else error.__cause__
    return None


def job_arguments(doc: str | None) -> argparse.ArgumentParser:
    """The command line that every job has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE.toml", help="one or more recipes, merged left to right")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", dest="overrides", help="override a field"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe as JSON and stop")
    parser.add_argument(
        "--if-exists",
        choices=("fail", "resume", "overwrite"),
        default="fail",
        help="what to do when the output folder exists (default: fail)",
    )
    return parser


def run_job(
    recipe_type: type[AnyRecipe],
    run: Callable[[AnyRecipe, IfExists], None],
    doc: str | None,
    arguments: Sequence[str] | None = None,
) -> NoReturn:
    """The process boundary of a job: parse, run, and turn an error for a person into one line and exit code 2."""
    parsed = job_arguments(doc).parse_args(arguments)
    set_quiet_defaults()
    keep_native_logs_off_the_terminal()
    try:
        recipe = load_recipe(recipe_type, parsed.recipes, parsed.overrides)
        if parsed.dry_run:
            print(json.dumps(resolved(recipe), indent=2))
        else:
            run(recipe, parsed.if_exists)
    # Broad, because this is the process boundary: what is not meant for a person is raised again.
    except Exception as error:
        ours = _our_error(error)
        if ours is None:
            raise
        print(f"error: {ours}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run again with --if-exists resume to continue", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
