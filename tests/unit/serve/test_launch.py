import json
import socket

import pytest

from janus_ray.config import validate
from janus_ray.errors import CheckpointError, ConfigError
from janus_ray.serve.launch import cause, check_before_start
from janus_ray.serve.recipe import ServeRecipe


def recipe(path, **fields) -> ServeRecipe:
    return validate(ServeRecipe, {"models": [{"model_id": "m", "path": str(path)}], **fields}, "test")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_port_in_use_is_refused(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} .*already in use.*--set port"):
            check_before_start(recipe(tmp_path, port=port))


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not a model folder"):
        check_before_start(recipe(tmp_path / "absent", port=free_port()))
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match=r"no janus_template\.json"):
        check_before_start(recipe(tmp_path, port=free_port()))


def test_the_cause_is_the_last_exception_that_says_something():
    trace = """Traceback (most recent call last):
  File "x.py", line 1, in f
ValueError: first

The above exception was the direct cause:
ray.exceptions.RayTaskError(RuntimeError): wrapped
RuntimeError: Failed to create vLLM engine config: no such model
    at somewhere"""
    assert cause(trace) == "RuntimeError: Failed to create vLLM engine config: no such model"
    assert cause("just words") == "just words"
    assert cause("") == "no reason was given"
