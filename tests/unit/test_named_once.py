"""Each metric and each environment variable has one place; nothing is reported or read that is not named there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from janus_ray import metrics

REPOSITORY = Path(__file__).parents[2]
VARIABLE = re.compile(r"(JANUS|RAY|HF|VLLM|OMP|TORCH|TORCHDYNAMO|TOKENIZERS|CUDA|NCCL)_[A-Z][A-Z_]+")
KINDS = ("Counter", "Gauge", "Histogram")


def sources() -> list[Path]:
    return sorted([*REPOSITORY.glob("janus_ray/**/*.py"), *REPOSITORY.glob("jobs/**/*.py")])


def variables(code: str) -> set[str]:
    texts = {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}
    return {text for text in texts if isinstance(text, str) and VARIABLE.fullmatch(text)}


def makes_instruments(code: str) -> bool:
    """Whether code makes a metric of Ray's, or asks its modules for the means to."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module in ("ray.util.metrics", "ray.serve.metrics"):
            return True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in KINDS:
            of = node.func.value
            if isinstance(of, ast.Name) and of.id in ("metrics", "library"):
                return True
    return False


def used() -> Iterator[str]:
    for path in sources():
        if path.name != "metrics.py":
            yield from re.findall(r"\b[A-Z][A-Z_]+\b", path.read_text())


@pytest.mark.parametrize(
    "name", ["from ray.util.metrics import Gauge", "from ray.serve import metrics\nmetrics.Counter('a')"]
)
def test_an_instrument_of_ones_own_is_found(name):
    assert makes_instruments(name)
    assert not makes_instruments("from collections import Counter\nCounter('abc')")


def test_only_metrics_py_makes_instruments():
    found = [path.name for path in sources() if makes_instruments(path.read_text())]
    assert found == ["metrics.py"]


def test_every_metric_has_a_name_of_its_own_and_says_what_it_is():
    assert len({metric.name for metric in metrics.ALL}) == len(metrics.ALL)
    for metric in metrics.ALL:
        assert re.fullmatch(r"janus_[a-z_]+", metric.name) and metric.unit and metric.help
        assert (metric.kind == "histogram") == bool(metric.bounds)
    defined = [value for value in vars(metrics).values() if isinstance(value, metrics.Metric)]
    assert set(defined) <= set(metrics.ALL)


def test_every_variable_stands_in_env_py():
    known = (REPOSITORY / "janus_ray" / "env.py").read_text()
    found = {name: path.name for path in sources() if path.name != "env.py" for name in variables(path.read_text())}
    for path in [*REPOSITORY.glob("jobs/*.sh"), *REPOSITORY.glob("deploy/**/*.yaml"), REPOSITORY / "tests/conftest.py"]:
        found |= {match[0]: path.name for match in VARIABLE.finditer(path.read_text())}
    assert "HF_HOME" in found and "JANUS_EXPECT_GPU" in found
    assert {name: where for name, where in found.items() if not re.search(rf"\b{name}\b", known)} == {}
