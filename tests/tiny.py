"""A tiny world for tests of training and serving: texts, a tokenizer, a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from janus_ray.chat import use_template
from janus_ray.miniature.kit import train_tokenizer
from janus_ray.model_folder import write_template_record
from janus_ray.store.shards import Index, finish_shards, id_type, write_shard
from janus_ray.store.tables import write_parquet

ANSWERS = ["Castle early.", "Knead it for long, then let it rest.", "Sleep.", "Read every line aloud, twice a day."]


def texts(count: int) -> list[dict[str, str]]:
    return [
        {
            "system": f"You write for person {index % 7}." if index % 3 else "",
            "prompt": f"How do I start with number {index}?",
            "output": ANSWERS[index % len(ANSWERS)] * (1 + index % 3),
        }
        for index in range(count)
    ]


def write_collection(folder: Path, count: int) -> Path:
    write_parquet(folder / "part-0.parquet", pa.Table.from_pylist(texts(count)))
    return folder


def documents_in(
    folder: Path, documents: list[tuple[list[int], list[int]]], bins: list[list[int]] | None = None
) -> Path:
    """A run's folder with documents (token ids, loss mask), one a bin or as told, and a plan of one step over them."""
    from janus_ray.train.plan import SINGLE, Plan, Ragged, write_plan

    ids, masks = ([np.array(part[side]) for part in documents] for side in (0, 1))
    shards = folder / "documents"
    entry = write_shard(
        shards, 0, np.concatenate(ids).astype(id_type(400)), np.concatenate(masks).astype(bool), len(documents)
    )
    index = Index(np.array([len(each) for each in ids]), np.array([sum(each) for each in masks]), np.arange(len(ids)))
    finish_shards(shards, [entry], id_type(400), index)
    ragged = Ragged.of([[number] for number in range(len(documents))])
    plan = Plan(SINGLE, np.arange(len(documents))[:, None], ragged, Ragged.of([list(range(len(ragged)))]))
    write_plan(plan, folder / "plan.npz")
    return folder


def write_model(
    folder: Path, layers: int = 2, hidden_size: int = 32, kind: str = "mistral", special: dict[str, Any] | None = None
) -> Path:
    """A folder with a random model, by default a small Mistral; `special` goes into its configuration."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = train_tokenizer(iter([text for row in texts(40) for text in row.values()]), 400)
    sha256 = use_template(tokenizer, "janus").probe_sha256()
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "sliding_window": None,
            "initializer_range": 0.2,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **(special or {}),
        }
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_template_record(folder, sha256)
    return folder
