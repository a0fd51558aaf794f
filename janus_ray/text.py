"""Text that came over a wire or out of a file: made well-formed before anything else sees it."""

from __future__ import annotations

import unicodedata
from typing import Any

_INVISIBLE = ("Cc", "Cf", "Zl", "Zp", "Zs")
# Letters and symbols by their category, and yet nothing is drawn: Hangul fillers, the empty Braille cell.
_FILLERS = "\u115f\u1160\u2800\u3164\uffa0"


def well_formed(text: str) -> str:
    """The text with every lone surrogate replaced by U+FFFD, so that it can be encoded as UTF-8.

    JSON may escape half of a surrogate pair, which Python reads into a text that no file, socket or hash takes.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        # A pair that was escaped as two halves is one character; what is left over is not.
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def one_line(text: str, most: int = 300) -> str:
    """The text as one printable line: what comes from outside must not steer a terminal or a log."""
    shown = "".join(character if character.isprintable() else " " for character in well_formed(text[: 8 * most]))
    return " ".join(shown.split())[:most]


def well_formed_values(value: Any) -> Any:
    """`well_formed` for every text inside lists and dictionaries, keys included; other values as they are."""
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, dict):
        return {well_formed_values(key): well_formed_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [well_formed_values(inner) for inner in value]
    return value


def is_blank(text: str) -> bool:
    """Whether nothing in the text can be seen: spaces, line breaks, control characters, zero-width marks, fillers."""
    bare = text.strip()
    if not bare or (bare[0].isprintable() and bare[0] not in _FILLERS):
        return not bare
    return all(unicodedata.category(each) in _INVISIBLE or each in _FILLERS for each in bare)
