"""From values to the system message that states them.

The text is canonical: the same values, in any order and with any spacing, give the same bytes. The engine's prefix
cache depends on it, and so does anybody who wants to know whether two answers were written for the same values.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence

from janus_ray.prompts import render
from janus_ray.values.value import Value, in_dimension_order

_SENTENCE_ENDS = (".", "!", "?", "…", "。", "！", "？")


def verbalise(values: Sequence[Value | str]) -> str:
    """The system message for a set of values.

    Values stand in the order of the four dimensions; bare texts follow, in alphabetical order. Spacing is normalised,
    a missing full stop is added, a text that comes twice is said once.

    Args:
        values: values with their place in the hierarchy, or texts that state a value.

    Returns:
        The message; without values its first sentences only.
    """
    structured = [_normalised(value) for value in values if isinstance(value, Value)]
    bare = sorted(_sentence(value) for value in values if isinstance(value, str))
    descriptions = [value.description for value in in_dimension_order(structured)] + bare
    # A dictionary keeps the first of equal texts, in order.
    return render("verbalised_system", descriptions=list(dict.fromkeys(text for text in descriptions if text)))


def system_sha(system: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a system message."""
    return hashlib.sha256(system.encode()).hexdigest()[:16]


def _normalised(value: Value) -> Value:
    return Value(
        dimension=_one_line(value.dimension),
        subdimension=_one_line(value.subdimension),
        preference=_one_line(value.preference),
        description=_sentence(value.description),
    )


def _one_line(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _sentence(text: str) -> str:
    text = _one_line(text)
    return text if not text or text.endswith(_SENTENCE_ENDS) else f"{text}."
