import itertools
import json
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from janus_ray import progress
from janus_ray.config import validate
from janus_ray.errors import CheckpointError, ConfigError
from janus_ray.serve import launch
from janus_ray.serve.causes import cause, engine_cause
from janus_ray.serve.ingress import base_url, healthy
from janus_ray.serve.launch import check_before_start, replica_news
from janus_ray.serve.recipe import ServeRecipe
from tests.loopback import Reply, loopback


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


def test_the_start_says_what_is_up_and_how_long_it_may_take(tmp_path, monkeypatch, capsys):
    found = iter([(False, 0, "model m starting, gateway up")] * 3 + [(True, 1, "model m up, gateway up")])
    clock = itertools.count(0.0, 7.0)
    monkeypatch.setattr(launch, "_state", lambda recipe: next(found))
    monkeypatch.setattr(launch, "answer_health", lambda recipe: ["entrance"])
    monkeypatch.setattr(launch, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 0.0))
    stop = SimpleNamespace(wait=lambda seconds: False)
    assert launch._wait_until_ready(recipe(tmp_path, start_timeout_s=100), stop, 0.0) == ["entrance"]
    assert capsys.readouterr().out.splitlines() == [
        "serve: models up 0/1 (0 %), model m starting, gateway up, 14 s so far, at most 1 min 26 s more",
        "serve: models up 0/1 (0 %), model m starting, gateway up, 21 s so far, at most 1 min 19 s more",
        "serve: models up 1/1 (100 %)",
    ]


def test_a_host_that_is_not_this_machine_is_refused_in_words(tmp_path):
    with pytest.raises(ConfigError, match=r"port \d+ on no-such-host.invalid: (?!unknown error)\w"):
        check_before_start(recipe(tmp_path, host="no-such-host.invalid", port=free_port()))


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        check_before_start(recipe(tmp_path / "absent", port=free_port()))
    with pytest.raises(CheckpointError, match="not a model folder"):
        check_before_start(recipe(tmp_path, port=free_port()))
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match=r"no janus_template\.json.*chat_template = \"own\""):
        check_before_start(recipe(tmp_path, port=free_port()))


def test_a_server_on_this_machine_is_asked_without_the_proxy(monkeypatch):
    with loopback(lambda *_: Reply()) as endpoint, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert healthy(f"{endpoint.url}/models?")
        # There is no /health, but an answer.
        assert not healthy(endpoint.url)


def test_the_cause_is_the_last_exception_with_all_it_says():
    trace = """Traceback (most recent call last):
  File "x.py", line 1, in f
ValueError: first

The above exception was the direct cause:
RuntimeError: Failed to create the engine: 1 validation error for ModelConfig
  Value error, max_model_len (4096) is too large. [type=value_error]
    For further information visit us"""
    assert cause(trace).startswith(
        "RuntimeError: Failed to create the engine: 1 validation error for ModelConfig Value"
    )
    assert "max_model_len (4096) is too large." in cause(trace)
    assert "first" not in cause(trace)
    assert cause("just\nwords") == "just words"
    assert cause("") == "no reason was given"


def test_what_a_replica_wraps_is_named_by_itself():
    assert (
        cause("ray.exceptions.X\nRuntimeError: SafetensorError: header too large")
        == "SafetensorError: header too large"
    )
    assert cause("RuntimeError: the warm-up request failed: x") == "RuntimeError: the warm-up request failed: x"


def test_the_engines_own_cause_is_found_in_the_log_that_it_shares_with_its_replica():
    assert engine_cause("") is None
    log = (
        "ValueError: of the replica\n"
        "(EngineCore pid=7) ERROR core.py:1 RuntimeError: first\n"
        "(EngineCore pid=7) safetensors.SafetensorError: header too large\n"
        "(EngineCore pid=7) and so on\n"
    )
    assert engine_cause(log) == "SafetensorError: header too large"


def test_a_process_reads_what_it_has_written_to_standard_error(tmp_path):
    code = "import sys; from janus_ray.serve.causes import own_log; print('a line', file=sys.stderr); print(own_log())"
    with (tmp_path / "err").open("w") as err:
        read = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=err, text=True, check=True)
    assert read.stdout.strip() == "a line"
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert piped.stdout.strip() == ""


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://10.0.0.7:80"),
        ("::", "http://10.0.0.7:80"),
        ("::1", "http://[::1]:80"),
        ("node.internal", "http://node.internal:80"),
    ],
)
def test_where_a_server_is_reached(host, url):
    assert base_url(host, 80, "10.0.0.7") == url
    assert base_url("::", 80, "fd00::2") == "http://[fd00::2]:80"


def test_the_job_refuses_in_one_line(run_job_process, tmp_path):
    recipe_file = tmp_path / "recipe.toml"
    recipe_file.write_text(f'[[models]]\nmodel_id = "m"\npath = "{tmp_path}/absent"\n')
    finished = run_job_process("serve", recipe_file, "--set", f"port={free_port()}")
    assert finished.returncode == 2
    assert finished.stderr.startswith(f"error: model {tmp_path}/absent: no such folder")
    assert finished.stderr.count("\n") == 1
    assert finished.stdout == ""


def test_a_replica_that_goes_or_comes_is_one_line():
    assert replica_news({"a": 2, "b": 1}, {"a": 2, "b": 1}) == []
    assert replica_news({"a": 2, "b": 1}, {"a": 1, "b": 1}) == ["serve: model a: 1 replicas up, 2 before"]
    assert replica_news({"a": 1, "b": 1}, {"b": 3}) == [
        "serve: model a: 0 replicas up, 1 before",
        "serve: model b: 3 replicas up, 1 before",
    ]
