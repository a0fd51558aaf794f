"""Resuming a collection whose rows are all there: a set difference, without a process for them.

What a run leaves that was killed between its last row and its manifest.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from parts._answered import begin, endpoint, recipe_at, rows_of, write_instructions

from janus_ray.data.client import ANNOTATED
from janus_ray.data.row_files import RowFiles, made_with
from janus_ray.data.sources import read_instructions

UNIT = "instructions, 3 rows each"
SIZES = (10_000, 40_000)
TARGET = 1_000_000


def make(size: int, folder: Path) -> None:
    """Writes the instructions and all rows."""
    write_instructions(size, folder)
    with endpoint(folder) as url:
        recipe = recipe_at(folder, url)
    begin(recipe)
    instructions, _ = read_instructions(recipe.sources)
    files = RowFiles(recipe.output_dir, made_with(recipe, recipe.teacher.reached(None)), recipe.rows_per_file)
    made = rows_of(recipe, iter(instructions), None)
    while some := list(islice(made, 100)):
        files.add(pa.Table.from_pylist([row for rows in some for row in rows], schema=ANNOTATED))
    files.close()


def measure(size: int, folder: Path) -> dict[str, Any]:
    """Resumes."""
    from janus_ray.data.collect import collect

    with endpoint(folder) as url:
        counts = collect(recipe_at(folder, url), "resume")["counts"]
    assert counts["rows_ok"] == 3 * size, counts
    assert counts["requests_sent"] == 0, counts
    return {"rows": counts["rows_ok"]}
