"""Control tokens: what a chat template writes, and what the text of a message can never become.

A tokenizer finds its control tokens (`</s>`, `<|im_end|>`, ...) by their spelling, wherever they stand. Here a rendered
conversation is encoded by a copy of the tokenizer in which every control token has another spelling, one that nobody
can know. Only what the template wrote is put into that spelling, so a message's "</s>" meets a tokenizer for which it
is four ordinary characters.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from janus_ray.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# Private-use characters: the brackets of a secret spelling, and the first of those that disguise a message's own.
_OPEN, _CLOSE = "\ue000", "\ue001"
_DISGUISES = range(0xF0000, 0xF0400)


class ControlTokens:
    """The control tokens of one tokenizer, and its encoder for texts in which they are spelled in secret.

    Control tokens are the added tokens that the tokenizer calls special, and those that the chat template writes. Other
    added tokens (`<think>`, HTML tags, runs of spaces) are vocabulary: a text that holds them is meant to.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, written: Iterable[int] = ()) -> None:
        """Copies the tokenizer.

        Args:
            tokenizer: a tokenizer of the `tokenizers` library.
            written: ids that the chat template writes by itself.

        Raises:
            CheckpointError: it is another kind of tokenizer.
        """
        backend: Any = getattr(tokenizer, "_tokenizer", None)
        if backend is None or not hasattr(backend, "to_str"):
            raise CheckpointError(
                f"{tokenizer.name_or_path}: its tokenizer ({type(tokenizer).__name__}) is not one of the "
                "tokenizers library; convert it to a tokenizer.json"
            )
        written = set(written)
        self.ids: dict[str, int] = {
            token.content: number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.content and (token.special or (number in written and token.content.strip()))
        }
        secret = secrets.token_hex(8)
        self._spelling = {name: f"{_OPEN}{secret}x{number}{_CLOSE}" for name, number in self.ids.items()}
        self._by_spelling = {spelling: self.ids[name] for name, spelling in self._spelling.items()}
        self._names = _any_of(self._spelling)
        self._spellings = _any_of(self._by_spelling)
        self._heads = {name[:end] for name in self.ids for end in range(1, len(name))}
        self._tails = {name[start:] for name in self.ids for start in range(1, len(name))}
        self._longest = max(map(len, self.ids), default=0)
        self._tokenizer = _renamed(backend, self._spelling)

    def spelled(self, text: str) -> str:
        """The text with every control token in it in its secret spelling."""
        return self._names.sub(lambda found: self._spelling[found[0]], text)

    def encode(self, spelled: str) -> list[int]:
        """Token ids of a text with secret spellings; nothing else in it becomes a control token.

        Raises:
            CheckpointError: the tokenizer does not recognise its own control tokens where the template writes them.
        """
        ids = self._tokenizer.encode(spelled, add_special_tokens=False).ids
        due = [self._by_spelling[found] for found in self._spellings.findall(spelled)]
        known = set(due)
        if [token for token in ids if token in known] != due:
            raise CheckpointError("the tokenizer does not recognise its own control tokens in a chat")
        return ids

    def written_in(self, spelled: str) -> list[int]:
        """The ids of the control tokens that stand in a text in their secret spelling, in order."""
        return [self._by_spelling[found] for found in self._spellings.findall(spelled)]

    def end_behind(self, words: str, spelled: str) -> int | None:
        """Where the control token behind some words ends: of the places that hold them, the last; None without one."""
        end, start = None, 0
        for found in self._spellings.finditer(spelled):
            if words in spelled[start : found.start()]:
                end = found.end()
            start = found.end()
        return end

    def readable(self, spelled: str) -> str:
        """The text with the control tokens' own names again."""
        names = {spelling: name for name, spelling in self._spelling.items()}
        return self._spellings.sub(lambda found: names[found[0]], spelled)

    def disguised(self, contents: list[str]) -> tuple[list[str], dict[int, str]]:
        """Contents in which no control token can be read, and the table for `str.translate` that undoes this.

        One character of each name is replaced; also at an end of a content where what the template writes next to it
        could complete a name.
        """
        free = (chr(number) for number in _DISGUISES if not any(chr(number) in content for content in contents))
        masks: dict[str, str] = {}

        def mask(character: str) -> str:
            if character not in masks:
                disguise = next(free, None)
                if disguise is None:
                    raise DataError("a message holds more private-use characters than can be told apart")
                masks[character] = disguise
            return masks[character]

        changed = [self._disguise(content, mask) for content in contents]
        return changed, {ord(disguise): character for character, disguise in masks.items()}

    def _disguise(self, content: str, mask: Any) -> str:
        # More than once, because what is behind a name may have been part of another that overlaps it.
        while self._names.search(content):
            content = self._names.sub(lambda found: mask(found[0][0]) + found[0][1:], content)
        inner = content.strip()
        if not inner:
            return content
        lengths = range(1, min(self._longest, len(inner) + 1))
        if any(inner[:length] in self._tails for length in lengths):
            content = content.replace(inner[0], mask(inner[0]), 1)
        if any(inner[-length:] in self._heads for length in lengths):
            before, _, after = content.rpartition(inner[-1])
            content = before + mask(inner[-1]) + after
        return content


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern of all names, the longest first, as the tokenizer looks for them."""
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"(?!)")


def _renamed(backend: Any, names: dict[str, str]) -> Tokenizer:
    """A copy of the tokenizer that knows some tokens by other names, with the same ids."""
    from tokenizers import Tokenizer

    spec = json.loads(backend.to_str())
    spec.update(truncation=None, padding=None, post_processor=None)
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
        # What is special and what is not makes no difference from here on: all are found.
        token["special"] = False
    model = spec["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & names.keys()]
    return Tokenizer.from_str(json.dumps(spec))
