"""The teacher: deterministic answers to the three requests of data collection, found by reading the messages.

It reads what any model would be sent (the prompts under janus_ray/prompts) and answers from the closed world. What
it writes depends on the messages and the request's seed only.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from functools import cache

from janus_ray.chat import Message
from janus_ray.miniature import gold
from janus_ray.miniature.world import Wish, is_held_out_combination, wishes
from janus_ray.records import DIMENSIONS
from janus_ray.values.wording import verbalise

# How the teacher wraps four descriptions into a system message; {0} to {3} are in shuffled order. The first is the
# text that the gateway writes for stated values, so that both roads lead to the model's training.
_SYSTEM_FRAMES = (
    None,
    "You help one particular reader. {0} {1} {2} {3}",
    "As an assistant, remember these four wishes. {0} {1} {2} {3}",
    "{0} {1} That is how you serve this user. {2} {3}",
    "{0} {1} {2} {3} Stay true to all of it.",
)


def answer(messages: Sequence[Message], seed: int) -> str:
    """The teacher's answer to a chat request.

    Args:
        messages: the conversation; the last user message says what is wanted.
        seed: picks among the possible answers where there is a choice.
    """
    request = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
    if request.startswith("People who send the same request"):
        return _preference_sets(_section(request, "Request"), _number_of_sets(request), seed)
    if request.startswith("Write the system message"):
        return system_message(re.findall(r"^- (.+)$", request, flags=re.MULTILINE), seed)
    return gold.compose(request, wishes_in(system))


def draw_sets(num_sets: int, seed: int) -> list[tuple[Wish, ...]]:
    """Sets of four values, one per dimension, that share no value with each other and may be trained on."""
    generator = random.Random(seed)
    while True:
        columns = [
            generator.sample([wish for wish in wishes()[dimension] if not wish.held_out], num_sets)
            for dimension in DIMENSIONS
        ]
        sets = list(zip(*columns, strict=True))
        if not any(is_held_out_combination(combination) for combination in sets):
            return sets


def system_message(descriptions: Sequence[str], seed: int) -> str:
    """A system message that states the descriptions, in one of several shapes and orders."""
    generator = random.Random(f"{seed}|{'|'.join(descriptions)}")
    frame = generator.choice(_SYSTEM_FRAMES)
    if frame is None or len(descriptions) != len(DIMENSIONS):
        stated = _wish_stated()
        return verbalise([stated[text].stated(text) if text in stated else text for text in descriptions])
    return frame.format(*generator.sample(list(descriptions), len(descriptions)))


def wishes_in(system: str) -> dict[str, Wish]:
    """The values that a system message states, by dimension; the longest statement of a dimension wins."""
    found: dict[str, tuple[int, Wish]] = {}
    for phrase, wish in _wish_stated().items():
        if phrase in system and len(phrase) > found.get(wish.dimension, (0, None))[0]:
            found[wish.dimension] = (len(phrase), wish)
    return {dimension: wish for dimension, (_, wish) in found.items()}


@cache
def _wish_stated() -> dict[str, Wish]:
    """Every statement of this world, with what it states."""
    return {
        description: wish
        for group in wishes().values()
        for wish in group
        for description in wish.descriptions() + wish.descriptions(unseen=True)
    }


def _preference_sets(prompt: str, num_sets: int, seed: int) -> str:
    generator = random.Random(f"{seed}|{prompt}")
    sets = draw_sets(num_sets, generator.randrange(2**31))
    answer = [
        {
            wish.dimension: {
                "subdimension": wish.subdimension,
                "preference": wish.name,
                "description": generator.choice(wish.descriptions()),
            }
            for wish in combination
        }
        for combination in sets
    ]
    return json.dumps({"preference_sets": answer})


def _number_of_sets(request: str) -> int:
    match = re.search(r"Imagine (\d+) people", request)
    return int(match.group(1)) if match else 3


def _section(text: str, title: str) -> str:
    """The text under `### title`, up to the prompt's own next heading."""
    match = re.search(rf"^### {title}\n(.*?)\n+^### Task$", text, flags=re.MULTILINE | re.DOTALL)
    return match.group(1) if match else text
