"""The recipe of serving: which models, how large, behind which gateway."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from janus_ray.chat import ChatTemplate
from janus_ray.config import OPERATIONAL, PathText, RayConfig, Recipe
from janus_ray.records import DIMENSIONS
from janus_ray.text import is_blank
from janus_ray.values.value import Value

DEPLOYMENT_PREFIX = "model:"
_REPORT_S = 2.0


class GivenValue(Value):
    """A value as a recipe or a request gives it: of a length that a prompt can hold."""

    dimension: str = Field(min_length=1, max_length=200)
    subdimension: str = Field(default="", max_length=200)
    preference: str = Field(default="", max_length=500)
    description: str = Field(min_length=1, max_length=2000)

    @field_validator("description")
    @classmethod
    def _says_something(cls, description: str) -> str:
        if is_blank(description):
            raise ValueError("must not be blank")
        return description


class Persona(Recipe):
    """A named set of values that the page offers."""

    name: str = Field(min_length=1, max_length=80)
    """Shown in the menu."""
    preferences: list[str] | list[GivenValue]
    """Four sentences in the order style, background_knowledge, informativeness, harmlessness; or values that name
    their dimension."""

    @field_validator("preferences")
    @classmethod
    def _one_sentence_for_each_dimension(
        cls, preferences: list[str] | list[GivenValue]
    ) -> list[str] | list[GivenValue]:
        texts = [value for value in preferences if isinstance(value, str)]
        if texts and (len(texts) != len(DIMENSIONS) or any(map(is_blank, texts))):
            raise ValueError(f"expected {len(DIMENSIONS)} sentences, one for each of {', '.join(DIMENSIONS)}")
        if not preferences:
            raise ValueError("expected at least one value")
        return preferences

    def values(self) -> list[GivenValue]:
        """The persona's values, each with its dimension."""
        pairs = zip(DIMENSIONS, self.preferences, strict=False)
        positional = [GivenValue(dimension=name, description=text) for name, text in pairs if isinstance(text, str)]
        return positional or [value for value in self.preferences if isinstance(value, GivenValue)]


class ServedModel(Recipe):
    """One model and the replicas that serve it."""

    model_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/@-]*$", max_length=100)
    """The name that requests use."""
    path: PathText
    """A model folder, as the training jobs export it or as others publish theirs; or the hub's id of a published one,
    "org/name" or "org/name@revision"."""
    chat_template: ChatTemplate | None = None
    """How a conversation becomes token ids: "janus" is the paper's format, "own" the chat template that the model's
    tokenizer brings. None takes the one that the folder's record names; a model that was not exported here has none."""
    max_model_len: int = Field(default=4096, ge=16)
    """Longest prompt plus response, in tokens."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Number format of weights and activations. None takes bfloat16 on GPUs and float32 on CPUs: a CPU without bfloat16
    instructions decodes a small model three times slower in bfloat16."""
    num_gpus: int = Field(default=0, ge=0)
    """GPUs of one replica; the model is split over them (tensor parallel). 0 runs on CPUs."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    """Share of each GPU's memory for weights and KV cache; None takes the engine's 0.9. Only with num_gpus >= 1."""
    cpus_per_replica: int = Field(default=1, ge=1)
    """CPUs that one replica reserves; without GPUs also its number of compute threads."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """Memory for the KV cache of a replica without GPUs, in GiB; None takes 1. Only with num_gpus = 0."""
    block_size: int | None = Field(default=None, ge=16)
    """Tokens in one block of the KV cache. The prefix cache shares whole blocks only, so a block longer than a system
    message never hits. None takes 32 on CPUs and the engine's choice on GPUs."""
    min_replicas: int = Field(default=1, ge=1)
    """Replicas that are always up."""
    max_replicas: int = Field(default=1, ge=1)
    """Replicas at full load."""
    initial_replicas: int | None = Field(default=None, ge=1, json_schema_extra=OPERATIONAL)
    """Replicas at the start, from min_replicas to max_replicas; None takes min_replicas."""
    target_ongoing_requests: int = Field(default=24, ge=1)
    """Requests in a replica at which the autoscaler adds one; about three quarters of max_num_seqs works well."""
    look_back_s: float = Field(default=10.0, ge=1, le=3600, json_schema_extra=OPERATIONAL)
    """The autoscaler takes the mean load of this time, in seconds. Shorter follows a burst sooner, and is more often
    wrong about it."""
    upscale_delay_s: float = Field(default=5.0, ge=0, le=86400, json_schema_extra=OPERATIONAL)
    """How long the load must ask for more replicas before there are more, in seconds. With look_back_s a step in the
    load is answered after 5 to 15 s; starting a replica of a 7B model takes a minute or two on top. Ray's own 30 s,
    after a mean over 30 s, came when a load of 75 s was over."""
    downscale_delay_s: float = Field(default=300.0, ge=0, le=86400, json_schema_extra=OPERATIONAL)
    """How long the load must ask for fewer replicas before there are fewer, in seconds. A few times what a start takes:
    a replica given up too early costs a start, one kept too long its idle time (Ray's own: 600 s)."""
    max_num_seqs: int = Field(default=32, ge=1)
    """Sequences that the engine decodes together."""
    max_ongoing_requests: int = Field(default=64, ge=1)
    """Requests that a replica accepts at the same time."""
    max_queued_requests: int = Field(default=64, ge=0)
    """Requests that wait for a replica, in each gateway replica; one more is answered 429."""
    drain_timeout_s: float = Field(default=120.0, gt=0)
    """How long a replica that is to stop may finish what it is answering, in seconds."""
    enforce_eager: bool | None = None
    """Run without compiled graphs: starts sooner, decodes slower. None does so on CPUs only."""

    @property
    def first_replicas(self) -> int:
        """Replicas at the start."""
        return self.initial_replicas or self.min_replicas

    def scaling(self) -> dict[str, Any]:
        """How many replicas, and when there are more or fewer, in the words of Serve's autoscaler."""
        return {
            "min_replicas": self.min_replicas,
            "max_replicas": self.max_replicas,
            "initial_replicas": self.first_replicas,
            "target_ongoing_requests": self.target_ongoing_requests,
            "look_back_period_s": self.look_back_s,
            # How often the gateways report. Ray's own 10 s would be added to every delay.
            "metrics_interval_s": min(_REPORT_S, self.look_back_s / 2),
            "upscale_delay_s": self.upscale_delay_s,
            "downscale_delay_s": self.downscale_delay_s,
        }

    @property
    def deployment_name(self) -> str:
        """The model's name in Serve's status and logs, where "/" and "." have other meanings."""
        return DEPLOYMENT_PREFIX + self.model_id.replace("/", "--").replace(".", "_")

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        if self.num_gpus == 0 and self.gpu_memory_utilization is not None:
            raise ValueError("gpu_memory_utilization applies only with num_gpus >= 1")
        if self.num_gpus > 0 and self.kv_cache_gib is not None:
            raise ValueError("kv_cache_gib applies only with num_gpus = 0")
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        if self.initial_replicas and not self.min_replicas <= self.initial_replicas <= self.max_replicas:
            raise ValueError(
                f"initial_replicas {self.initial_replicas} is not between min_replicas {self.min_replicas} and "
                f"max_replicas {self.max_replicas}"
            )
        if self.target_ongoing_requests > self.max_ongoing_requests:
            raise ValueError(
                f"target_ongoing_requests {self.target_ongoing_requests} can never be reached: "
                f"max_ongoing_requests is {self.max_ongoing_requests}"
            )
        return self


