"""What the teacher is asked for one instruction: preference sets, then a system message and a response for each.

One coroutine per instruction; the three sets run side by side, so an endpoint's limit stays full without waiting for
whole stages. Section 3.1 of the paper; the prompt texts are ours, because the authors did not publish theirs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model, model_validator

from janus_ray.chat import conversation
from janus_ray.data.recipe import CollectRecipe
from janus_ray.llm.client import ChatClient
from janus_ray.llm.request import Completion, LLMRequest, Sampling, Usage, derived_seed
from janus_ray.llm.structured import complete_structured
from janus_ray.prompts import prompt_sha256, render
from janus_ray.records import DIMENSIONS, Instruction, content_id
from janus_ray.text import is_blank
from janus_ray.values.value import Value, as_rows


def _says_something(text: str) -> str:
    if is_blank(text):
        raise ValueError("is blank")
    return text


Text = Annotated[str, Field(min_length=1, max_length=600), AfterValidator(_says_something)]


class StatedValue(BaseModel):
    """One value as the teacher states it."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    subdimension: Text
    preference: Text
    description: Text


class PreferenceSet(BaseModel):
    """One person's values: one in each dimension."""

    model_config = ConfigDict(extra="forbid")

    style: StatedValue
    background_knowledge: StatedValue
    informativeness: StatedValue
    harmlessness: StatedValue

    def values(self) -> list[Value]:
        """The values with their dimensions, in the order of DIMENSIONS."""
        return [Value(dimension=dimension, **getattr(self, dimension).model_dump()) for dimension in DIMENSIONS]


class _PreferenceSets(BaseModel):
    model_config = ConfigDict(extra="forbid")

    preference_sets: list[PreferenceSet]

    @model_validator(mode="after")
    def _people_differ(self) -> _PreferenceSets:
        for dimension in DIMENSIONS:
            stated = [getattr(person, dimension).description for person in self.preference_sets]
            if len(set(stated)) < len(stated):
                raise ValueError(f"two people state the same {dimension}")
        return self


@cache
def preference_sets_type(num_sets: int) -> type[_PreferenceSets]:
    """The answer type for exactly this many sets, so that the JSON schema says the number."""
    sets = Annotated[list[PreferenceSet], Field(min_length=num_sets, max_length=num_sets)]
    return create_model(f"PreferenceSets{num_sets}", __base__=_PreferenceSets, preference_sets=(sets, ...))


@dataclass(frozen=True, slots=True)
class Annotator:
    """Turns one instruction into the rows of the collection, success or not."""

    client: ChatClient
    recipe: CollectRecipe

    async def rows(self, instruction: Instruction) -> list[dict[str, Any]]:
        """`num_sets` rows in the schema of records.COLLECTION, and in "sent" the requests made for each just now.

        A row whose request failed carries status "error", the kind and the message; what was obtained before it
        (preference set, system message) is kept. When the preference sets fail, all rows of the instruction do.
        """
        answer_type = preference_sets_type(self.recipe.num_sets)
        request = self._request(
            "preference_sets",
            [
                {
                    "role": "user",
                    "content": render("preference_sets", num_sets=self.recipe.num_sets, prompt=instruction.prompt),
                }
            ],
            self.recipe.sampling.max_tokens_preferences,
            instruction.prompt_id,
        )
        sets, outcome = await complete_structured(self.client, request, answer_type, self.recipe.max_reasks)
        if sets is None:
            # One request was paid for, whatever the number of rows it would have made.
            return [
                _row(instruction, index, [], "", outcome, [outcome] if index == 0 else [])
                for index in range(self.recipe.num_sets)
            ]
        return await asyncio.gather(
            *(
                self._one_row(instruction, index, person.values(), outcome if index == 0 else None)
                for index, person in enumerate(sets.preference_sets)
            )
        )

    async def _one_row(
        self, instruction: Instruction, index: int, values: list[Value], shared: Completion | None
    ) -> dict[str, Any]:
        """System message and response for one set. The request that was shared by all sets is booked on the first."""
        paid = [shared] if shared else []
        descriptions = [value.description for value in values]
        system_request = self._request(
            "system_message",
            [{"role": "user", "content": render("system_message", descriptions=descriptions)}],
            self.recipe.sampling.max_tokens_system,
            instruction.prompt_id,
            index,
        )
        system = await self.client.complete(system_request)
        paid.append(system)
        if system.status == "error":
            return _row(instruction, index, values, "", system, paid)
        response_request = self._request(
            "response",
            conversation(system.text.strip(), instruction.prompt),
            self.recipe.sampling.max_tokens_response,
            instruction.prompt_id,
            index,
        )
        response = await self.client.complete(response_request)
        paid.append(response)
        return _row(instruction, index, values, system.text.strip(), response, paid)

    def _request(
        self, stage: str, messages: Sequence[dict[str, str]], max_tokens: int, prompt_id: str, index: int = 0
    ) -> LLMRequest:
        sampling = self.recipe.sampling
        return LLMRequest(
            stage=stage,
            messages=tuple(messages),
            sampling=Sampling(sampling.temperature, sampling.top_p, max_tokens),
            # The response is asked with the system message itself; the other stages have a prompt text of ours.
            prompt_sha256="" if stage == "response" else prompt_sha256(stage),
            seed=derived_seed(self.recipe.seed, prompt_id, stage, index),
        )


def _row(
    instruction: Instruction,
    index: int,
    values: list[Value],
    system: str,
    last: Completion,
    paid: Sequence[Completion],
) -> dict[str, Any]:
    usage = sum((completion.usage for completion in paid), Usage())
    return {
        "main_source": instruction.main_source,
        "original_source": instruction.original_source,
        "preference_set": as_rows(values),
        "system": system,
        "prompt": instruction.prompt,
        "output": last.text.strip() if last.status == "ok" else "",
        "row_id": content_id(instruction.prompt_id, str(index)),
        "prompt_id": instruction.prompt_id,
        "set_index": index,
        "status": last.status,
        "error_kind": last.error_kind,
        "error_message": last.error_message,
        "attempts": sum(completion.attempts for completion in paid),
        **asdict(usage),
        "sent": sum(completion.sent for completion in paid),
    }
