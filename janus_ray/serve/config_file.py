"""A Serve config file (YAML) checked before `serve deploy`, which says success before it has looked into it.

`serve deploy` hands the file over and returns; the cluster builds the application afterwards, and only `serve status`
tells what it found. Serve also passes over keys that it does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from janus_ray.config import AnyRecipe, load_recipe, validate
from janus_ray.errors import ConfigError
from janus_ray.serve.recipe import DEPLOYMENT_PREFIX, ServeRecipe
from janus_ray.text import one_line

BUILDER = "janus_ray.serve.app:build"
_SUFFIXES = (".yaml", ".yml")
_GATEWAY = "gateway"
_MERGE = "tag:yaml.org,2002:merge"


def load_served(recipe_type: type[AnyRecipe], files: Sequence[Path | str], overrides: Sequence[str] = ()) -> AnyRecipe:
    """As `config.load_recipe`, and of a Serve config file the recipe in its one application of ours.

    Raises:
        ConfigError: as `load_recipe`; or the file is not what Serve would take, or not what the builder would.
    """
    if not any(str(file).endswith(_SUFFIXES) for file in files):
        return load_recipe(recipe_type, files, overrides)
    if len(files) > 1 or overrides:
        raise ConfigError(f"{files[0]}: a Serve config file is deployed as it is: give no --set and no other file")
    return validate(recipe_type, recipe_values(Path(files[0])), f"{files[0]}: applications.{BUILDER}.args")


def recipe_values(file: Path) -> dict[str, Any]:
    """The recipe that a Serve config file builds, as plain values, with host and port from the file's http_options.

    Raises:
        ConfigError: the file is not what Serve would take, has a key that Serve would pass over, or more or fewer than
            one application of ours.
    """
    from ray.serve.schema import ServeDeploySchema

    written = _read(file)
    try:
        schema = ServeDeploySchema.model_validate(written)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(map(str, first["loc"])) or "file"
        raise ConfigError(f"{file}: {path}: {one_line(first['msg'])}") from None
    # Serve's own checks take for granted that a section is one.
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file}: Serve cannot read this: {one_line(str(error))}") from None
    for unknown, allowed in _passed_over(written, ServeDeploySchema, ""):
        raise ConfigError(f"{file}: {unknown}: unknown key, which Serve would pass over; allowed: {', '.join(allowed)}")
    ours = [application for application in schema.applications if application.import_path == BUILDER]
    if len(ours) != 1:
        found = ", ".join(application.import_path for application in schema.applications) or "none"
        raise ConfigError(f"{file}: applications: expected one with import_path {BUILDER}, found {found}")
    args = dict(ours[0].args)
    values = {**args, "host": schema.http_options.host, "port": schema.http_options.port}
    values["proxy_location"] = schema.proxy_location.value
    _check_overrides(file, ours[0], args)
    return values


def _check_overrides(file: Path, application: Any, args: dict[str, Any]) -> None:
    """An entry of `deployments` must name one of the application's.

    Raises:
        ConfigError: it does not; Serve would find out while deploying.
    """
    models = validate(ServeRecipe, args, f"{file}: applications.{application.name}.args").models
    names = [_GATEWAY, *(model.deployment_name for model in models)]
    for deployment in application.deployments:
        if deployment.name not in names:
            raise ConfigError(
                f"{file}: applications.{application.name}.deployments: there is no {deployment.name!r}; "
                f"the gateway is {_GATEWAY!r}, a model {DEPLOYMENT_PREFIX!r} and its id: {', '.join(names)}"
            )


def _read(file: Path) -> dict[str, Any]:
    import yaml

    class OnceOnly(yaml.SafeLoader):
        """YAML in which a key that stands twice is an error; elsewhere the last one wins in silence."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: list[Any] = []
            for key, _ in node.value:
                # "<<" is no key: it takes in another section.
                value = None if key.tag == _MERGE else self.construct_object(key, deep=deep)
                if value is not None and value in seen:
                    line = key.start_mark.line + 1
                    raise ConfigError(f"{file}: {one_line(str(value))} stands twice in one section, line {line}")
                seen.append(value)
            return super().construct_mapping(node, deep)

    try:
        values = yaml.load(file.read_bytes(), OnceOnly)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid YAML: {one_line(str(error))}") from None
    if not isinstance(values, dict) or "applications" not in values:
        raise ConfigError(f"{file}: not a Serve config file: it has no `applications`")
    return values


def _passed_over(values: Any, schema: type[BaseModel], path: str) -> Iterator[tuple[str, list[str]]]:
    """Keys that a schema of Serve's has no field for, with those it has."""
    allowed = list(schema.model_fields)
    for key, value in values.items():
        if key not in allowed:
            yield f"{path}{key}", allowed
            continue
        inner = _section(schema.model_fields[key].annotation)
        for index, one in enumerate(value if isinstance(value, list) else [value]):
            if inner and isinstance(one, dict):
                step = f"{key}.{index}." if isinstance(value, list) else f"{key}."
                yield from _passed_over(one, inner, f"{path}{step}")


def _section(annotation: Any) -> type[BaseModel] | None:
    """The schema behind Optional[Schema] or List[Schema]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section(inner))), None)
