"""Why a model did not start, found in what processes have written."""

from __future__ import annotations

import os
import re
from pathlib import Path

_CAUSE_CHARACTERS = 400
_LOG_READ_BYTES = 4 * 1024**2
_STDERR = 2


def cause(message: str) -> str:
    """What went wrong, from a message that ends in a traceback: the last exception with its text, on one line."""
    named = re.findall(r"^(?:\w+\.)*(\w*(?:Error|Exception): .+(?:\n[ \t]+\S.*)*)", message, flags=re.MULTILINE)
    text = " ".join((named[-1] if named else message).split())
    # A replica wraps what its engine raised, because Serve's controller could not read that.
    text = re.sub(r"^RuntimeError: (?=\w+(?:Error|Exception): )", "", text)
    return text[:_CAUSE_CHARACTERS] or "no reason was given"


def engine_cause(log: str) -> str | None:
    """What stopped the engine's own process, from the log that it shares with its replica; None if it is silent."""
    lines = [line for line in log.splitlines() if line.startswith("(EngineCore")]
    named = [match[1] for line in lines if (match := re.search(r"\b(\w+(?:Error|Exception): .+)", line))]
    return named[-1][:_CAUSE_CHARACTERS] if named else None


def own_log() -> str:
    """The end of what this process and its children have written to standard error; empty where that is no file."""
    try:
        path = Path(os.readlink(f"/proc/self/fd/{_STDERR}"))
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_READ_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
