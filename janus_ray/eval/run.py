"""The driver of an evaluation: three steps with files between them, and a summary for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from upath import UPath

from janus_ray.cluster import ray_cluster
from janus_ray.config import IfExists
from janus_ray.errors import DataError
from janus_ray.eval.aggregate import aggregate
from janus_ray.eval.bench import load_bench
from janus_ray.eval.benchmarks.multifaceted import JUDGE_SEES
from janus_ray.eval.generate import GENERATIONS_FILE, generate
from janus_ray.eval.grade import JUDGMENTS_FILE, grade
from janus_ray.eval.items import BenchItem
from janus_ray.eval.recipe import EvaluateRecipe
from janus_ray.eval.report import write_report
from janus_ray.eval.results import Protocol, Results
from janus_ray.eval.rows import read_back
from janus_ray.eval.samples import collected_samples
from janus_ray.eval.summary import print_summary
from janus_ray.llm.check import check_endpoint
from janus_ray.llm.endpoint import Endpoint, ReachedEndpoint
from janus_ray.llm.outcome import Status
from janus_ray.records import shortened
from janus_ray.stats import INTERVAL
from janus_ray.store.files import read_json, what_is_at, write_json
from janus_ray.store.folder import UNKNOWN, Ref, RunFolder, read_manifest

RESULTS_FILE, REPORT_FILE = "results.json", "index.html"
# The one input that is no model.
BENCH = "bench"


def evaluate(recipe: EvaluateRecipe, if_exists: IfExists) -> Results:
    """Runs the evaluation, writes results.json and index.html, and returns the results.

    The numbers are written and shown before the report is drawn, and every answer is in the ledger before that: what
    fails later costs no request again.

    Args:
        recipe: what to do.
        if_exists: "resume" sends only what no earlier run finished.

    Raises:
        ConfigError, DataError: the bench, an endpoint, the folder or the cluster is not as it must be.
    """
    items = load_bench(recipe.bench, recipe.max_prompts_per_split)
    folder = RunFolder(recipe.output_dir, recipe, if_exists)
    policies = {
        model.name: _reached(recipe.policy.model_copy(update={"model": model.model}), f"policy {model.name}")
        for model in recipe.models
    }
    judge = _reached(recipe.judge, "judge")
    inputs = _inputs(recipe, policies, judge)
    # A model trained again and served under its old name is what one evaluates: its answers are other requests to the
    # ledger, and every row is made from there again.
    endpoints = inputs.keys() - {BENCH}
    renewed = folder.check_inputs(inputs, whole=True, anew=endpoints)
    for name in renewed:
        print(
            f"{name}: other weights answer under that name than when {folder.path} was made; evaluated anew", flush=True
        )
    finished = None if renewed else _finished(folder, inputs)
    if finished is not None:
        print(f"{folder.path}: already finished; 0 requests sent")
        print_summary(finished)
        print(f"report: {folder.path / REPORT_FILE}")
        return finished
    prompts = len({item.prompt_id for item in items})
    print(f"evaluate: {len(items)} items on {prompts} prompts, judged by {judge.model}", flush=True)
    with ray_cluster(recipe.ray, recipe.client_actors, f"evaluate with {recipe.client_actors} client actors"):
        folder.begin(inputs, anew=endpoints)
        generate(recipe, policies, items, folder.path)
        grade(recipe, judge, items, folder.path)
    results = aggregate(
        judgments=read_back(folder.path / JUDGMENTS_FILE),
        generations=read_back(folder.path / GENERATIONS_FILE),
        models=[model.name for model in recipe.models],
        main_model=recipe.main_model,
        threshold=recipe.coverage_threshold,
        protocol=_protocol(recipe, inputs, items),
    )
    write_json(folder.path / RESULTS_FILE, results.as_json())
    print_summary(results)
    _draw_report(recipe, results, items, folder.path)
    rows = {step: sum(sum(counts.values()) for counts in models.values()) for step, models in _counts(results).items()}
    folder.finish(counts={"items": len(items), **rows}, status_counts=_counts(results))
    print(f"report: {folder.path / REPORT_FILE}")
    return results


def _reached(endpoint: Endpoint, role: str) -> ReachedEndpoint:
    """The endpoint with the id of the weights behind its model, where it tells one."""
    reached = endpoint.reached(check_endpoint(endpoint, role))
    if reached.weights_id is None:
        print(
            f"{role}: the endpoint does not say which weights {shortened(endpoint.model)} is at the moment; if they "
            "change under that name, take another output folder",
            flush=True,
        )
    return reached


def _inputs(recipe: EvaluateRecipe, policies: Mapping[str, ReachedEndpoint], judge: ReachedEndpoint) -> dict[str, Ref]:
    """What the numbers are made from."""
    endpoints = {**{f"policy {name}": endpoint for name, endpoint in policies.items()}, "judge": judge}
    return {BENCH: Ref.of(recipe.bench)} | {
        name: Ref(f"{endpoint.address} {endpoint.model}", endpoint.weights_id or UNKNOWN)
        for name, endpoint in endpoints.items()
    }


def _finished(folder: RunFolder, inputs: Mapping[str, Ref]) -> Results | None:
    """The results of a finished evaluation that nothing would be added to; None where something would."""
    is_whole = all(what_is_at(folder.path / name) == "file" for name in (RESULTS_FILE, REPORT_FILE))
    told = UNKNOWN not in {ref.revision for ref in inputs.values()}
    if not (folder.finished and is_whole and told) or _has_failures(read_manifest(folder.path)):
        return None
    try:
        return Results.from_json(read_json(folder.path / RESULTS_FILE))
    except ValueError:
        # Another version's: the ledger has every answer.
        return None


def _counts(results: Results) -> dict[str, dict[str, dict[str, int]]]:
    return results.as_json()["status_counts"]


def _draw_report(recipe: EvaluateRecipe, results: Results, items: Sequence[BenchItem], folder: UPath) -> None:
    """Draws and writes the report.

    Raises:
        DataError: it cannot be drawn or written; the numbers are safe by then.
    """
    done = f"the numbers are in {folder / RESULTS_FILE}, and --if-exists resume tries again without a request"
    rows = (read_back(folder / name) for name in (GENERATIONS_FILE, JUDGMENTS_FILE))
    try:
        samples = collected_samples(recipe.main_model, items, *rows, number=recipe.samples_in_report)
        write_report(folder / REPORT_FILE, results, samples)
    except DataError as error:
        raise DataError(f"{error}; {done}") from None
    # What matplotlib and jinja2 raise about a text that they cannot show.
    except (ValueError, RuntimeError, TemplateError) as error:
        raise DataError(f"the report cannot be drawn ({shortened(str(error), 160)}); {done}") from error


def _has_failures(manifest: dict[str, Any]) -> bool:
    """Whether a resume may do better. A judge's unreadable answer was paid for and is not asked for again."""
    counts = manifest["status_counts"]
    return any(Status.API_FAIL in statuses for step in counts.values() for statuses in step.values())


def _protocol(recipe: EvaluateRecipe, inputs: Mapping[str, Ref], items: Sequence[BenchItem]) -> Protocol:
    weights = {name: entry.revision for name, entry in inputs.items() if name != BENCH}
    return Protocol(
        bench=recipe.bench,
        bench_fingerprint=inputs[BENCH].revision,
        items=len(items),
        prompts=len({item.prompt_id for item in items}),
        judge=recipe.judge.model,
        judge_sees=JUDGE_SEES,
        judge_runs=1,
        judge_sampling=recipe.judging.model_dump(),
        generation_sampling=recipe.generation.model_dump(),
        seed=recipe.seed,
        interval=INTERVAL,
        coverage_threshold=recipe.coverage_threshold,
        models={model.name: model.model for model in recipe.models},
        weights=weights,
    )
