from __future__ import annotations

import pyarrow as pa

from janus_ray.records import COLLECTION, PUBLISHED, canonical_json, content_id


def test_the_published_columns_come_first_with_their_names_and_types():
    assert COLLECTION.names[:6] == ["main_source", "original_source", "preference_set", "system", "prompt", "output"]
    assert [COLLECTION.field(name) for name in PUBLISHED.names] == list(PUBLISHED)
    item = COLLECTION.field("preference_set").type.value_type
    assert [(field.name, field.type) for field in item] == [
        (name, pa.string()) for name in ("dimension", "subdimension", "preference", "description")
    ]


def test_content_ids_keep_their_parts_apart_and_never_change():
    assert content_id("ab", "c") != content_id("a", "bc")
    # The first 16 digits of sha256("hello"), known from elsewhere: ids must survive every release.
    assert content_id("hello") == "2cf24dba5fb0a30e"
    assert canonical_json({"b": 1, "a": "ü"}) == '{"a":"ü","b":1}'
