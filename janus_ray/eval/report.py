"""The report: one static HTML file that needs nothing else, from results and samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from janus_ray.eval.aggregate import CONDITIONS
from janus_ray.eval.bench import siblings
from janus_ray.records import BenchItem
from janus_ray.store import write_text

CONDITION_LABELS = {
    "own_system": "own system message",
    "no_system": "no system message",
    "sibling_system": "another person's system message",
}
# Distinguishable without colour vision, on white and on black (Okabe and Ito).
_COLOURS = {"own_system": "#0072B2", "no_system": "#E69F00", "sibling_system": "#CC79A7", "untrained": "#8a8f98"}

_SCALE_LEFT, _SCALE_RIGHT, _ROW_HEIGHT = 250, 800, 26


def write_report(
    path: Path,
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
    environment.filters["words"] = lambda name: name.replace("_", " ")
    main = results["main_model"]
    html = environment.get_template("report.html.j2").render(
        results=results,
        main=results["models"][main],
        labels=CONDITION_LABELS,
        conditions=CONDITIONS,
        colours=_COLOURS,
        forest=forest_plot(_forest_rows(results)),
        dimensions=forest_plot(_dimension_rows(results)),
        samples=_samples(results, items, generations, judgments, num_samples),
        shade=_shade,
    )
    write_text(path, html)


def forest_plot(groups: Sequence[tuple[str, Sequence[tuple[str, dict[str, Any], str]]]]) -> Markup:
    """Means with intervals on the scale from 1 to 5, as inline SVG.

    Args:
        groups: title, and for each row its label, its estimate and its colour. A withheld mean is said in words.
    """
    parts: list[str] = []
    y = 8
    for title, rows in groups:
        parts.append(f'<text x="0" y="{y + 17}" class="group">{Markup.escape(title)}</text>')
        y += _ROW_HEIGHT
        for label, entry, colour in rows:
            parts.append(_forest_row(y, label, entry, colour))
            y += _ROW_HEIGHT
        y += 8
    grid = "".join(
        f'<line x1="{_x(score)}" y1="8" x2="{_x(score)}" y2="{y}" class="grid"/>'
        f'<text x="{_x(score)}" y="{y + 16}" class="tick">{score}</text>'
        for score in range(1, 6)
    )
    return Markup(
        f'<svg viewBox="0 0 980 {y + 24}" role="img" aria-label="means with 95 % intervals, scale 1 to 5">'
        f"{grid}{''.join(parts)}</svg>"
    )


def _forest_row(y: int, label: str, entry: dict[str, Any], colour: str) -> str:
    middle = y + _ROW_HEIGHT // 2
    row = f'<text x="14" y="{middle + 5}">{Markup.escape(label)}</text>'
    if entry["mean"] is None:
        return row + f'<text x="{_SCALE_LEFT}" y="{middle + 5}" class="note">{entry.get("withheld", "no score")}</text>'
    low, high = (entry["mean"] if entry[bound] is None else entry[bound] for bound in ("low", "high"))
    bounds = "" if entry["low"] is None else f" [{low:.2f}, {high:.2f}]"
    return (
        row + f'<line x1="{_x(low):.1f}" x2="{_x(high):.1f}" y1="{middle}" y2="{middle}" stroke="{colour}" '
        f'stroke-width="3"/><circle cx="{_x(entry["mean"]):.1f}" cy="{middle}" r="6" fill="{colour}"/>'
        f'<text x="{_SCALE_RIGHT + 22}" y="{middle + 5}" class="value">{entry["mean"]:.2f}{bounds}</text>'
    )


def _x(score: float) -> float:
    clipped = min(5.0, max(1.0, score))
    return _SCALE_LEFT + (clipped - 1) / 4 * (_SCALE_RIGHT - _SCALE_LEFT)


def _forest_rows(results: dict[str, Any]) -> list[tuple[str, list[tuple[str, dict[str, Any], str]]]]:
    """One group per split: the main model's conditions, then the other models with their own system message."""
    main = results["main_model"]
    groups = []
    for split in results["models"][main]["own_system"]["per_split"]:
        rows = [
            (
                CONDITION_LABELS[condition],
                results["models"][main][condition]["per_split"][split]["overall"],
                _COLOURS[condition],
            )
            for condition in CONDITIONS
            if condition in results["models"][main]
        ]
        rows += [
            (name, summary["own_system"]["per_split"][split]["overall"], _COLOURS["untrained"])
            for name, summary in results["models"].items()
            if name != main and "own_system" in summary
        ]
        groups.append((split.replace("_", " "), rows))
    return groups


def _dimension_rows(results: dict[str, Any]) -> list[tuple[str, list[tuple[str, dict[str, Any], str]]]]:
    main = results["models"][results["main_model"]]
    return [
        (
            dimension.replace("_", " "),
            [
                (CONDITION_LABELS[condition], main[condition]["per_dimension"][dimension], _COLOURS[condition])
                for condition in CONDITIONS
                if condition in main
            ],
        )
        for dimension in main["own_system"]["per_dimension"]
    ]


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
