"""The four jobs, each run for real on a cluster one of whose nodes dies meanwhile, and what that cost."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from janus_ray.data.client import AnnotatingClient
from janus_ray.llm.fanout import EndpointClient
from janus_ray.miniature import judge, teacher
from janus_ray.miniature.bench import build_bench
from janus_ray.miniature.recipe import BenchRecipe
from janus_ray.miniature.server import JUDGE, TEACHER
from janus_ray.miniature.world import instructions
from janus_ray.records import canonical_json
from janus_ray.store.files import write_jsonl
from janus_ray.store.tables import read_jsonl, read_parquet
from tests.cluster.nodes import REPOSITORY, LocalCluster, free_port, wait_for
from tests.loopback import Loopback, Reply, chat_reply

# A model this small answers at once; a paid endpoint takes its time, and the node is to die meanwhile.
ANSWER_S = 0.6
INSTRUCTIONS = 48
SETS = 3
MODEL = "janus-mini"
_JOB_S = 240.0
_SERVE_S = 300.0
_CALLERS = 6
_PATIENCE_S = 2.0
_SHOWN = 160


@dataclass
class Outcome:
    """What became of a stage whose node died."""

    stage: str
    recovered: bool = False
    said: str = ""
    """The job's own line about it."""
    nodes: int = 0
    """On how many nodes its processes ran."""
    seconds_lost: float | None = None
    """From the kill until as many processes were at work as before."""
    requests: int = 0
    requests_sent_twice: int = 0
    requests_failed: int = 0
    """Of a server's callers, who do not try again: answered 503 with Retry-After, or cut off."""
    rows: int = 0
    rows_lost: int = 0
    steps: int = 0
    steps_lost: int = 0
    notes: list[str] = field(default_factory=list)

    def as_row(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Job:
    """`python -m jobs.NAME ...` as a user runs it, its lines passed on as they come."""

    def __init__(self, cluster: LocalCluster, name: str, recipe: Path, *arguments: str) -> None:
        """Starts it."""
        self.name, self.lines = name, []
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [_python(), "-m", f"jobs.{name}", str(recipe), *arguments],
            cwd=REPOSITORY,
            env={**cluster.environment, "RAY_ADDRESS": cluster.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            print(f"    {line.rstrip()}", flush=True)

    def wait(self, limit_s: float = _JOB_S) -> int:
        """The exit code."""
        try:
            code = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
            self.lines.append(f"(still running after {limit_s:g} s; ended by the test)")
        self._reader.join(10)
        return code

    def said(self, words: str) -> str:
        """The first line that holds what the words match; empty if none does."""
        return next((line for line in self.lines if re.search(words, line)), "")

    def end(self) -> None:
        """Ends it, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _python() -> str:
    """As short as a person writes it: the dashboard shows how a job was started."""
    executable = Path(sys.executable)
    return str(executable.relative_to(REPOSITORY)) if executable.is_relative_to(REPOSITORY) else str(executable)


def answer_as_the_miniature(number: int, body: dict[str, Any]) -> Reply:
    """Teacher and judge of the miniature, at the pace of a real endpoint."""
    if body["model"] == JUDGE:
        reply = chat_reply(judge.verdict(body["messages"][-1]["content"]))
    else:
        reply = chat_reply(teacher.answer(body["messages"], body.get("seed") or 0))
    reply.delay_s = ANSWER_S
    return reply


def sent_twice(requests: list[dict[str, Any]]) -> int:
    """How many requests were sent that had been sent before."""
    return sum(number - 1 for number in Counter(map(canonical_json, requests)).values())


def write_toml(path: Path, values: dict[str, Any]) -> Path:
    """A recipe file: plain values first, then sections, then lists of sections."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not _is_section(value)]
    for key, value in values.items():
        for section in [value] if isinstance(value, dict) else value if _is_section(value) else []:
            lines.append(f"[{key}]" if isinstance(value, dict) else f"[[{key}]]")
            lines += [f"{name} = {json.dumps(one)}" for name, one in section.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


def _is_section(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


class Stages:
    """The four stages on one cluster, each with what it needs from the one before."""

    def __init__(self, cluster: LocalCluster, folder: Path, endpoint: Loopback) -> None:
        """Keeps what is shared."""
        self.cluster, self.folder, self.endpoint = cluster, folder, endpoint
        self.port = free_port("127.0.0.2")
        self.server: Job | None = None

    def _kill_one(self, outcome: Outcome, job: Job, actors: Callable[[], dict[str, list[int]]]) -> float:
        """Waits until the stage's actors are on two nodes, kills one of them, and starts another node in its place."""
        held: dict[str, list[int]] = {}

        def on_two() -> bool:
            held.clear()
            held.update(actors())
            return len(held) >= 2

        try:
            self._wait_while(job, "processes on two nodes", on_two)
        except AssertionError as error:
            raise AssertionError(f"{error} (found {held}, {self.cluster.trouble!r})") from None
        outcome.nodes = len(held)
        victim = sorted(held)[0]
        of = sum(map(len, held.values()))
        print(f"  killing node {victim[:8]}, which runs {len(held[victim])} of {of} processes", flush=True)
        self.cluster.kill(victim)
        killed = time.monotonic()
        self.cluster.add_worker(wait=False)
        return killed

    def _wait_while(self, job: Job, what: str, condition: Callable[[], Any]) -> None:
        """Waits for the condition as long as the job runs."""
        wait_for(what, lambda: condition() or job.process.poll() is not None, _SERVE_S)
        assert job.process.poll() is None, f"{job.name} ended before there were {what}"

    def _ran(self, outcome: Outcome, job: Job) -> None:
        code = job.wait()
        outcome.recovered = code == 0
        if code:
            outcome.said = next((line for line in job.lines if line.startswith("error:")), f"exit code {code}")
            outcome.notes.append(f"{len(job.lines)} lines in all")

    def collect(self) -> Outcome:
        """Collects with client actors on two nodes."""
        outcome = Outcome("collect")
        write_jsonl(self.folder / "instructions.jsonl", instructions()[:INSTRUCTIONS])
        recipe = write_toml(
            self.folder / "collect.toml",
            {
                "output_dir": str(self.folder / "collection"),
                "num_sets": SETS,
                "client_actors": 2,
                "sources": [{"path": str(self.folder / "instructions.jsonl"), "source_column": "family"}],
                "teacher": {"base_url": self.endpoint.url, "model": TEACHER, "max_concurrency": 8},
            },
        )
        expected = INSTRUCTIONS * (1 + 2 * SETS)
        before = len(self.endpoint.requests)
        job = Job(self.cluster, "collect", recipe)
        try:
            self._wait_while(job, "requests", lambda: len(self.endpoint.requests) - before > expected // 6)
            self._kill_one(outcome, job, self._clients)
            self._ran(outcome, job)
        finally:
            job.end()
        asked = self.endpoint.requests[before:]
        outcome.requests, outcome.requests_sent_twice = len(asked), sent_twice(asked)
        outcome.rows = INSTRUCTIONS * SETS
        outcome.rows_lost = outcome.rows - self._collected()
        return outcome

    def _collected(self) -> int:
        """Rows that are there, each counted once."""
        if not list((self.folder / "collection").glob("part-*.parquet")):
            return 0
        rows = read_parquet(str(self.folder / "collection"), ["prompt_id", "set_index", "status"]).to_pylist()
        return len({(row["prompt_id"], row["set_index"]) for row in rows if row["status"] == "ok"})

    def _clients(self) -> dict[str, list[int]]:
        """The processes that ask an endpoint, by node."""
        return self.cluster.actors(EndpointClient.__name__) or self.cluster.actors(AnnotatingClient.__name__)

    def train(self) -> Outcome:
        """Trains with two FSDP workers on two nodes."""
        outcome = Outcome("train")
        base = write_toml(
            self.folder / "base.toml",
            {"collection": str(self.folder / "collection"), "output_dir": str(self.folder / "base")},
        )
        assert Job(self.cluster, "miniature_model", base, "--if-exists", "overwrite").wait() == 0
        recipe = write_toml(
            self.folder / "train.toml",
            {
                "collection": str(self.folder / "collection"),
                "base_model": str(self.folder / "base"),
                "output_dir": str(self.folder / "sft"),
                **{"max_length": 512, "bins_per_step": 4, "bins_per_micro_batch": 2, "epochs": 40, "max_steps": 60},
                **{"learning_rate": 4e-3, "warmup_steps": 10, "precision": "fp32", "activation_checkpointing": False},
                # A worker reserves a CPU for each of its threads: two do not fit on one node.
                **{"num_workers": 2, "threads_per_worker": 3, "log_every_steps": 1, "checkpoint_every_steps": 5},
            },
        )
        job = Job(self.cluster, "train", recipe)
        try:
            self._wait_while(job, "the first steps", lambda: _steps(job.lines)[-1:] >= [12])
            self._kill_one(outcome, job, lambda: self.cluster.actors("TrainWorker"))
            reached = max(_steps(job.lines))
            self._ran(outcome, job)
        finally:
            job.end()
        outcome.said = outcome.said or job.said("starting the workers again|taken away")
        outcome.steps = 60
        again = re.search(r"going on after step (\d+)", job.said("going on after step"))
        outcome.steps_lost = reached - int(again[1]) if again else reached
        return outcome

    def start_server(self) -> None:
        """Serves the trained model with two replicas on two nodes."""
        recipe = write_toml(
            self.folder / "serve.toml",
            {
                "port": self.port,
                "host": "127.0.0.2",
                "max_tokens": 256,
                # With one, the death of its node would be an outage.
                "gateway_replicas": 2,
                "start_timeout_s": _SERVE_S,
                "models": [
                    {
                        "model_id": MODEL,
                        "path": str(self.folder / "sft" / "model"),
                        **{"max_model_len": 1024, "kv_cache_gib": 0.1, "min_replicas": 2, "max_replicas": 2},
                        **{"max_num_seqs": 8, "target_ongoing_requests": 8, "max_ongoing_requests": 16},
                    }
                ],
            },
        )
        self.server = Job(self.cluster, "serve", recipe)
        server = self.server
        self._wait_while(server, "the endpoint", self._is_up)

    @property
    def url(self) -> str:
        """Of the served model."""
        return f"http://127.0.0.2:{self.port}"

    def _is_up(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def serve(self) -> Outcome:
        """Kills a node of the server under load; its callers do not try again."""
        outcome = Outcome("serve")
        self.start_server()
        statuses: list[str] = []
        stop = threading.Event()
        arguments = [(self.url, statuses, stop, seed) for seed in range(_CALLERS)]
        callers = [threading.Thread(target=_call, args=each, daemon=True) for each in arguments]
        for caller in callers:
            caller.start()
        try:
            wait_for("answers", lambda: statuses.count("200") > 12, 120)
            assert self.server
            killed = self._kill_one(outcome, self.server, self._replicas)
            at_kill = len(statuses)
            wait_for("another replica", self._two_live, _SERVE_S)
            outcome.seconds_lost = round(time.monotonic() - killed, 1)
            after = len(statuses)
            wait_for("answers after that", lambda: statuses[after:].count("200") > 12, 120)
            outcome.recovered = True
        finally:
            stop.set()
            for caller in callers:
                caller.join(60)
        assert self.server
        outcome.said = self.server.said("replicas up, ")
        counts = Counter(statuses)
        outcome.requests = len(statuses)
        outcome.requests_failed = len(statuses) - counts["200"]
        between = Counter(statuses[at_kill:after])
        outcome.notes.append(f"all: {dict(counts)}; from the kill to the new replica: {dict(between)}")
        return outcome

    def _two_live(self) -> bool:
        """Whether two replicas can answer on nodes that live."""
        # The cluster learns of a node's death some seconds after it, so the addresses of ours decide.
        ours = {node.address for node in self.cluster.workers}
        alive = {node_id for address, node_id in self.cluster.alive().items() if address in ours}
        return sum(len(pids) for node_id, pids in self._replicas().items() if node_id in alive) >= 2

    def _replicas(self) -> dict[str, list[int]]:
        """The replicas of the model that can answer, by node."""
        try:
            details = httpx.get(f"{self.cluster.dashboard}/api/serve/applications/", timeout=10).json()
            replicas = details["applications"]["janus"]["deployments"][f"model:{MODEL}"]["replicas"]
        except (httpx.HTTPError, ValueError, KeyError):
            return {}
        found: dict[str, list[int]] = {}
        for replica in replicas:
            if replica["state"] == "RUNNING":
                found.setdefault(replica["node_id"], []).append(replica["pid"])
        return found

    def evaluate(self) -> Outcome:
        """Evaluates the served model; the node that dies runs a client, and perhaps a replica."""
        outcome = Outcome("evaluate")
        build_bench(
            BenchRecipe(
                collection=str(self.folder / "collection"),
                output_path=str(self.folder / "bench.jsonl"),
                prompts_per_split=2,
            )
        )
        recipe = write_toml(
            self.folder / "evaluate.toml",
            {
                "bench": str(self.folder / "bench.jsonl"),
                "output_dir": str(self.folder / "report"),
                "main_model": MODEL,
                "client_actors": 2,
                "models": [{"name": MODEL, "model": MODEL}],
                "policy": {"base_url": f"{self.url}/v1", "max_concurrency": 8},
                "judge": {"base_url": self.endpoint.url, "model": JUDGE, "max_concurrency": 8},
                "generation": {"temperature": 0.0, "top_p": 1.0, "max_tokens": 48, "repetition_penalty": 1.0},
            },
        )
        before = len(self.endpoint.requests)
        job = Job(self.cluster, "evaluate", recipe)
        try:
            self._wait_while(job, "judgments", lambda: len(self.endpoint.requests) - before > 60)
            self._kill_one(outcome, job, self._clients)
            self._ran(outcome, job)
        finally:
            job.end()
        asked = self.endpoint.requests[before:]
        outcome.requests, outcome.requests_sent_twice = len(asked), sent_twice(asked)
        judgments = read_jsonl(self.folder / "report" / "judgments.jsonl") if outcome.recovered else []
        outcome.rows = len(judgments)
        outcome.rows_lost = sum(row["status"] != "ok" for row in judgments)
        return outcome

    def close(self) -> None:
        """Ends the server as a person does."""
        if self.server and self.server.process.poll() is None:
            self.server.process.terminate()
            self.server.wait(60)


def _steps(lines: list[str]) -> list[int]:
    return [int(found[1]) for line in lines if (found := re.search(r"\bstep +(\d+)/", line))]


def _call(url: str, statuses: list[str], stop: threading.Event, seed: int) -> None:
    """One request after another until told to stop, none of them tried again; what became of each."""
    message = {"role": "user", "content": f"How do I make bread? {seed}"}
    body = {"model": MODEL, "messages": [message], "max_tokens": 64, "ignore_eos": True}
    with httpx.Client(timeout=120) as client:
        while not stop.is_set():
            try:
                answer = client.post(f"{url}/v1/chat/completions", json=body)
            except httpx.HTTPError as error:
                statuses.append(type(error).__name__)
                stop.wait(_PATIENCE_S)
                continue
            wait_s = answer.headers.get("retry-after")
            told = f"retry-after {wait_s}" if wait_s else "" if answer.status_code == 200 else answer.text[:_SHOWN]
            statuses.append(f"{answer.status_code} {told}".strip())
            if wait_s:
                stop.wait(min(float(wait_s), _PATIENCE_S))
