"""The numbers as a table for the terminal."""

from __future__ import annotations

from janus_ray.eval.results import Measure, Results
from janus_ray.records import shortened
from janus_ray.stats import two_decimals

_LONGEST_NAME = 40


def print_summary(results: Results) -> None:
    """Prints the mean scores and the steering gain of every model, over all prompts and by split."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def name_cell(name: str) -> Text:
        # Names come from the bench and the recipe: never markup, and one line each.
        return Text(shortened(name.replace("unseen_", "unseen "), _LONGEST_NAME))

    def cells(overall: Measure, per_split: dict[str, Measure]) -> list[Text]:
        return [Text(format_measure(each)) for each in (overall, *(per_split[split] for split in splits))]

    splits, scale = list(results.headline.per_split), results.scale
    title = f"mean score, {scale.lowest} to {scale.highest} [95 % interval]"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("model", "condition", "all", *splits):
        table.add_column(name_cell(name))
    for name, model in results.models.items():
        for condition, scores in results.measured(model):
            by_split = {split: each.overall for split, each in scores.per_split.items()}
            table.add_row(name_cell(name), condition.name, *cells(scores.overall, by_split))
        gain = model.steering_gain
        table.add_row(name_cell(name), "steering gain", *cells(gain.overall, gain.per_split), end_section=True)
    console = Console(width=max(120, 26 * (len(splits) + 2)), soft_wrap=True, markup=False, emoji=False)
    console.print()
    console.print(table)
    first = results.headline.overall
    console.print(
        f"n = {first.n} responses on {first.clusters} prompts, coverage {100 * first.coverage:.1f} %", highlight=False
    )


def format_measure(measure: Measure) -> str:
    """`4.52 [4.41, 4.63]`, or why there is no number."""
    if measure.mean is None:
        return "none" if measure.n == 0 else "withheld"
    mean = two_decimals(measure.mean)
    if measure.low is None or measure.high is None:
        return f"{mean} (one prompt)"
    return f"{mean} [{two_decimals(measure.low)}, {two_decimals(measure.high)}]"
