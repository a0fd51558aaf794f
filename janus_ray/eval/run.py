"""The driver of an evaluation: three steps with files between them, and a summary for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from janus_ray.cluster import ray_cluster
from janus_ray.config import IfExists
from janus_ray.eval.aggregate import CONDITIONS, aggregate
from janus_ray.eval.bench import load_bench
from janus_ray.eval.generate import generate
from janus_ray.eval.grade import grade
from janus_ray.eval.recipe import EvaluateRecipe
from janus_ray.eval.report import write_report
from janus_ray.llm.check import check_endpoint
from janus_ray.llm.endpoint import Endpoint
from janus_ray.records import BenchItem
from janus_ray.stats import INTERVAL, two_decimals
from janus_ray.store.files import read_json, write_json
from janus_ray.store.fingerprint import fingerprint
from janus_ray.store.folder import OutputFolder, read_manifest

RESULTS_FILE, REPORT_FILE = "results.json", "index.html"


def evaluate(recipe: EvaluateRecipe, judge: Endpoint, if_exists: IfExists) -> dict[str, Any]:
    """Runs the evaluation, writes results.json and index.html, and returns the results.

    Args:
        recipe: what to do.
        judge: the recipe's judge, with the address where it answers now.
        if_exists: "resume" sends only what no earlier run finished.

    Raises:
        ConfigError, DataError: the bench, an endpoint, the folder or the cluster is not as it must be.
    """
    items = load_bench(recipe.bench, recipe.max_prompts_per_split)
    folder = OutputFolder(recipe.output_dir, recipe, if_exists)
    inputs = {"bench": recipe.bench}
    if folder.finished_with(inputs) and not _has_failures(read_manifest(folder.path)):
        print(f"{folder.path}: already finished; 0 requests sent")
        results = read_json(folder.path / RESULTS_FILE)
        print_summary(results, folder.path)
        return results
    for model in recipe.models:
        check_endpoint(recipe.policy.model_copy(update={"model": model.model}), f"policy {model.name}")
    check_endpoint(judge, "judge")
    prompts = len({item.prompt_id for item in items})
    print(f"evaluate: {len(items)} items on {prompts} prompts, judged by {judge.model}", flush=True)
    with ray_cluster(recipe.ray, recipe.client_actors, f"evaluate with {recipe.client_actors} client actors"):
        folder.begin()
        generations = generate(recipe, items, folder.path)
        judgments = grade(recipe, judge, items, generations, folder.path)
    names = [model.name for model in recipe.models]
    results = aggregate(judgments, generations, names, recipe.main_model, recipe.coverage_threshold)
    results["protocol"] = _protocol(recipe, items)
    results["usage"] = {name: sum(row[name] for row in generations) for name in ("prompt_tokens", "completion_tokens")}
    write_json(folder.path / RESULTS_FILE, results)
    write_report(folder.path / REPORT_FILE, results, items, generations, judgments, recipe.samples_in_report)
    folder.finish(
        inputs=inputs,
        counts={"items": len(items), "generations": len(generations), "judgments": len(judgments)},
        status_counts=results["status_counts"],
    )
    print_summary(results, folder.path)
    return results


def _has_failures(manifest: dict[str, Any]) -> bool:
    """Whether a resume may do better. A judge's unreadable answer was paid for and is not asked for again."""
    counts = manifest["status_counts"]
    return any("api_fail" in statuses for step in counts.values() for statuses in step.values())


def _protocol(recipe: EvaluateRecipe, items: Sequence[BenchItem]) -> dict[str, Any]:
    """What a reader must know to repeat or to doubt the numbers."""
    return {
        "bench": recipe.bench,
        "bench_sha256": fingerprint(recipe.bench),
        "items": len(items),
        "prompts": len({item.prompt_id for item in items}),
        "judge": recipe.judge.model,
        "judge_sees": "request, response, reference answer, one rubric; not the system message",
        "judge_runs": 1,
        "judge_sampling": recipe.judging.model_dump(),
        "generation_sampling": recipe.generation.model_dump(),
        "seed": recipe.seed,
        "interval": INTERVAL,
        "coverage_threshold": recipe.coverage_threshold,
        "models": {model.name: model.model for model in recipe.models},
    }


def print_summary(results: dict[str, Any], folder: Path) -> None:
    """The numbers as a table for the terminal."""
    from rich.console import Console
    from rich.table import Table

    splits = list(results["models"][results["main_model"]]["own_system"]["per_split"])
    table = Table(title="mean score, 1 to 5 [95 % interval]", title_justify="left", box=None, pad_edge=False)
    for name in ("model", "condition", "all", *splits):
        table.add_column(name.replace("unseen_", "unseen "))
    for model, summary in results["models"].items():
        for condition in CONDITIONS:
            if condition in summary:
                per_split = [summary[condition]["per_split"][split]["overall"] for split in splits]
                cells = [format_estimate(entry) for entry in (summary[condition]["overall"], *per_split)]
                table.add_row(model, condition, *cells)
        gain = summary["steering_gain"]
        cells = [format_estimate(entry) for entry in (gain["overall"], *(gain["per_split"][s] for s in splits))]
        table.add_row(model, "steering gain", *cells, end_section=True)
    own = results["models"][results["main_model"]]["own_system"]["overall"]
    console = Console(width=max(120, 26 * (len(splits) + 2)), soft_wrap=True)
    console.print()
    console.print(table)
    console.print(
        f"n = {own['n']} responses on {own['clusters']} prompts, coverage {100 * own['coverage']:.1f} %",
        highlight=False,
    )
    console.print(f"report: {folder / REPORT_FILE}", highlight=False)


def format_estimate(entry: dict[str, Any]) -> str:
    """`4.52 [4.41, 4.63]`, or why there is no number."""
    if entry["mean"] is None:
        return "withheld" if "withheld" in entry else "none"
    mean = two_decimals(entry["mean"])
    return (
        f"{mean} (one prompt)"
        if entry["low"] is None
        else f"{mean} [{two_decimals(entry['low'])}, {two_decimals(entry['high'])}]"
    )
