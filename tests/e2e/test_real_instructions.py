"""Collection on real instructions: MT-Bench and Self-Instruct's user-oriented set. Skipped where they are absent."""

from __future__ import annotations

from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

from janus_ray.records import COLLECTION, PUBLISHED
from janus_ray.store.folder import read_manifest

INSTRUCTIONS = Path(__file__).parents[3] / "shared" / "data" / "instructions"
SOURCES = (
    f'sources=[{{path="{INSTRUCTIONS}/mt_bench.jsonl", prompt_column="turns.0", source_column="category"}}, '
    f'{{path="{INSTRUCTIONS}/self_instruct_user_oriented.jsonl", input_column="instances.0.input"}}]'
)


@pytest.mark.skipif(not INSTRUCTIONS.is_dir(), reason="the real instructions are not on this machine")
def test_real_instructions_become_a_collection_once(run_job_process, tmp_path):
    arguments = ["jobs/recipes/miniature_collect.toml", "--set", f"output_dir={tmp_path}/out", "--set", SOURCES]
    first = run_job_process("collect", *arguments)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    files = sorted(map(str, (tmp_path / "out").glob("*.parquet")))
    table = pq.read_table(files)
    assert table.schema.equals(COLLECTION)
    assert table.schema.names[: len(PUBLISHED)] == PUBLISHED.names
    assert len(table) == 996
    rows = table.to_pylist()
    assert {row["status"] for row in rows} == {"ok"}
    assert len({row["prompt_id"] for row in rows}) == 332
    assert all(row["output"] and row["system"] and len(row["preference_set"]) == 4 for row in rows)
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert (loaded.num_rows, loaded.column_names) == (996, COLLECTION.names)
    again = run_job_process("collect", *arguments, "--if-exists", "resume")
    assert "0 requests sent" in again.stdout
    assert read_manifest(tmp_path / "out")["counts"]["requests_sent"] == 332 * 7
