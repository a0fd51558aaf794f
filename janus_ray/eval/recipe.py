"""The recipe of an evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from janus_ray.config import OPERATIONAL, PathText, RayConfig, Recipe
from janus_ray.llm.endpoint import Endpoint, model_id

Generated = Literal["own_system", "no_system"]
HEADLINE: Generated = "own_system"


class EvaluatedModel(Recipe):
    """One model to evaluate."""

    name: str = Field(min_length=1)
    """Name in the report."""
    model: str = Field(min_length=1)
    """Model id at the policy endpoint."""
    conditions: tuple[Generated, ...] = ("own_system", "no_system")
    """What is generated: with each person's own system message, and without any. The sibling control needs no
    generation of its own."""

    @field_validator("name", "model")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        return model_id(value)

    @field_validator("conditions")
    @classmethod
    def _each_once(cls, value: tuple[Generated, ...]) -> tuple[Generated, ...]:
        # Twice would count every response twice.
        return tuple(dict.fromkeys(value))


class GenerationSampling(Recipe):
    """Decoding parameters of the evaluated models; defaults are the paper's inference settings."""

    temperature: float = Field(default=1.0, ge=0, le=2)
    """Softmax temperature (paper: 1.0)."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Nucleus mass (paper: 0.9)."""
    max_tokens: int = Field(default=1024, ge=1)
    """Longest response, in tokens (paper: 1024). A response cut there is judged as it is and counted."""
    repetition_penalty: float = Field(default=1.03, ge=0.01, le=10)
    """Penalty for repeated tokens (paper: 1.03; 1 is none). For an endpoint that does not know it, name it in
    policy.omit."""


class JudgeSampling(Recipe):
    """Decoding parameters of the judge."""

    temperature: float = Field(default=0.0, ge=0, le=2)
    """Softmax temperature; 0 for one deterministic grade per rubric."""
    max_tokens: int = Field(default=512, ge=1)
    """Room for the feedback and the score, in tokens."""


class PolicyEndpoint(Endpoint):
    """The endpoint that serves the evaluated models."""

    model: str = ""
    """Left empty: the models are named under `models`."""

    @field_validator("model")
    @classmethod
    def _is_empty(cls, value: str) -> str:
        if value:
            raise ValueError("name the evaluated models under [[models]]")
        return value

    @field_validator("provider")
    @classmethod
    def _is_served(cls, value: str) -> str:
        if value != "openai":
            raise ValueError('must be "openai", as jobs.serve is; the miniature has a teacher and a judge only')
        return value


class EvaluateRecipe(Recipe):
    """Generate, judge, aggregate."""

    bench: PathText
    """JSON lines, a JSON array or Parquet with the columns of the Multifaceted Bench, a folder of such files, or the id
    of a published bench ("kaist-ai/Multifaceted-Bench"); `prompt_id`, `item_id` and `split` are optional."""
    output_dir: PathText = Field(json_schema_extra=OPERATIONAL)
    """Folder for generations, judgments, results.json and index.html."""
    policy: PolicyEndpoint
    """Where the evaluated models are served."""
    models: list[EvaluatedModel] = Field(min_length=1)
    """The models, in the report's order."""
    main_model: str
    """Name of the model that headline, controls and samples are about."""
    judge: Endpoint
    """The judge, on an endpoint of its own."""
    generation: GenerationSampling = GenerationSampling()
    """Decoding of the evaluated models."""
    judging: JudgeSampling = JudgeSampling()
    """Decoding of the judge."""
    judge_siblings: bool = True
    """Judge each response under the rubrics of everyone who asked its prompt: the sibling control, the matrix and the
    steering gain need it. Without it a response costs as many judge calls as its person has rubrics."""
    coverage_threshold: float = Field(default=0.98, ge=0, le=1)
    """Share of the due rubric scores below which no mean is reported."""
    max_prompts_per_split: int | None = Field(default=None, ge=1)
    """Take at most this many prompts of each split, in the bench's order."""
    client_actors: int = Field(default=2, ge=1, le=64, json_schema_extra=OPERATIONAL)
    """Client processes; each endpoint's max_concurrency is divided among them."""
    samples_in_report: int = Field(default=12, ge=0, le=1000)
    """Prompts whose responses the report shows in full."""
    seed: int = Field(default=0, ge=0)
    """Seed of the generations."""
    ray: RayConfig = Field(default=RayConfig(), json_schema_extra=OPERATIONAL)
    """The Ray cluster."""

    @model_validator(mode="after")
    def _names_are_known(self) -> EvaluateRecipe:
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"models: two have the same name ({', '.join(names)})")
        if self.main_model not in names:
            raise ValueError(f"main_model: {self.main_model!r} is none of {', '.join(names)}")
        if HEADLINE not in self.models[names.index(self.main_model)].conditions:
            raise ValueError(f"main_model: {self.main_model!r} needs {HEADLINE} among its conditions")
        return self
