"""The recipes of the jobs that set the miniature up."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from janus_ray.config import OPERATIONAL, PathText, Recipe


class InstructionsRecipe(Recipe):
    """Writing the world's instructions."""

    output_path: PathText
    """JSONL file to write."""


class BaseModelRecipe(Recipe):
    """Building a tokenizer and an untrained Mistral from a collection."""

    collection: PathText
    """Folder of a finished collection; the tokenizer is trained on its texts."""
    output_dir: PathText = Field(json_schema_extra=OPERATIONAL)
    """Hugging Face model folder to write."""
    vocab_size: int = Field(default=1536, ge=300)
    """Tokens in the vocabulary: 256 bytes, the special tokens, merges."""
    hidden_size: int = Field(default=256, ge=32)
    """Width of the residual stream."""
    intermediate_size: int = Field(default=576, ge=32)
    """Width of the feed-forward layer."""
    num_layers: int = Field(default=2, ge=1)
    """Decoder blocks."""
    num_heads: int = Field(default=8, ge=1)
    """Query heads."""
    num_kv_heads: int = Field(default=2, ge=1)
    """Key and value heads (grouped-query attention, as in Mistral)."""
    initializer_range: float = Field(default=0.05, gt=0)
    """Standard deviation of the random weights, near 1 / sqrt(hidden_size): a layer's output is then as large as its
    input. Transformers' own 0.02 fits wide models and starts one this narrow so quietly that it learns slowly."""
    max_position_embeddings: int = Field(default=1024, ge=64)
    """Longest sequence, in tokens."""
    seed: int = 0
    """Seed of the weights."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"hidden_size {self.hidden_size} is no even multiple of num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        return self


class BenchRecipe(Recipe):
    """Writing the world's bench."""

    collection: PathText
    """Folder of a finished collection: what was seen in training is read from it."""
    output_path: PathText
    """JSONL file to write, in the schema of records.BENCH."""
    prompts_per_split: int = Field(default=24, ge=1, le=48)
    """Prompts in each split; each is asked by three people."""
    seed: int = 0
    """Seed of the choice."""
