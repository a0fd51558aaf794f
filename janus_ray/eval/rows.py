"""Reading back, row by row, what an earlier step of the same evaluation wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from upath import UPath

from janus_ray.errors import DataError
from janus_ray.store.location import location, one_line_errors

Row = dict[str, Any]


def read_back(path: UPath) -> Iterator[Row]:
    """The rows of a file of ours, in order, one at a time.

    Raises:
        DataError: the file is missing, cannot be read, or was changed.
    """
    with one_line_errors(path), location(path).open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                raise DataError(f"{path}, line {number}: is no row of ours any more; run again") from None
            yield row
