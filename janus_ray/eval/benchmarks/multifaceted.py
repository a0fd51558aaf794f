"""The Multifaceted Bench (Lee et al. 2024, section 4.1), with two controls of ours.

Prometheus-style absolute grading (Kim et al. 2024, arXiv 2405.01535), as in the paper: the judge sees the request,
the response, the reference answer and one rubric, and not the system message. Conditions:

    own_system      judged for the person it was written for: the diagonal of the cross-preference matrix
    sibling_system  judged for another person who asked the same prompt: off the diagonal
    no_system       written for nobody, judged for each person
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from janus_ray.chat import conversation
from janus_ray.eval.items import BenchItem
from janus_ray.eval.recipe import HEADLINE, EvaluatedModel, EvaluateRecipe, Generated
from janus_ray.eval.results import Condition, Scale
from janus_ray.eval.verdict import parse_verdict
from janus_ray.llm.outcome import Status, status_of
from janus_ray.llm.request import Completion, LLMRequest, Sampling, derived_seed
from janus_ray.prompts import prompt_sha256, render

SCALE = Scale(lowest=1, highest=5)
JUDGE_SEES = "request, response, reference answer, one rubric; not the system message"

# Distinguishable without colour vision, on white and on black (Okabe and Ito).
CONDITIONS = (
    Condition(
        name=HEADLINE,
        label="own system message",
        says="mean score with the person's own system message",
        colour="#0072B2",
    ),
    Condition(name="no_system", label="no system message", says="without a system message", colour="#E69F00"),
    Condition(
        name="sibling_system",
        label="another person's system message",
        says="the same responses, judged for another person",
        colour="#CC79A7",
    ),
)
# The controls that are paired with the headline, person by person.
CONTROLS = ("sibling_system", "no_system")

JUDGED = frozenset({Status.OK, Status.TRUNCATED, Status.EMPTY})
# The endpoint did its part, but what came is no answer: cut before any text, thoughts only, nothing.
_NO_ANSWER = frozenset({Status.EMPTY, Status.UNFINISHED})


def condition_of(written_for: str | None, judged_for: str) -> str:
    """The condition of one judgment."""
    if written_for is None:
        return "no_system"
    return HEADLINE if written_for == judged_for else "sibling_system"


def responses_due(
    model: EvaluatedModel, items: Sequence[BenchItem], siblings: Mapping[str, Sequence[BenchItem]]
) -> Iterator[tuple[Generated, BenchItem]]:
    """What a model is asked.

    All items; without a system message siblings ask the same, so the first of them stands for the prompt.
    """
    for condition in model.conditions:
        asked: Iterable[BenchItem] = items
        if condition != HEADLINE:
            asked = (group[0] for group in siblings.values())
        yield from ((condition, item) for item in asked)


def response_request(recipe: EvaluateRecipe, condition: Generated, item: BenchItem) -> LLMRequest:
    """The request to an evaluated model."""
    sampling = recipe.generation
    return LLMRequest(
        stage=f"evaluate_{condition}",
        messages=tuple(conversation(item.system if condition == HEADLINE else None, item.prompt)),
        sampling=Sampling(sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.repetition_penalty),
        seed=derived_seed(recipe.seed, item.item_id, condition),
        keep_truncated=True,
    )


def judges_for(
    recipe: EvaluateRecipe, written_for: str | None, siblings: Sequence[BenchItem]
) -> Iterator[tuple[BenchItem, int]]:
    """Under which person's which rubric a response is judged."""
    for item in siblings:
        if recipe.judge_siblings or written_for in (None, item.item_id):
            yield from ((item, rubric) for rubric in range(len(item.rubrics)))


def judge_request(recipe: EvaluateRecipe, item: BenchItem, rubric: int, response: str) -> LLMRequest:
    """The request to the judge."""
    text = render(
        "judge_absolute",
        prompt=item.prompt,
        response=response,
        reference_answer=item.reference_answer,
        criteria=item.rubrics[rubric].criteria,
        score_descriptions=sorted(item.rubrics[rubric].score_descriptions.items()),
    )
    return LLMRequest(
        stage="judge",
        messages=({"role": "user", "content": text},),
        sampling=Sampling(temperature=recipe.judging.temperature, max_tokens=recipe.judging.max_tokens),
        prompt_sha256=prompt_sha256("judge_absolute"),
        seed=recipe.seed,
        # A long-winded judge has often said its score; if not, it is asked for it.
        keep_truncated=True,
    )


def score(outcome: Completion) -> int | None:
    """The score of an answer; of one that was cut, not where it stands in the line that might have gone on."""
    if outcome.status != "ok":
        return None
    found = parse_verdict(outcome.text)
    whole_lines = outcome.text[: outcome.text.rfind("\n") + 1]
    return None if outcome.finish_reason == "length" and parse_verdict(whole_lines) != found else found


def judged_status(outcome: Completion | None, found: int | None) -> Status:
    """What came of a judgment: ok with the score that was found, and without one why."""
    if outcome is None:
        return Status.NO_RESPONSE
    if outcome.status == "ok":
        return Status.OK if found is not None else Status.PARSE_FAIL
    return Status.PARSE_FAIL if status_of(outcome) in _NO_ANSWER else Status.API_FAIL


def asked_for_the_verdict(request: LLMRequest, outcome: Completion) -> LLMRequest:
    """The request continued by the judge's answer: a judge at temperature 0 would only repeat itself otherwise."""
    more = ({"role": "assistant", "content": outcome.text}, {"role": "user", "content": render("judge_verdict")})
    sampling = request.sampling
    if outcome.finish_reason == "length" and sampling.max_tokens:
        sampling = replace(sampling, max_tokens=2 * sampling.max_tokens)
    return replace(
        request, messages=request.messages + more, sampling=sampling, prompt_sha256=prompt_sha256("judge_verdict")
    )
