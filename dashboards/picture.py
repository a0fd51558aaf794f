"""Draws the overview's panels as a PNG, from a Prometheus's real answers: where there is no Grafana to look at.

python dashboards/picture.py http://127.0.0.1:9090 overview.png [MINUTES]
"""

from __future__ import annotations

import json
import math
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, MaxNLocator

_BOARD = Path(__file__).parent / "overview.json"
_POINTS = 240
_UNIT_PX, _COLUMNS, _DPI = 32, 24, 100
_BACK, _PANEL, _INK, _FAINT = "#f4f5f5", "#ffffff", "#24292e", "#8e9196"
_COLOURS = ["#3274d9", "#e0752d", "#37872d", "#8f3bb8", "#c4162a", "#3d9e9e", "#b8860b", "#5b6770"]
_SMALL = {"fontsize": 6.5, "color": _FAINT}
_SCALES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
_SUFFIXES = {"reqps": " req/s", "ms": " ms", "s": " s", "percent": " %"}
_MOST_LEGENDS, _LEGEND_CHARACTERS, _NAME_CHARACTERS = 4, 34, 26


def answers(address: str, query: str, legend: str, minutes: float) -> list[tuple[str, list[float], list[float]]]:
    """The series of a query over the last minutes: name, seconds before now, values."""
    now = time.time()
    step = max(1.0, 60 * minutes / _POINTS)
    parameters = {"query": query.replace("$__rate_interval", f"{max(15, int(4 * step))}s")}
    times = {"start": f"{now - 60 * minutes:.0f}", "end": f"{now:.0f}", "step": f"{step:.0f}"}
    url = f"{address.rstrip('/')}/api/v1/query_range?{urllib.parse.urlencode({**parameters, **times})}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        found = json.load(answer)["data"]["result"]
    series = []
    for one in found:
        name = legend
        for label, value in one["metric"].items():
            name = name.replace(f"{{{{{label}}}}}", value)
        points = [(float(when) - now, float(value)) for when, value in one["values"]]
        points = [(when, value) for when, value in points if math.isfinite(value)]
        if points:
            series.append((name.replace("__auto", ""), [when for when, _ in points], [value for _, value in points]))
    return series


def shown(value: float, unit: str) -> str:
    """A value as Grafana would write it."""
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "sci":
        return f"{value:.1e}" if value else "0"
    if unit == "mbytes":
        value, unit = value * 2**20, "bytes"
    if unit == "ms" and abs(value) >= 1000:
        value, unit = value / 1000, "s"
    scale, letter = next(((size, name) for size, name in _SCALES if abs(value) >= size), (1, ""))
    number = f"{value / scale:.3g}"
    return f"{number} {letter}B" if unit == "bytes" else f"{number}{letter}{_SUFFIXES.get(unit, '')}"


def shortened(name: str, characters: int) -> str:
    """A name with its middle left out where it is long: both ends tell it from others."""
    half = characters // 2
    return name if len(name) <= characters else f"{name[:half]}…{name[-half:]}"


def draw_lines(axes: Any, series: list[tuple[str, list[float], list[float]]], unit: str, minutes: float) -> None:
    """One panel of lines, with its legend below."""
    for index, (name, seconds, values) in enumerate(series):
        label = shortened(name, _LEGEND_CHARACTERS) if index < _MOST_LEGENDS else None
        drawn = {"color": _COLOURS[index % len(_COLOURS)], "linewidth": 1.4}
        axes.plot([each / 60 for each in seconds], values, label=label, **drawn)
    if len(series) > _MOST_LEGENDS:
        axes.text(1, 1.02, f"and {len(series) - _MOST_LEGENDS} more", **_SMALL, ha="right", transform=axes.transAxes)
    axes.set_xlim(-minutes, 0)
    every = [value for _, _, values in series for value in values]
    axes.set_ylim(min(0, *every), 1.1 * max(every) if max(every) > 0 else 1)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=all(value.is_integer() for value in every)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, unit)))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} min" if value else "now"))
    axes.grid(color="#e5e7ea", linewidth=0.6)
    style = {"ncols": 2, "fontsize": 6.5, "frameon": False, "handlelength": 1.0, "labelcolor": _INK}
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.12), columnspacing=1.0, borderpad=0, **style)


def draw_number(axes: Any, series: list[tuple[str, list[float], list[float]]], unit: str) -> None:
    """One panel of a few large numbers."""
    axes.axis("off")
    for index, (name, _, values) in enumerate(series[:3]):
        alone = len(series) == 1
        height = 0.6 if alone else 0.85 - index * 0.85 / min(len(series), 3)
        size = 20 if alone else 11
        text = shown(values[-1], unit)
        axes.text(0.03, height, text, fontsize=size, color=_COLOURS[2], va="center", transform=axes.transAxes)
        place = {"x": 0.03 if alone else 0.97, "y": 0.05 if alone else height, "ha": "left" if alone else "right"}
        axes.text(s=shortened(name, _NAME_CHARACTERS), va="center", transform=axes.transAxes, **_SMALL, **place)


def draw(address: str, minutes: float) -> Any:
    """The whole board as a figure; panels lie where Grafana would put them."""
    board = json.loads(_BOARD.read_text())
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    figure = plt.figure(figsize=(_COLUMNS * 55 / _DPI, height * _UNIT_PX / _DPI), dpi=_DPI, facecolor=_BACK)
    plt.rcParams["font.size"] = 7
    for panel in board["panels"]:
        place = panel["gridPos"]
        left, top = place["x"] / _COLUMNS, 1 - place["y"] / height
        wide, tall = place["w"] / _COLUMNS, place["h"] / height
        if panel["type"] == "row":
            figure.text(0.006, top - 0.5 * tall, panel["title"], fontsize=10, weight="bold", color=_INK, va="center")
            continue
        gap = 0.15 / height
        frame = plt.Rectangle((left + 0.003, top - tall + gap), wide - 0.006, tall - gap * 1.5, color=_PANEL, zorder=-1)
        figure.add_artist(frame)
        title = {"fontsize": 8, "weight": "bold", "color": _INK, "va": "top"}
        figure.text(left + 0.008, top - 0.3 / height, panel["title"], **title)
        unit = panel["fieldConfig"]["defaults"]["unit"]
        targets = [(each["expr"], each["legendFormat"]) for each in panel["targets"]]
        series = [one for query, legend in targets for one in answers(address, query, legend, minutes)]
        is_stat = panel["type"] == "stat"
        below = 0.4 if is_stat else 1.8
        inside = (left + (0.008 if is_stat else 0.046), top - tall + below / height)
        axes = figure.add_axes((*inside, wide - (0.016 if is_stat else 0.06), tall - (below + 1.3) / height))
        axes.set_facecolor(_PANEL)
        axes.tick_params(colors=_FAINT, length=0, labelsize=6.5)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if not series:
            axes.axis("off")
            reason = panel["fieldConfig"]["defaults"].get("noValue", "no data")
            axes.text(0.5, 0.5, reason, ha="center", va="center", color=_FAINT, transform=axes.transAxes)
        elif is_stat:
            draw_number(axes, series, unit)
        else:
            draw_lines(axes, series, unit, minutes)
    return figure


def main(arguments: list[str]) -> int:
    """Draws and saves."""
    if len(arguments) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        figure = draw(arguments[0], float(arguments[2]) if len(arguments) == 3 else 5.0)
    except (urllib.error.URLError, ValueError) as error:
        print(f"{arguments[0]}: no Prometheus answers there ({error})", file=sys.stderr)
        return 2
    figure.savefig(arguments[1], dpi=_DPI, pil_kwargs={"optimize": True})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
