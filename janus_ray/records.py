"""The records that cross a stage border, and their pyarrow schemas.

The first six columns of `COLLECTION` are those of the published Multifaceted Collection
(Lee et al. 2024, arXiv 2405.17977; `kaist-ai/Multifaceted-Collection`), with the published names and types, so that
the published files load as they are; behind them stand our ids, the status and what the row cost. `BENCH` extends
`kaist-ai/Multifaceted-Bench` in the same way.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

# The paper's four dimensions (section 3.1), in the order in which we always write them.
DIMENSIONS = ("style", "background_knowledge", "informativeness", "harmlessness")

Status = Literal["ok", "error"]

PREFERENCE_TYPE = pa.struct(
    [(name, pa.string()) for name in ("dimension", "subdimension", "preference", "description")]
)

# The published columns, exactly.
PUBLISHED = pa.schema(
    [
        ("main_source", pa.string()),
        ("original_source", pa.string()),
        ("preference_set", pa.list_(PREFERENCE_TYPE)),
        ("system", pa.string()),
        ("prompt", pa.string()),
        ("output", pa.string()),
    ]
)

COLLECTION = pa.schema(
    [
        *PUBLISHED,
        ("row_id", pa.string()),
        ("prompt_id", pa.string()),
        ("set_index", pa.int32()),
        ("status", pa.string()),
        ("error_kind", pa.string()),
        ("error_message", pa.string()),
        ("attempts", pa.int32()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
    ]
)

INSTRUCTIONS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("main_source", pa.string()),
        ("original_source", pa.string()),
        ("prompt", pa.string()),
    ]
)

RUBRIC_TYPE = pa.struct(
    [
        ("criteria", pa.string()),
        ("score_descriptions", pa.struct([(str(score), pa.string()) for score in range(1, 6)])),
    ]
)

BENCH = pa.schema(
    [
        ("source", pa.string()),
        ("preference_set", pa.list_(PREFERENCE_TYPE)),
        ("system", pa.string()),
        ("prompt", pa.string()),
        ("reference_answer", pa.string()),
        ("rubrics", pa.list_(RUBRIC_TYPE)),
        ("item_id", pa.string()),
        ("prompt_id", pa.string()),
        ("split", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One user request that preference sets are written for."""

    prompt_id: str
    main_source: str
    original_source: str
    prompt: str


def shortened(text: str, length: int = 60) -> str:
    """The text on one printable line, cut to a length in characters."""
    # Joiners hold emoji and some scripts together.
    kept = (c if c.isprintable() or c in "\u200c\u200d" else " " for c in text[: 4 * length])
    line = " ".join("".join(kept).split())
    return line if len(line) <= length and len(text) <= 4 * length else line[: length - 1] + "…"


def content_id(*parts: str) -> str:
    """A short id that depends on nothing but the text: 16 hex digits of SHA-256."""
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


def canonical_json(value: object) -> str:
    """One spelling for equal values: sorted keys, no spaces, no ASCII escapes. The base of every content key."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
