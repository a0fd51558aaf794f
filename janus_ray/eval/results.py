"""The numbers of an evaluation, typed from the aggregate to the report; results.json is their plain form."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer, model_validator

from janus_ray.llm.outcome import Status
from janus_ray.stats import Estimate


class _Typed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Scale(_Typed):
    """The scores that a judge may give."""

    lowest: int
    highest: int

    def share(self, value: float) -> float:
        """How far up the scale a value lies, from 0 to 1."""
        return (value - self.lowest) / (self.highest - self.lowest)

    def ticks(self) -> range:
        """Whole scores to mark on an axis, a dozen at most."""
        step = -(-(self.highest - self.lowest) // 10)
        return range(self.lowest, self.highest + 1, step)

    def within(self, value: float) -> float:
        """The value, or the end of the scale that it lies beyond: an interval may reach further than scores can."""
        return min(max(value, self.lowest), self.highest)


class Condition(_Typed):
    """One way in which responses are made and judged."""

    name: str
    """As rows and results.json have it."""
    label: str
    """As tables and plots have it."""
    says: str
    """What its mean score is the mean of, for the report's first lines."""
    colour: str
    """Of its points in plots."""


class Measure(_Typed):
    """A mean with its 95 % interval, and how much of what was due it rests on."""

    mean: float | None
    low: float | None
    high: float | None
    n: int
    """Scores averaged."""
    clusters: int
    """Prompts behind them."""
    coverage: float
    """scored / due."""
    scored: int
    due: int
    withheld: str | None = None
    """Why there is no mean."""
    no_interval: str | None = None
    """Why there is a mean and no interval."""

    @classmethod
    def of(cls, estimate: Estimate, scored: int, due: int, threshold: float) -> Measure:
        """An estimate with its coverage; below the threshold the mean is withheld and the reason given."""
        coverage = scored / due if due else 0.0
        mean, low, high = estimate.mean, estimate.low, estimate.high
        withheld = no_interval = None
        if not due:
            withheld = "not measured"
        elif coverage < threshold:
            mean = low = high = None
            withheld = f"coverage {100 * coverage:.1f} % is below {100 * threshold:.0f} %"
        elif estimate.clusters == 1:
            no_interval = "one prompt, no interval"
        return cls(
            mean=mean,
            low=low,
            high=high,
            n=estimate.n,
            clusters=estimate.clusters,
            coverage=coverage,
            scored=scored,
            due=due,
            withheld=withheld,
            no_interval=no_interval,
        )

    @model_serializer(mode="wrap")
    def _without_reasons_that_are_none(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in plain(self).items() if value is not None or name in _ALWAYS}


_ALWAYS = ("mean", "low", "high")


class Scores(_Typed):
    """Mean scores of some responses."""

    overall: Measure
    per_dimension: dict[str, Measure]


class ConditionScores(Scores):
    """Mean scores under one condition."""

    per_split: dict[str, Scores]


class Gain(_Typed):
    """Steering gain: own minus other, same prompt."""

    overall: Measure
    per_split: dict[str, Measure]


class ModelResults(_Typed):
    """What was measured of one model."""

    conditions: dict[str, ConditionScores]
    """By the condition's name; those only that were judged."""
    steering_gain: Gain

    @model_serializer(mode="wrap")
    def _flat(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = plain(self)
        return {**values["conditions"], "steering_gain": values["steering_gain"]}

    @model_validator(mode="before")
    @classmethod
    def _from_flat(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "conditions" in values:
            return values
        conditions = {name: value for name, value in values.items() if name != "steering_gain"}
        return {"conditions": conditions, "steering_gain": values.get("steering_gain")}


class Protocol(_Typed):
    """What a reader must know to repeat or to doubt the numbers."""

    bench: str
    bench_fingerprint: str
    items: int
    prompts: int
    judge: str
    judge_sees: str
    judge_runs: int
    judge_sampling: dict[str, Any]
    generation_sampling: dict[str, Any]
    seed: int
    interval: str
    coverage_threshold: float
    models: dict[str, str]
    """Model id at the endpoint, by the model's name."""
    weights: dict[str, str]


class Results(_Typed):
    """All numbers of an evaluation."""

    models: dict[str, ModelResults]
    """By name, in the report's order."""
    main_model: str
    paired_differences: dict[str, dict[str, dict[str, Measure]]]
    """By model, "condition - control", and split; "all" are all splits."""
    matrix: dict[str, list[list[float | None]]]
    """By model: row, whom a response was written for; column, whom it is judged for."""
    status_counts: dict[str, dict[str, dict[Status, int]]]
    """By step (generations, judgments) and model."""
    judge_asked_again: dict[str, int]
    protocol: Protocol
    usage: dict[str, int]
    """Tokens of the evaluated models' responses."""
    scale: Scale
    conditions: tuple[Condition, ...]
    """In the order of tables and plots; the first is the one that the headline is about."""

    @property
    def main(self) -> ModelResults:
        """The main model's."""
        return self.models[self.main_model]

    @property
    def headline(self) -> ConditionScores:
        """The main model's scores under the first condition."""
        return self.main.conditions[self.conditions[0].name]

    def measured(self, model: ModelResults) -> list[tuple[Condition, ConditionScores]]:
        """What was measured of a model, in the order of the conditions."""
        return [(each, model.conditions[each.name]) for each in self.conditions if each.name in model.conditions]

    def as_json(self) -> dict[str, Any]:
        """The plain form; controls and steering gain of the main model stand at the top once more."""
        plain = self.model_dump(mode="json")
        main = plain["models"][self.main_model]
        controls = {name: main[name] for name in main if name not in (self.conditions[0].name, "steering_gain")}
        repeated = {"controls": controls, "steering_gain": main["steering_gain"]}
        return {name: plain.pop(name) for name in ("models", "main_model")} | repeated | plain

    @classmethod
    def from_json(cls, plain: Any) -> Self:
        """Reads the plain form.

        Raises:
            ValueError: it is none, or another version's.
        """
        if not isinstance(plain, dict):
            raise ValueError("expected an object")
        repeated = ("controls", "steering_gain")
        return cls.model_validate({name: value for name, value in plain.items() if name not in repeated})
