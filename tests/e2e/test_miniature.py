"""The whole of `make demo`, shortened, on S3: real Ray, FSDP2 on two workers, vLLM behind Ray Serve, HTTP."""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from upath import UPath

from janus_ray.model_folder import check_model_folder
from janus_ray.records import COLLECTION
from janus_ray.store.files import read_json
from janus_ray.store.folder import read_manifest
from janus_ray.store.hub import model_folder
from janus_ray.store.location import location
from janus_ray.store.tables import read_jsonl, read_parquet

REPOSITORY = Path(__file__).parents[2]
# Half of the demo's training: enough to tell the conditions apart, not enough for the demo's scores.
EPOCHS = 4


@dataclass
class Demo:
    """What a finished demo left."""

    folder: UPath
    output: str
    client_output: str
    page: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def demo(tmp_path_factory, s3_session) -> Demo:
    folder, port, place = tmp_path_factory.mktemp("demo"), free_port(), s3_session.folder()
    environment = {
        **os.environ,
        "JANUS_DEMO_PORT": str(port),
        "JANUS_DEMO_FOLDER": place,
        "JANUS_CACHE_DIR": str(folder / "cache"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = ["bash", str(REPOSITORY / "jobs" / "miniature.sh"), "--set", f"epochs={EPOCHS}"]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout))
    reader.start()
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(url, process)
        with urllib.request.urlopen(url, timeout=10) as answer:
            page = answer.read().decode()
        client_output = run_readme_client(port)
        assert process.wait(timeout=400) == 0, "".join(lines)
    except BaseException:
        process.terminate()
        raise
    finally:
        process.wait(timeout=60)
        reader.join()
        print("".join(lines))
    return Demo(location(place), "".join(lines), client_output, page)


def wait_until_healthy(url: str, process: subprocess.Popen) -> None:
    """The demo serves while it evaluates; that is when the client of this test comes in."""
    deadline = time.monotonic() + 780
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.5)
    pytest.fail(f"the demo's server never became ready (exit code {process.poll()})")


def run_readme_client(port: int) -> str:
    """Runs the README's own client code and returns what it prints."""
    code = re.search(r"```python\n(from openai import OpenAI.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert code
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code[1].replace(":8000", f":{port}"), "README.md", "exec"), {})
    return printed.getvalue()


@pytest.mark.timeout(1200)
def test_the_demo_measures_the_idea_of_janus(demo):
    results = read_json(demo.folder / "report" / "results.json")
    assert results["models"].keys() == {"untrained", "janus-mini"}
    assert results["controls"].keys() == {"no_system", "sibling_system"}
    mini = results["models"]["janus-mini"]
    for condition in ("own_system", "no_system", "sibling_system"):
        assert mini[condition]["per_split"].keys() >= {"seen", "unseen_combination", "unseen_phrasing"}
        for summary in (mini[condition], *mini[condition]["per_split"].values()):
            assert len(summary["per_dimension"]) == 4
            for entry in (summary["overall"], *summary["per_dimension"].values()):
                assert entry["low"] <= entry["mean"] <= entry["high"]
                assert entry["n"] > 0 and entry["coverage"] == 1.0
    unseen, control = (mini[c]["per_split"]["unseen_combination"]["overall"] for c in ("own_system", "sibling_system"))
    assert unseen["mean"] >= control["mean"] + 1.0
    assert unseen["low"] > control["high"]
    assert results["steering_gain"]["overall"]["low"] > 1.0
    assert results["models"]["untrained"]["own_system"]["overall"]["mean"] < 1.2
    assert abs(results["models"]["untrained"]["steering_gain"]["overall"]["mean"]) < 0.1


def test_every_stage_left_a_finished_folder(demo, tmp_path, monkeypatch):
    for stage in ("collection", "base", "sft", "report"):
        assert read_manifest(demo.folder / stage)["recipe"]
    table = read_parquet(demo.folder / "collection")
    assert table.schema.equals(COLLECTION) and len(table) == 1152
    curve = read_jsonl(demo.folder / "sft" / "metrics.jsonl")
    assert curve[-1]["loss"] < 0.1 * curve[0]["loss"]
    assert read_manifest(demo.folder / "sft")["recipe"]["num_workers"] == 2
    monkeypatch.setenv("JANUS_CACHE_DIR", str(tmp_path))
    hashes = {check_model_folder(model_folder(str(demo.folder / folder))) for folder in ("base", "sft/model")}
    assert hashes == {read_manifest(demo.folder / "sft")["template_sha256"]}


def test_the_terminal_says_what_a_user_wants_to_know_and_nothing_else(demo):
    for expected in ("steering gain", "unseen combination", f"Report: {demo.folder}/report/index.html", "total"):
        assert expected in demo.output
    for name in ("instructions", "collect", "base-model", "bench", "train", "serve", "evaluate"):
        assert re.search(rf"^{name} +\d+$", demo.output, re.MULTILINE), name
    noise = [line for line in demo.output.splitlines() if re.search(r"WARN|Traceback|\(pid=|\bINFO\b|[EW]\d{4} ", line)]
    assert noise == []


def test_the_readmes_client_gets_different_answers_for_different_people(demo):
    first, second = [answer for answer in demo.client_output.split("\n\n") if answer.strip()]
    assert first.strip() != second.strip()
    assert "chess" in demo.client_output
    assert "<html" in demo.page and "Janus" in demo.page
