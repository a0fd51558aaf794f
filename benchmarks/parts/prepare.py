"""Preparing a training: a collection becomes documents in shards, with every mask looked at, and a plan of four epochs.

Rows of the published set's size, about a thousand tokens each, in Parquet; two tokenising processes.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from janus_ray.chat import use_template
from janus_ray.config import RayConfig
from janus_ray.miniature.kit import train_tokenizer
from janus_ray.model_folder import write_template_record
from janus_ray.train.recipe import TrainRecipe

UNIT = "tokens"
# More batches than wait at once, so that what is held is not what grows.
SIZES = (8_000_000, 24_000_000)
TARGET = 200_000_000
_ROWS_AT_ONCE = 2000
_WORDS = 4000
# Of a system message, a prompt and an answer.
_MEAN_WORDS = (60, 60, 440)


def make(size: int, folder: Path) -> None:
    """Writes a tokenizer, and rows until they have so many tokens."""
    source = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(source.choices(letters, k=source.randint(2, 9))) for _ in range(_WORDS)]
    tokenizer = train_tokenizer(iter([_text(source, words, 400) for _ in range(400)]), 4000)
    sha256 = use_template(tokenizer, "janus").probe_sha256()
    tokenizer.save_pretrained(folder / "base")
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": "mistral", "vocab_size": len(tokenizer)}))
    write_template_record(folder / "base", sha256)
    sample = [_row(source, words) for _ in range(50)]
    tokens_per_row = sum(len(tokenizer(text)["input_ids"]) for row in sample for text in row.values()) / len(sample)
    remaining = round(size / tokens_per_row)
    schema = pa.schema([(name, pa.string()) for name in ("system", "prompt", "output")])
    with pq.ParquetWriter(folder / "rows.parquet", schema) as writer:
        while remaining > 0:
            rows = [_row(source, words) for _ in range(min(remaining, _ROWS_AT_ONCE))]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            remaining -= len(rows)


def measure(size: int, folder: Path) -> dict[str, Any]:
    """Reads, tokenises, audits and plans; then plans for the published set's number of rows."""
    from janus_ray.cluster import ray_cluster
    from janus_ray.train.collection import read_collection
    from janus_ray.train.plan import make_plan
    from janus_ray.train.prepare import prepare

    recipe = TrainRecipe(
        collection=str(folder / "rows.parquet"), base_model=str(folder / "base"), output_dir=str(folder / "out")
    )
    with ray_cluster(RayConfig(logical_cpus=4, object_store_gib=0.3), 2, "the benchmark"):
        # Ray's own start is not part of it.
        began = time.monotonic()
        collection = read_collection(recipe.collection)
        read = time.monotonic()
        counts = prepare(recipe, collection, folder / "out")
        ended = time.monotonic()
    lengths = np.random.default_rng(0).lognormal(6.75, 0.5, 197_000).clip(40, 8192).astype(np.int64)
    plan_began = time.monotonic()
    make_plan(lengths, np.arange(len(lengths))[:, None], 8192, 32, 4, None, 0)
    return {
        "wall_s": ended - began,
        "of_it_reading_s": read - began,
        "rows": counts["rows"],
        "tokens": counts["tokens"],
        # Texts, because they grow with nothing.
        "padding_percent": f"{100 * counts['padding_share']:.1f}",
        "plan_of_197k_rows_s": f"{time.monotonic() - plan_began:.1f}",
    }


def _text(source: random.Random, words: list[str], mean: int) -> str:
    count = max(3, round(source.lognormvariate(0, 0.5) * mean))
    return " ".join(source.choices(words, k=count))


def _row(source: random.Random, words: list[str]) -> dict[str, str]:
    system, prompt, output = (_text(source, words, mean) for mean in _MEAN_WORDS)
    return {"system": system, "prompt": prompt, "output": output}
