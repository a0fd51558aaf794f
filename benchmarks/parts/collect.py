"""Collecting when the ledger knows every answer: the whole way of an instruction but for the wire.

Instructions stream from the source through two client processes, which read every answer from the ledger, into files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parts._answered import begin, endpoint, recipe_at, rows_of, write_instructions

from janus_ray.data.sources import read_instructions
from janus_ray.llm.ledger import Ledger

UNIT = "instructions, 3 rows each"
SIZES = (8_000, 24_000)
TARGET = 1_000_000


def make(size: int, folder: Path) -> None:
    """Writes the instructions, and a ledger with the answers to all requests about them."""
    write_instructions(size, folder)
    with endpoint(folder) as url:
        recipe = recipe_at(folder, url)
    instructions, _ = read_instructions(recipe.sources)
    for _ in rows_of(recipe, iter(instructions), Ledger(folder / "out" / "ledger")):
        pass


def measure(size: int, folder: Path) -> dict[str, Any]:
    """Collects."""
    from janus_ray.data.collect import collect

    with endpoint(folder) as url:
        recipe = recipe_at(folder, url)
        # The ledger came before the folder's recipe, as if it had been copied there.
        ledger = (folder / "out").rename(folder / "copied")
        begin(recipe)
        (ledger / "ledger").rename(folder / "out" / "ledger")
        counts = collect(recipe, "resume")["counts"]
    assert counts["rows_ok"] == 3 * size, counts
    assert counts["requests_sent"] == 0, counts
    return {"rows": counts["rows_ok"]}
