"""The recipe of data collection."""

from __future__ import annotations

from pydantic import Field

from janus_ray.config import OPERATIONAL, PathText, RayConfig, Recipe
from janus_ray.llm.endpoint import Endpoint


class Source(Recipe):
    """One place where instructions come from."""

    path: PathText
    """A file (JSON lines, a JSON array, Parquet, or .csv and .tsv with a header), a folder of such files, or the id of
    a Hugging Face dataset, "org/name" or "org/name@revision"."""
    prompt_column: str = Field(default="instruction", min_length=1)
    """Column with the instruction. A dotted path reaches into nested values: "turns.0", "instances.0.input"."""
    input_column: str | None = Field(default=None, min_length=1)
    """Column with further input; where it is not empty it follows the instruction after a blank line."""
    source_column: str | None = Field(default=None, min_length=1)
    """Column whose value becomes `original_source`; None, and a row without it, take the name of the source."""
    name: str | None = Field(default=None, min_length=1)
    """Becomes `main_source`; None takes the file's name or the dataset's id."""
    split: str = Field(default="train", min_length=1)
    """Split of a Hugging Face dataset, or of a folder whose files are named by split."""
    limit: int | None = Field(default=None, ge=1)
    """Take at most this many rows, from the start."""


class CollectSampling(Recipe):
    """Decoding parameters of the teacher.

    The paper's generation used temperature 1.0; its released code does not state the others, so these are our choice.
    """

    temperature: float = Field(default=1.0, ge=0, le=2)
    """Softmax temperature."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Nucleus mass."""
    max_tokens_preferences: int = Field(default=1536, ge=1)
    """Room for the preference sets of one instruction, in tokens."""
    max_tokens_system: int = Field(default=512, ge=1)
    """Room for one system message, in tokens."""
    max_tokens_response: int = Field(default=1024, ge=1)
    """Room for one response, in tokens."""


class CollectRecipe(Recipe):
    """From instructions to a collection in the schema of the Multifaceted Collection."""

    sources: list[Source] = Field(min_length=1)
    """Where instructions come from, in this order; of equal instructions the first is kept."""
    output_dir: PathText = Field(json_schema_extra=OPERATIONAL)
    """Folder for the collection."""
    teacher: Endpoint
    """The model that writes preference sets, system messages and responses."""
    sampling: CollectSampling = CollectSampling()
    """The teacher's decoding parameters."""
    num_sets: int = Field(default=3, ge=1, le=8)
    """Preference sets per instruction (paper: 3)."""
    max_reasks: int = Field(default=2, ge=0, le=5, json_schema_extra=OPERATIONAL)
    """How often an answer that does not fit the schema is asked for again."""
    client_actors: int = Field(default=1, ge=1, le=64, json_schema_extra=OPERATIONAL)
    """Client processes; the endpoint's max_concurrency is divided among them. One drives about 400 requests/s."""
    rows_per_file: int = Field(default=10_000, ge=1, json_schema_extra=OPERATIONAL)
    """Rows per Parquet file."""
    seed: int = Field(default=0, ge=0)
    """Seed of the requests; another seed asks everything anew."""
    ray: RayConfig = Field(default=RayConfig(), json_schema_extra=OPERATIONAL)
    """The Ray cluster."""
