r"""Chat templates: how a conversation becomes token ids, in training as in serving. The only place that knows [INST].

"janus" is the paper's format (Lee et al. 2024, the released axolotl configuration): BOS, then
`[INST] {system}\n{instruction} [/INST]`, then the response and EOS. Without a system message the first line is left
out. "own" is the template that a model's tokenizer brings, with its rules for system messages and for the words before
an answer. Either way the text of a message is text: see `janus_ray.control`.

The hash of the token ids of a fixed probe set is stored in every model folder; a server compares it when it starts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from janus_ray.control import ControlTokens
from janus_ray.errors import CheckpointError, DataError
from janus_ray.records import canonical_json
from janus_ray.text import is_blank, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# One turn of a conversation: {"role": ..., "content": ...}, as the OpenAI API and chat templates take it.
Message = dict[str, str]

ChatTemplate = Literal["janus", "own"]
"""The template of this project, or the one that a model's own tokenizer brings."""

_JANUS = (
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content + '\\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if message.role == 'user' and loop.index0 % 2 == 0 %}"
    "{{ 'LEAD[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}"
    "{% elif message.role == 'assistant' and loop.index0 % 2 == 1 %}"
    "{{ 'GAP' + message.content + eos_token }}"
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
_ANSWER = "Answer"
# Ends of a prompt that an answer's first token may be read behind, where the prompt's own last token swallows it.
_CONTEXTS = ("]", ".", "\n", "a", ":")


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """A training example: token ids, and which of them carry loss (the response and its end)."""

    input_ids: list[int]
    loss_mask: list[bool]


def conversation(system: str | None, prompt: str) -> list[Message]:
    """The messages of one single-turn request; a blank system message counts as none."""
    user = {"role": "user", "content": prompt}
    return [user] if is_blank(system or "") else [{"role": "system", "content": system or ""}, user]


def use_template(tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate) -> ChatEncoder:
    """Gives the tokenizer the named template, and returns the encoder of conversations.

    Raises:
        CheckpointError: the tokenizer brings no template of its own, or cannot be used with the one that is named.
    """
    if chat_template == "janus":
        tokenizer.chat_template = janus_template(tokenizer)
    return ChatEncoder(tokenizer)


def janus_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Our template as Jinja text for this tokenizer.

    The paper encodes turns and responses one by one, and so does Mistral's own encoder. One text with all turns gives
    the same ids if it has a space where the tokenizer would have put one before a text of its own.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    before = tokenizer.bos_token or tokenizer.eos_token or ""
    alone = ids("[INST] a")
    lead = " " if before and ids(before + "[INST] a")[1:] != alone and ids(before + " [INST] a")[1:] == alone else ""
    # A special "[/INST]" ends the prompt by itself; otherwise a response without a space could merge with the bracket.
    gap = "" if "[/INST]" in tokenizer.get_added_vocab() else " "
    return _JANUS.replace("LEAD", lead).replace("GAP", gap)


class ChatEncoder:
    """Token ids of conversations under the chat template that a tokenizer has."""

    end_id: int | None
    """The control token that ends an answer; None where the template writes none."""
    begin_id: int | None
    """The token that every prompt begins with; None where they differ."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Reads the template's rules off what it renders, and checks that it can be encoded.

        Raises:
            CheckpointError: there is no template, no EOS token, or no ids that equal transformers' own.
        """
        self.tokenizer = tokenizer
        self._name = tokenizer.name_or_path or "the tokenizer"
        if tokenizer.eos_token_id is None:
            raise CheckpointError(f"{self._name}: the tokenizer has no EOS token; a response could never end")
        if not tokenizer.chat_template:
            raise CheckpointError(
                f'{self._name}: its tokenizer brings no chat template; chat_template = "janus" uses ours'
            )
        self._accepted = self._probes()
        self._control = ControlTokens(tokenizer, written=self._written())
        self._header = ""
        self._header = self._generation_prompt()
        self._check_ids()
        begins = {ids[0] for ids in self._probe_ids() if ids}
        self.begin_id = begins.pop() if len(begins) == 1 else None
        self.end_id = self._end_of_answer()

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a prompt, ready to be continued by a response.

        Raises:
            DataError: the template refuses the conversation, or leaves out what a person wrote.
        """
        return self._control.encode(self._prompt(messages))

    def encode_example(self, messages: Sequence[Message], response: str) -> EncodedExample:
        """Token ids and loss mask of a training example: prompt, response and its end; loss on the last two only.

        The prompt's ids are exactly those that a server gives the model.

        Raises:
            DataError: as `encode_prompt`, or the template does not continue its own prompt with the response.
        """
        prompt, answer = self._prompt(messages), self._answer(messages, response)
        prompt_ids, answer_ids = self._control.encode(prompt), self._continuation(prompt, answer)
        mask = [False] * len(prompt_ids) + [True] * len(answer_ids)
        return EncodedExample(prompt_ids + answer_ids, mask)

    def encode_conversation(self, messages: Sequence[Message]) -> list[EncodedExample]:
        """Training examples with loss on every assistant turn, each after exactly the prompt that a server would give.

        One example where each turn's prompt continues the turn before; where a template renders a turn otherwise once
        it lies in the past (Qwen3 drops the thoughts), one more for each such turn.

        Raises:
            DataError: as `encode_example`, or there is no assistant turn.
        """
        examples: list[EncodedExample] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            one = self.encode_example(messages[:index], message["content"])
            last = examples[-1] if examples else None
            if last and one.input_ids[: len(last.input_ids)] == last.input_ids:
                mask = last.loss_mask + one.loss_mask[len(last.input_ids) :]
                examples[-1] = EncodedExample(one.input_ids, mask)
            else:
                examples.append(one)
        if not examples:
            raise DataError("a conversation without an assistant turn has nothing to train on")
        return examples

    def audit(self, example: EncodedExample, response: str) -> str:
        """Decodes an example and compares what carries loss with the response.

        Returns:
            The example in words, its part with loss behind a plus sign.

        Raises:
            DataError: the tokens with loss are not the response and its end, or the prompt carries loss.
        """
        first = example.loss_mask.index(True) if True in example.loss_mask else len(example.loss_mask)
        prompt, learned = example.input_ids[:first], example.input_ids[first:]
        shown = f"{self.tokenizer.decode(prompt)!r} + loss on {self.tokenizer.decode(learned)!r}"
        whole = self._holds(learned, response) and learned[-1:] == [self.end_id]
        if not prompt or not all(example.loss_mask[first:]) or not whole:
            raise DataError(f"mask audit: a document is wrong: {shown}")
        return shown

    def audit_conversation(self, examples: Sequence[EncodedExample], messages: Sequence[Message]) -> None:
        """`audit` for every assistant turn of a conversation: each is one stretch of loss, and nothing else is.

        Raises:
            DataError: as `audit`, there are more or fewer stretches than assistant turns, or what the user wrote before
                one is not the text without loss before its stretch.
        """
        parts = [part for example in examples for part in _parts(example)]
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if len(parts) != len(turns):
            raise DataError(f"mask audit: {len(parts)} stretches of loss for {len(turns)} assistant turns")
        for index, (before, part) in zip(turns, parts, strict=True):
            shown = self.audit(part, messages[index]["content"])
            if len(parts) > 1 and not self._holds(before, messages[index - 1]["content"]):
                raise DataError(f"mask audit: message {index - 1} is not before the answer to it: {shown}")

    def probe_sha256(self) -> str:
        """Hash of the token ids of the probe set.

        It changes with the template, the vocabulary and the merges: with anything that would make a server read other
        tokens than the trainer wrote. A date that a template writes is held still.
        """
        ids = self._probe_ids(strftime_now=lambda form: "26 Jul 2024")
        return hashlib.sha256(canonical_json(ids).encode()).hexdigest()

    def _probe_ids(self, **variables: Any) -> list[list[int] | None]:
        """Token ids of each probe; None where the template does not take it."""
        ids: list[list[int] | None] = []
        for probe in _PROBES:
            try:
                ids.append(self._control.encode(self._prompt(probe, **variables)))
            except DataError:
                ids.append(None)
        return ids

    def _holds(self, ids: list[int], text: str) -> bool:
        """Whether ids decode to something with a text in it, spaces aside."""
        plain = self.tokenizer.decode(self._control.encode(text))
        return _letters(str(plain)) in _letters(str(self.tokenizer.decode(ids)))

    def _prompt(self, messages: Sequence[Message], **variables: Any) -> str:
        text = self._render(messages, True, **variables) + self._header
        shown = _letters(self._control.readable(text))
        for index, message in enumerate(messages):
            if message["role"] != "assistant" and _letters(message["content"]) not in shown:
                raise DataError(f"message {index}: the chat template leaves out what the {message['role']} wrote")
        return text

    def _answer(self, messages: Sequence[Message], response: str) -> str:
        """What the template adds to the prompt for a response, up to the control token that ends it."""
        prompt = self._prompt(messages)
        whole = self._render([*messages, {"role": "assistant", "content": response}], False)
        if not whole.startswith(prompt):
            raise DataError(
                "the chat template does not continue its own prompt with the response, so that no loss mask fits; "
                'chat_template = "janus" does'
            )
        last_line = response.rstrip().rsplit("\n", 1)[-1].strip()
        end = self._control.end_behind(last_line, whole[len(prompt) :])
        if not last_line or end is None:
            raise DataError("the chat template writes no token that ends a response, or drops the response")
        return whole[len(prompt) :][:end]

    def _continuation(self, prompt: str, answer: str) -> list[int]:
        """Ids of a response as they follow the ids of the prompt."""
        for before in (prompt, *_CONTEXTS):
            context, both = self._control.encode(before), self._control.encode(before + answer)
            if both[: len(context)] == context:
                return both[len(context) :]
        raise DataError("no token ids of the response can follow the prompt's")

    def _render(self, messages: Sequence[Message], generation_prompt: bool, **variables: Any) -> str:
        """The conversation as text, in which only what the template wrote is a control token, in its secret spelling.

        Raises:
            DataError: the template refuses the conversation, or reads its texts for control tokens.
        """
        text = self._apply(messages, generation_prompt, variables)
        contents = [message["content"] for message in messages]
        disguised, undo = self._control.disguised(contents)
        if disguised == contents:
            return self._control.spelled(text)
        changed = [{**message, "content": new} for message, new in zip(messages, disguised, strict=True)]
        hidden = self._apply(changed, generation_prompt, variables)
        if hidden.translate(undo) != text:
            raise DataError("the chat template treats a control token in a message's text as its own")
        return self._control.spelled(hidden).translate(undo)

    def _apply(self, messages: Sequence[Message], generation_prompt: bool, variables: Mapping[str, Any]) -> str:
        from jinja2 import TemplateError, TemplateSyntaxError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    **variables,
                )
            )
        except TemplateSyntaxError as error:
            raise CheckpointError(f"{self._name}: its chat template is not valid: {one_line(str(error))}") from None
        # A template is a program: what goes wrong in it is its own, whatever the type.
        except (
            TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
            RuntimeError,
        ) as error:
            reason = one_line(str(error)) or type(error).__name__
            raise DataError(f"the chat template refuses the conversation: {reason}") from None

    def _written(self) -> set[int]:
        """The ids that the template itself writes around prompts."""
        written: set[int] = set()
        for probe in self._accepted:
            messages = [{**message, "content": "a"} for message in probe]
            text = self._apply(messages, True, {})
            written |= set(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return written

    def _probes(self) -> list[list[Message]]:
        """The probes that the template accepts, with and without a system message.

        Raises:
            CheckpointError: it accepts none.
        """
        accepted, refusal = [], ""
        for probe in (*_PROBES, _PROBES[3][1:]):
            try:
                self._apply(probe, True, {})
                accepted.append(probe)
            except DataError as error:
                refusal = str(error)
        if not accepted:
            raise CheckpointError(f"{self._name}: {refusal}")
        return accepted

    def _generation_prompt(self) -> str:
        """What stands before an answer, where a template does not write it when it is asked to."""
        probe = self._accepted[0]
        asked, plain = (self._render(probe, wish) for wish in (True, False))
        try:
            answered = self._render([*probe, {"role": "assistant", "content": _ANSWER}], False)
        except DataError:
            return ""
        if asked != plain or not answered.startswith(plain):
            return ""
        # Spaces belong to the answer's first token.
        return answered[len(plain) :].partition(_ANSWER)[0].rstrip(" ")

    def _end_of_answer(self) -> int | None:
        try:
            answer = self._answer(self._accepted[0], _ANSWER)
        except DataError:
            return None
        return self._control.written_in(answer)[-1]

    def _check_ids(self) -> None:
        """Compares with transformers' own ids for conversations in which nothing is hostile."""
        for probe in self._accepted:
            text = self._apply(probe, True, {})
            if self._control.encode(self._control.spelled(text)) != self._ids(text):
                raise CheckpointError(f"{self._name}: its tokenizer cannot be copied; its chats would get other ids")

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]


def loss_stretches(mask: Sequence[bool | int]) -> list[tuple[int, int]]:
    """Where loss begins and, exclusive, where it ends, for every stretch of tokens that carry it."""
    edges = [index for index, (a, b) in enumerate(pairwise([0, *mask, 0])) if bool(a) != bool(b)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _parts(example: EncodedExample) -> list[tuple[list[int], EncodedExample]]:
    """For each stretch of loss the ids since the stretch before, and the example up to its end as if it were alone.

    What is behind the last stretch goes to it, without loss.
    """
    parts, done = [], 0
    stretches = loss_stretches(example.loss_mask)
    for number, (start, stop) in enumerate(stretches, start=1):
        end = stop if number < len(stretches) else len(example.input_ids)
        mask = [start <= index < stop for index in range(end)]
        parts.append((example.input_ids[done:start], EncodedExample(example.input_ids[:end], mask)))
        done = stop
    return parts


def _letters(text: str) -> str:
    """The text without spaces, which templates may strip and tokenizers may move."""
    return "".join(text.split())
