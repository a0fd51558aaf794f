from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from janus_ray.records import (
    BENCH,
    COLLECTION,
    DIMENSIONS,
    PUBLISHED,
    BenchItem,
    Preference,
    as_rows,
    canonical_json,
    content_id,
    in_dimension_order,
)

texts = st.text(max_size=8)
preferences = st.lists(st.builds(Preference, st.sampled_from([*DIMENSIONS, "other"]), texts, texts, texts), max_size=6)


def test_the_published_columns_come_first_with_their_names_and_types():
    assert COLLECTION.names[:6] == ["main_source", "original_source", "preference_set", "system", "prompt", "output"]
    assert [COLLECTION.field(name) for name in PUBLISHED.names] == list(PUBLISHED)
    item = COLLECTION.field("preference_set").type.value_type
    assert [(field.name, field.type) for field in item] == [
        (name, pa.string()) for name in ("dimension", "subdimension", "preference", "description")
    ]


def published_bench_row():
    return {
        "source": "mt",
        "preference_set": as_rows([Preference("style", "tone", "formal", "Be formal.")]),
        "system": "S",
        "prompt": "P",
        "reference_answer": "R",
        "rubrics": [{"criteria": "c", "score_descriptions": {str(score): "d" for score in range(1, 6)}}],
    }


def test_a_published_bench_row_loads_without_our_ids():
    item = BenchItem.from_row(published_bench_row())
    assert item.split == "all"
    assert item.prompt_id == content_id("P")
    assert item.preference_set[0].preference == "formal"
    assert item.rubrics[0].score_descriptions["5"] == "d"
    sibling = BenchItem.from_row({**published_bench_row(), "system": "T"})
    assert (sibling.prompt_id, sibling.item_id != item.item_id) == (item.prompt_id, True)
    pa.Table.from_pylist([{**published_bench_row(), "item_id": "1", "prompt_id": "2", "split": "s"}], schema=BENCH)


def test_a_bench_row_without_a_published_column_is_refused():
    row = published_bench_row()
    del row["rubrics"]
    with pytest.raises(KeyError, match="rubrics"):
        BenchItem.from_row(row)


@given(preferences, st.randoms())
def test_the_order_of_values_never_depends_on_how_they_were_given(values, random):
    shuffled = list(values)
    random.shuffle(shuffled)
    assert in_dimension_order(shuffled) == in_dimension_order(values)
    ranks = [DIMENSIONS.index(p.dimension) if p.dimension in DIMENSIONS else 4 for p in in_dimension_order(values)]
    assert ranks == sorted(ranks)


def test_content_ids_keep_their_parts_apart_and_never_change():
    assert content_id("ab", "c") != content_id("a", "bc")
    # The first 16 digits of sha256("hello"), known from elsewhere: ids must survive every release.
    assert content_id("hello") == "2cf24dba5fb0a30e"
    assert canonical_json({"b": 1, "a": "ü"}) == '{"a":"ü","b":1}'
