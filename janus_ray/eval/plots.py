"""The report's plots, drawn by matplotlib as SVG that takes its colours and its font from the page around it."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

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
# What fits beside the plot, in characters.
_LONGEST_LABEL = 32


@dataclass(frozen=True, slots=True)
class ForestRow:
    """One row of a forest plot; a title without an estimate heads the rows below it."""

    label: str
    estimate: dict[str, Any] | None = None
    colour: str = _INK


def forest_plot(rows: Sequence[ForestRow], description: str) -> Markup:
    """Means with their intervals on the judge's scale from 1 to 5; a withheld mean is said in words.

    Args:
        rows: from top to bottom.
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
        axes.set(xlim=(0.95, 5.05), ylim=(len(rows) - 0.5, -0.5), xticks=range(1, 6))
        axes.set_yticks(range(len(rows)), [shortened(row.label, _LONGEST_LABEL) for row in rows], ha="left")
        axes.tick_params(length=0)
        axes.tick_params(axis="y", pad=172)
        axes.grid(axis="x")
        axes.spines[:].set_visible(False)
        for y, (row, label) in enumerate(zip(rows, axes.get_yticklabels(), strict=True)):
            if row.estimate is None:
                label.set_fontweight("bold")
            else:
                _draw_estimate(axes, y, row.estimate, row.colour)
        return _inline(figure, description)


def _draw_estimate(axes: Any, y: int, estimate: dict[str, Any], colour: str) -> None:
    if estimate["mean"] is None:
        axes.text(1.05, y, estimate.get("withheld", "no score"), va="center")
        return
    bounds = ""
    if estimate["low"] is not None:
        axes.plot([max(1, estimate["low"]), min(5, estimate["high"])], [y, y], color=colour, linewidth=2.2)
        bounds = f"  [{two_decimals(estimate['low'])}, {two_decimals(estimate['high'])}]"
    axes.plot(estimate["mean"], y, "o", color=colour, markersize=6.5, clip_on=False)
    axes.text(5.15, y, f"{two_decimals(estimate['mean'])}{bounds}", va="center", fontsize=9)


def _inline(figure: Any, description: str) -> Markup:
    """The figure as an SVG element for the inside of a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{Markup.escape(description)}"', 1)
    for stand_in, colour in _PAGE_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return Markup(svg)
