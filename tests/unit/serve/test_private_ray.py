import ast
import re
from pathlib import Path

import pytest
import ray

from janus_ray.errors import ConfigError
from janus_ray.serve import private_ray

ROOT = Path(__file__).parents[3]
# A module of Ray's with a part that begins with an underscore, in an import or as a text.
PRIVATE = re.compile(r"^ray(\.\w+)*\._\w+")


def private_names(path: Path) -> list[str]:
    """What a file names of Ray's private modules, and what it imports of private names."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{name.name}" for name in node.names]
        elif isinstance(node, ast.Attribute):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return [name for name in found if PRIVATE.match(name)]


def test_one_file_names_what_ray_keeps_private():
    files = [path for folder in ("janus_ray", "jobs") for path in sorted((ROOT / folder).rglob("*.py"))]
    named = {str(path.relative_to(ROOT)): names for path in files if (names := private_names(path))}
    assert list(named) == ["janus_ray/serve/private_ray.py"], named


def test_what_another_version_of_ray_lacks_is_one_line(monkeypatch):
    class Moved:
        engine = object()

    for lacking, words in (
        (lambda: private_ray.with_methods(Moved, "start_engine"), "Moved has no start_engine"),
        (lambda: private_ray.engine_client(Moved()), "has no _engine_client"),
        (lambda: private_ray._named("ray.no_such", "x"), r"ray\.no_such cannot be imported \(No module named"),
        (lambda: private_ray._named("ray.util", "no_such"), "ray.util has no no_such"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            lacking()
        assert str(error.value).startswith(f"Ray {ray.__version__} is not the version") and "\n" not in str(error.value)


def test_a_log_folder_that_is_not_found_stops_nothing(monkeypatch):
    monkeypatch.setattr(private_ray, "_named", lambda *names: None)
    assert "logs" in private_ray.logs_folder()
