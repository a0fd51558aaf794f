from __future__ import annotations

import json

from janus_ray.store.shards import TokenShards
from janus_ray.train.prepare import already_prepared
from tests.tiny import documents_in


def test_documents_are_used_again_only_while_they_are_whole(tmp_path):
    documents = documents_in(tmp_path, [([1, 5, 2], [0, 1, 1]), ([1, 7, 2], [0, 0, 1])]) / "documents"
    counts = {"bins": 2, "documents_xxh3": TokenShards(documents).xxh3}
    (documents / "counts.json").write_text(json.dumps(counts))
    assert already_prepared(tmp_path) == counts
    for file in ("shard-00000.tokens", "index.npz", "shards.json", "counts.json"):
        whole = (documents / file).read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 64]) + whole[middle + 1 :]
        for damaged in (whole[:middle], b"[1]", b"", flipped, None):
            if damaged is None:
                (documents / file).unlink()
            else:
                (documents / file).write_bytes(damaged)
            assert already_prepared(tmp_path) is None, (file, damaged)
        (documents / file).write_bytes(whole)
    assert already_prepared(tmp_path) == counts
