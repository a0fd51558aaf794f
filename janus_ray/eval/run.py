"""The driver of an evaluation: three steps with files between them, and a summary for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from upath import UPath

from janus_ray.cluster import ray_cluster
from janus_ray.config import IfExists
from janus_ray.errors import DataError
from janus_ray.eval.aggregate import CONDITIONS, aggregate
from janus_ray.eval.bench import load_bench
from janus_ray.eval.generate import generate
from janus_ray.eval.grade import grade
from janus_ray.eval.items import BenchItem
from janus_ray.eval.recipe import EvaluateRecipe
from janus_ray.eval.report import write_report
from janus_ray.llm.check import check_endpoint
from janus_ray.llm.endpoint import Endpoint, ReachedEndpoint
from janus_ray.records import shortened
from janus_ray.stats import INTERVAL, two_decimals
from janus_ray.store.files import read_json, what_is_at, write_json
from janus_ray.store.folder import UNKNOWN, Ref, RunFolder, read_manifest

RESULTS_FILE, REPORT_FILE = "results.json", "index.html"
_LONGEST_NAME = 40


def evaluate(recipe: EvaluateRecipe, if_exists: IfExists) -> dict[str, Any]:
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
    folder.check_inputs(inputs, whole=True)
    is_whole = all(what_is_at(folder.path / name) == "file" for name in (RESULTS_FILE, REPORT_FILE))
    told = UNKNOWN not in {ref.revision for ref in inputs.values()}
    if folder.finished and is_whole and told and not _has_failures(read_manifest(folder.path)):
        print(f"{folder.path}: already finished; 0 requests sent")
        results = read_json(folder.path / RESULTS_FILE)
        print_summary(results)
        print(f"report: {folder.path / REPORT_FILE}")
        return results
    prompts = len({item.prompt_id for item in items})
    print(f"evaluate: {len(items)} items on {prompts} prompts, judged by {judge.model}", flush=True)
    with ray_cluster(recipe.ray, recipe.client_actors, f"evaluate with {recipe.client_actors} client actors"):
        folder.begin(inputs)
        generations = generate(recipe, policies, items, folder.path)
        judgments = grade(recipe, judge, items, generations, folder.path)
    names = [model.name for model in recipe.models]
    results = aggregate(judgments, generations, names, recipe.main_model, recipe.coverage_threshold)
    results["protocol"] = _protocol(recipe, inputs, items)
    results["usage"] = {name: sum(row[name] for row in generations) for name in ("prompt_tokens", "completion_tokens")}
    write_json(folder.path / RESULTS_FILE, results)
    print_summary(results)
    _draw_report(recipe, results, items, generations, judgments, folder.path)
    folder.finish(
        counts={"items": len(items), "generations": len(generations), "judgments": len(judgments)},
        status_counts=results["status_counts"],
    )
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
    return {"bench": Ref.of(recipe.bench)} | {
        name: Ref(f"{endpoint.address} {endpoint.model}", endpoint.weights_id or UNKNOWN)
        for name, endpoint in endpoints.items()
    }


def _draw_report(
    recipe: EvaluateRecipe,
    results: dict[str, Any],
    items: Sequence[BenchItem],
    generations: Sequence[dict[str, Any]],
    judgments: Sequence[dict[str, Any]],
    folder: UPath,
) -> None:
    """Draws and writes the report.

    Raises:
        DataError: it cannot be drawn or written; the numbers are safe by then.
    """
    done = f"the numbers are in {folder / RESULTS_FILE}, and --if-exists resume tries again without a request"
    try:
        write_report(folder / REPORT_FILE, results, items, generations, judgments, recipe.samples_in_report)
    except DataError as error:
        raise DataError(f"{error}; {done}") from None
    # What matplotlib and jinja2 raise about a text that they cannot show.
    except (ValueError, RuntimeError, TemplateError) as error:
        raise DataError(f"the report cannot be drawn ({shortened(str(error), 160)}); {done}") from error


def _has_failures(manifest: dict[str, Any]) -> bool:
    """Whether a resume may do better. A judge's unreadable answer was paid for and is not asked for again."""
    counts = manifest["status_counts"]
    return any("api_fail" in statuses for step in counts.values() for statuses in step.values())


def _protocol(recipe: EvaluateRecipe, inputs: Mapping[str, Ref], items: Sequence[BenchItem]) -> dict[str, Any]:
    """What a reader must know to repeat or to doubt the numbers."""
    weights = {name: entry.revision for name, entry in inputs.items() if name != "bench"}
    return {
        "bench": recipe.bench,
        "bench_fingerprint": inputs["bench"].revision,
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
        "weights": weights,
    }


def print_summary(results: dict[str, Any]) -> None:
    """The numbers as a table for the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def name_cell(name: object) -> Text:
        # Names come from the bench and the recipe: never markup, and one line each.
        return Text(shortened(str(name).replace("unseen_", "unseen "), _LONGEST_NAME))

    splits = list(results["models"][results["main_model"]]["own_system"]["per_split"])
    table = Table(title="mean score, 1 to 5 [95 % interval]", title_justify="left", box=None, pad_edge=False)
    for name in ("model", "condition", "all", *splits):
        table.add_column(name_cell(name))
    for model, summary in results["models"].items():
        for condition in CONDITIONS:
            if condition in summary:
                per_split = [summary[condition]["per_split"][split]["overall"] for split in splits]
                cells = [Text(format_estimate(entry)) for entry in (summary[condition]["overall"], *per_split)]
                table.add_row(name_cell(model), condition, *cells)
        gain = summary["steering_gain"]
        cells = [Text(format_estimate(entry)) for entry in (gain["overall"], *(gain["per_split"][s] for s in splits))]
        table.add_row(name_cell(model), "steering gain", *cells, end_section=True)
    own = results["models"][results["main_model"]]["own_system"]["overall"]
    console = Console(width=max(120, 26 * (len(splits) + 2)), soft_wrap=True, markup=False, emoji=False)
    console.print()
    console.print(table)
    console.print(
        f"n = {own['n']} responses on {own['clusters']} prompts, coverage {100 * own['coverage']:.1f} %",
        highlight=False,
    )


def format_estimate(entry: dict[str, Any]) -> str:
    """`4.52 [4.41, 4.63]`, or why there is no number."""
    if entry["mean"] is None:
        return "none" if entry["n"] == 0 else "withheld"
    mean = two_decimals(entry["mean"])
    if entry["low"] is None:
        return f"{mean} (one prompt)"
    return f"{mean} [{two_decimals(entry['low'])}, {two_decimals(entry['high'])}]"
