"""The report: one static HTML file that needs nothing else, from results and samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from upath import UPath

from janus_ray.eval.plots import ForestRow, forest_plot
from janus_ray.eval.results import Results, Scale
from janus_ray.eval.samples import Sample
from janus_ray.records import shortened
from janus_ray.stats import two_decimals
from janus_ray.store.files import write_text

_OTHER_MODEL = "#8a8f98"


def write_report(path: UPath, results: Results, samples: Sequence[Sample]) -> None:
    """Writes the report.

    Args:
        path: the HTML file.
        results: the numbers.
        samples: prompts to show in full.
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
    scale = results.scale
    html = environment.get_template("report.html.j2").render(
        results=results,
        by_split=forest_plot(_split_rows(results), scale, "mean scores by split and condition"),
        by_dimension=forest_plot(_dimension_rows(results), scale, "mean scores by dimension and condition"),
        samples=samples,
        shade=lambda value: _shade(value, scale),
    )
    write_text(path, html)


def _words(name: object) -> str:
    """A name of the bench or of ours as a page shows it: on one line, not without end."""
    return shortened(str(name).replace("_", " "), 80)


def _split_rows(results: Results) -> list[ForestRow]:
    """For each split the main model's conditions, then the other models under the first of them."""
    first = results.conditions[0].name
    rows = []
    for split in results.headline.per_split:
        rows.append(ForestRow(_words(split)))
        rows += [
            ForestRow(condition.label, scores.per_split[split].overall, condition.colour)
            for condition, scores in results.measured(results.main)
        ]
        rows += [
            ForestRow(name, model.conditions[first].per_split[split].overall, _OTHER_MODEL)
            for name, model in results.models.items()
            if name != results.main_model and first in model.conditions
        ]
    return rows


def _dimension_rows(results: Results) -> list[ForestRow]:
    rows = []
    for dimension in results.headline.per_dimension:
        rows.append(ForestRow(_words(dimension)))
        rows += [
            ForestRow(condition.label, scores.per_dimension[dimension], condition.colour)
            for condition, scores in results.measured(results.main)
        ]
    return rows


def _shade(value: float | None, scale: Scale) -> str:
    """Background of a matrix cell: the bluer, the better."""
    strength = 0 if value is None else round(100 * scale.share(value))
    return f"background: color-mix(in srgb, #0072B2 {strength}%, transparent)" + (
        "; color: white" if strength > 55 else ""
    )
