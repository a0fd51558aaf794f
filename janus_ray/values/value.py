"""One value of one person, as every stage holds it."""

from __future__ import annotations

from collections.abc import Sequence

from janus_ray.config import Recipe
from janus_ray.records import DIMENSIONS


class Value(Recipe):
    """One value of one person: where it stands in the hierarchy, and one sentence that states it.

    The fields are those of the published `preference_set`. Readers narrow them to what they take: what a teacher may
    answer (data/annotate.py), what a request or a recipe may hold (serve/recipe.py).
    """

    dimension: str
    """One of the paper's four dimensions (section 3.1), or another name."""
    subdimension: str = ""
    """Where the value stands within the dimension; orders values of one dimension and is not shown to the model."""
    preference: str = ""
    """The value's short name; orders values of one subdimension and is not shown to the model."""
    description: str
    """The sentence about the value that the model reads."""


def as_rows(values: Sequence[Value]) -> list[dict[str, str]]:
    """The values as plain dictionaries, the form that pyarrow and JSON take."""
    return [value.model_dump() for value in values]


def in_dimension_order(values: Sequence[Value]) -> list[Value]:
    """The values in the order of `DIMENSIONS`; unknown dimensions follow by name, ties by text.

    Every text written from a set of values goes through this order, so that equal sets give equal bytes.
    """
    rank = {dimension: index for index, dimension in enumerate(DIMENSIONS)}
    return sorted(
        values,
        key=lambda v: (rank.get(v.dimension, len(rank)), v.dimension, v.subdimension, v.preference, v.description),
    )
