r"""THE chat template: the only place that knows [INST].

Training, serving and evaluation all render through here. The format is the paper's (Lee et al. 2024, the released
axolotl configuration): BOS, then `[INST] {system}\n{instruction} [/INST]`, then the response and EOS. Without a
system message the first line is left out. Response tokens are encoded apart from the prompt, so that the prompt's
token ids during training are exactly those the server sees.

The hash of the token ids of a fixed probe set is stored in every model folder; a server compares it when it starts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from janus_ray.errors import CheckpointError, DataError
from janus_ray.records import canonical_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# One turn of a conversation: {"role": ..., "content": ...}, as the OpenAI API and chat templates take it.
Message = dict[str, str]

ChatTemplate = Literal["janus", "own"]
"""The template of this project, or the one that a model's own tokenizer brings."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content + '\\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if message.role == 'user' and loop.index0 % 2 == 0 %}"
    "{{ '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}"
    "{% elif message.role == 'assistant' and loop.index0 % 2 == 1 %}"
    "{{ message.content + eos_token }}"
    "{% else %}"
    "{{ raise_exception('after an optional system message, user and assistant must take turns, user first') }}"
    "{% endif %}"
    "{% endfor %}"
)

_PROBES: tuple[list[Message], ...] = (
    [{"role": "user", "content": "How do I start?"}],
    [{"role": "system", "content": "You write for a child."}, {"role": "user", "content": "How do I start?"}],
    [
        {"role": "system", "content": "  Two lines,\nodd   spaces, ünïcode 語 and a tab\t. "},
        {"role": "user", "content": "- one\n- two\n\n1.5 €?"},
    ],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ],
)


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """A training example: token ids, and which of them carry loss (the response and its EOS)."""

    input_ids: list[int]
    loss_mask: list[bool]


def conversation(system: str | None, prompt: str) -> list[Message]:
    """The messages of one single-turn request; an empty system message counts as none."""
    user = {"role": "user", "content": prompt}
    return [{"role": "system", "content": system}, user] if system else [user]


def render_prompt(messages: Sequence[Message], bos: str, eos: str) -> str:
    """The text of a prompt, byte for byte what `CHAT_TEMPLATE` renders.

    Raises:
        DataError: the roles are not an optional system message followed by user and assistant in turn.
    """
    system = messages[0]["content"] + "\n" if messages and messages[0]["role"] == "system" else ""
    turns = messages[1:] if system else messages
    text = bos
    for index, message in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if message["role"] != expected:
            raise DataError(f"message {index}: role {message['role']!r} where {expected!r} is due")
        if expected == "user":
            text += f"[INST] {system if index == 0 else ''}{message['content']} [/INST]"
        else:
            text += message["content"] + eos
    return text


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a prompt, BOS included, ready to be continued by a response."""
    text = render_prompt(messages, _text(tokenizer.bos_token), _text(tokenizer.eos_token))
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_example(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], response: str) -> EncodedExample:
    """Token ids and loss mask of a training example: prompt, response, EOS; loss on the response and EOS only."""
    prompt_ids = encode_prompt(tokenizer, messages)
    # A response that speaks of "</s>" must not end there.
    encoded = tokenizer(response, add_special_tokens=False, split_special_tokens=True)
    response_ids = [*encoded["input_ids"], tokenizer.eos_token_id]
    mask = [False] * len(prompt_ids) + [True] * len(response_ids)
    return EncodedExample(prompt_ids + response_ids, mask)


def template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the token ids that the tokenizer's own chat template gives for the probe set.

    It changes with the template, the vocabulary and the merges: with anything that would make the server read other
    tokens than the trainer wrote.
    """
    rendered = [str(tokenizer.apply_chat_template(list(probe), tokenize=False)) for probe in _PROBES]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]
    return hashlib.sha256(canonical_json(ids).encode()).hexdigest()


def install_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Gives the tokenizer our chat template and returns the template hash.

    Raises:
        CheckpointError: with this tokenizer the template does not give the ids that training uses.
    """
    tokenizer.chat_template = CHAT_TEMPLATE
    for probe in _PROBES:
        text = str(tokenizer.apply_chat_template(list(probe), tokenize=False))
        if tokenizer(text, add_special_tokens=False)["input_ids"] != encode_prompt(tokenizer, probe):
            raise CheckpointError("the chat template and the training encoder disagree on this tokenizer's token ids")
    return template_sha256(tokenizer)


def _text(token: object) -> str:
    if not isinstance(token, str):
        raise CheckpointError("the tokenizer has no BOS or EOS token; the chat template needs both")
    return token
