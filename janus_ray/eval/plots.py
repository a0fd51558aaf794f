"""The report's plots, drawn by matplotlib as SVG that takes its colours and its font from the page around it."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from janus_ray.eval.results import Measure, Scale
from janus_ray.records import shortened
from janus_ray.stats import two_decimals

# Colours that stand for the page's own, which differ between light and dark.
_INK, _LINE = "#010101", "#020202"
_PAGE_COLOURS = {_INK: "currentColor", _LINE: "var(--line)"}
# Any, because matplotlib lists every key it knows in the type.
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "janus_ray",
    # A name may hold any number of dollar signs.
    "text.parse_math": False,
    "font.size": 9.5,
    "text.color": _INK,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _LINE,
}
_INCHES_PER_ROW = 0.25
# Beside the axis, as a share of the scale.
_MARGIN = 0.0125
# What fits beside the plot, in characters.
_LONGEST_LABEL = 32


@dataclass(frozen=True, slots=True)
class ForestRow:
    """One row of a forest plot; a title without an estimate heads the rows below it."""

    label: str
    estimate: Measure | None = None
    colour: str = _INK


def forest_plot(rows: Sequence[ForestRow], scale: Scale, description: str) -> Markup:
    """Means with their intervals on the judge's scale; a withheld mean is said in words.

    Args:
        rows: from top to bottom.
        scale: what the axis spans.
        description: what a screen reader says.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # The reader's browser draws the text, in its own fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(9.6, _INCHES_PER_ROW * (len(rows) + 1.2)))
        axes = figure.add_axes((0.25, 1.1 / (len(rows) + 1.2), 0.57, len(rows) / (len(rows) + 1.2)))
        margin = _MARGIN * (scale.highest - scale.lowest)
        axes.set(xlim=(scale.lowest - margin, scale.highest + margin), ylim=(len(rows) - 0.5, -0.5))
        axes.set_xticks(scale.ticks())
        axes.set_yticks(range(len(rows)), [shortened(row.label, _LONGEST_LABEL) for row in rows], ha="left")
        axes.tick_params(length=0)
        axes.tick_params(axis="y", pad=172)
        axes.grid(axis="x")
        axes.spines[:].set_visible(False)
        for y, (row, label) in enumerate(zip(rows, axes.get_yticklabels(), strict=True)):
            if row.estimate is None:
                label.set_fontweight("bold")
            else:
                _draw_estimate(axes, scale, y, row.estimate, row.colour)
        return _inline(figure, description)


def _draw_estimate(axes: Any, scale: Scale, y: int, estimate: Measure, colour: str) -> None:
    margin = _MARGIN * (scale.highest - scale.lowest)
    if estimate.mean is None:
        axes.text(scale.lowest + margin, y, estimate.withheld or "no score", va="center")
        return
    bounds = ""
    if estimate.low is not None and estimate.high is not None:
        axes.plot([scale.within(estimate.low), scale.within(estimate.high)], [y, y], color=colour, linewidth=2.2)
        bounds = f"  [{two_decimals(estimate.low)}, {two_decimals(estimate.high)}]"
    axes.plot(estimate.mean, y, "o", color=colour, markersize=6.5, clip_on=False)
    axes.text(scale.highest + 3 * margin, y, f"{two_decimals(estimate.mean)}{bounds}", va="center", fontsize=9)


def _inline(figure: Any, description: str) -> Markup:
    """The figure as an SVG element for the inside of a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{Markup.escape(description)}"', 1)
    for stand_in, colour in _PAGE_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return Markup(svg)
