"""The report: one static HTML file that needs nothing else, from results and samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from upath import UPath

from janus_ray.eval.aggregate import CONDITIONS
from janus_ray.eval.bench import siblings
from janus_ray.eval.items import BenchItem
from janus_ray.eval.plots import ForestRow, forest_plot
from janus_ray.records import shortened
from janus_ray.stats import two_decimals
from janus_ray.store.files import write_text

CONDITION_LABELS = {
    "own_system": "own system message",
    "no_system": "no system message",
    "sibling_system": "another person's system message",
}
# Distinguishable without colour vision, on white and on black (Okabe and Ito).
_COLOURS = {"own_system": "#0072B2", "no_system": "#E69F00", "sibling_system": "#CC79A7", "other_model": "#8a8f98"}


def write_report(
    path: UPath,
    results: dict[str, Any],
    items: Sequence[BenchItem],
    generations: Sequence[dict[str, Any]],
    judgments: Sequence[dict[str, Any]],
    num_samples: int,
) -> None:
    """Writes the report.

    Args:
        path: the HTML file.
        results: what aggregate.aggregate returned, with the protocol.
        items: the bench.
        generations: rows of step 1.
        judgments: rows of step 2.
        num_samples: prompts to show in full, spread over the splits.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["two_decimals"] = two_decimals
    environment.filters["words"] = _words
    main = results["main_model"]
    html = environment.get_template("report.html.j2").render(
        results=results,
        main=results["models"][main],
        labels=CONDITION_LABELS,
        conditions=CONDITIONS,
        colours=_COLOURS,
        by_split=forest_plot(_split_rows(results), "mean scores by split and condition"),
        by_dimension=forest_plot(_dimension_rows(results), "mean scores by dimension and condition"),
        samples=_samples(results, items, generations, judgments, num_samples),
        shade=_shade,
    )
    write_text(path, html)


def _words(name: object) -> str:
    """A name of the bench or of ours as a page shows it: on one line, not without end."""
    return shortened(str(name).replace("_", " "), 80)


def _split_rows(results: dict[str, Any]) -> list[ForestRow]:
    """For each split the main model's conditions, then the other models with the person's own system message."""
    main_name = results["main_model"]
    main = results["models"][main_name]
    rows = []
    for split in main["own_system"]["per_split"]:
        rows.append(ForestRow(_words(split)))
        rows += [
            ForestRow(CONDITION_LABELS[condition], main[condition]["per_split"][split]["overall"], _COLOURS[condition])
            for condition in CONDITIONS
            if condition in main
        ]
        rows += [
            ForestRow(name, summary["own_system"]["per_split"][split]["overall"], _COLOURS["other_model"])
            for name, summary in results["models"].items()
            if name != main_name and "own_system" in summary
        ]
    return rows


def _dimension_rows(results: dict[str, Any]) -> list[ForestRow]:
    main = results["models"][results["main_model"]]
    rows = []
    for dimension in main["own_system"]["per_dimension"]:
        rows.append(ForestRow(_words(dimension)))
        rows += [
            ForestRow(CONDITION_LABELS[condition], main[condition]["per_dimension"][dimension], _COLOURS[condition])
            for condition in CONDITIONS
            if condition in main
        ]
    return rows


def _samples(
    results: dict[str, Any],
    items: Sequence[BenchItem],
    generations: Sequence[dict[str, Any]],
    judgments: Sequence[dict[str, Any]],
    num_samples: int,
) -> list[dict[str, Any]]:
    """Prompts with every person's values and response side by side, taken in turn from the splits."""
    main = results["main_model"]
    responses = {row["written_for"]: row for row in generations if row["model"] == main and row["written_for"]}
    scores: dict[tuple[str | None, str], list[dict[str, Any]]] = {}
    for row in judgments:
        if row["model"] == main:
            scores.setdefault((row["written_for"], row["judged_for"]), []).append(row)
    by_split: dict[str, list[list[BenchItem]]] = {}
    for group in siblings(items).values():
        by_split.setdefault(group[0].split, []).append(group)
    rounds = [group for turn in range(num_samples) for groups in by_split.values() for group in groups[turn : turn + 1]]
    return [
        {
            "prompt": group[0].prompt,
            "split": group[0].split,
            "people": [
                {
                    "item": item,
                    "response": responses.get(item.item_id),
                    "own": scores.get((item.item_id, item.item_id), []),
                    "others": [
                        _mean(scores.get((item.item_id, other.item_id), [])) for other in group if other is not item
                    ],
                    "mean": _mean(scores.get((item.item_id, item.item_id), [])),
                }
                for item in group
            ],
        }
        for group in rounds[:num_samples]
    ]


def _mean(rows: Sequence[dict[str, Any]]) -> float | None:
    scored = [row["score"] for row in rows if row["score"] is not None]
    return sum(scored) / len(scored) if scored else None


def _shade(value: float | None) -> str:
    """Background of a matrix cell: the bluer, the better."""
    strength = 0 if value is None else round(100 * (value - 1) / 4)
    return f"background: color-mix(in srgb, #0072B2 {strength}%, transparent)" + (
        "; color: white" if strength > 55 else ""
    )