class ServeRecipe(Recipe):
    """An OpenAI-compatible endpoint for one or more models."""

    models: list[ServedModel] = Field(min_length=1)
    """The models; the page starts with the first."""
    host: str = Field(default="127.0.0.1", pattern=r"^[A-Za-z0-9.:%_-]+$")
    """Address to listen on. Nothing here authenticates a caller: open it to a network only behind something that does.
    Where a YAML file is deployed, its http_options say this."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on. Where a YAML file is deployed, its http_options say this."""
    proxy_location: Literal["HeadOnly", "EveryNode"] = Field(default="HeadOnly", json_schema_extra=OPERATIONAL)
    """Where requests come in: on the cluster's head node, or on every node with a replica, with a load balancer before
    them. Where a YAML file is deployed, its own proxy_location says this."""
    gateway_replicas: int = Field(default=1, ge=1)
    """Gateway processes; one carries a few hundred requests/s and reserves one CPU."""
    max_tokens: int = Field(default=2048, ge=1)
    """Most tokens one response may have; a request that asks for more is refused, one that does not say gets this."""
    max_choices: int = Field(default=4, ge=1)
    """Most choices (`n`) of one request."""
    max_body_kib: int = Field(default=1024, ge=1)
    """Largest request body, in KiB."""
    retry_after_s: int = Field(default=2, ge=1)
    """What an overloaded server asks the caller to wait, in seconds."""
    start_timeout_s: float = Field(default=900.0, gt=0)
    """How long the models may take to start, in seconds. Only the job waits; a deployed YAML file starts by itself."""
    personas: list[Persona] = Field(default=[])
    """Sets of values that the page offers; the first two are shown at the start."""
    example_prompts: list[str] = Field(default=[])
    """Prompts that the page offers."""
    ray: RayConfig = RayConfig()
    """The Ray cluster. Only the job reads this; a YAML file is deployed to a cluster that is up."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        for kind, names in (
            ("model_id", [model.model_id for model in self.models]),
            ("deployment", [model.deployment_name for model in self.models]),
            ("persona", [persona.name for persona in self.personas]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{kind} {twice[0]!r} is used twice")
        return self

    def needed_cpus(self) -> float:
        """Logical CPUs held at the same time by the gateway and the replicas of the start."""
        return self.gateway_replicas + sum(model.first_replicas * model.cpus_per_replica for model in self.models)

    def needed_gpus(self) -> float:
        """GPUs held at the same time by the replicas of the start."""
        return sum(model.first_replicas * model.num_gpus for model in self.models)
