"""The ledger: every finished request, on disk before its row moves on, so that nothing is paid twice.

One append-only JSONL file per client process, flushed line by line. A process killed in the middle of a line leaves
a torn last line, which is skipped. All files of the folder are read together; a success hides earlier errors, and
errors are never answered from the ledger: a rerun tries them again.
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import asdict
from pathlib import Path

from janus_ray.llm.request import Completion, Usage


class Ledger:
    """Reads what earlier runs finished, appends what this one does."""

    def __init__(self, folder: Path | str) -> None:
        """Loads the folder; the file for appending is made with the first record."""
        self._folder = Path(folder)
        self._done = _load(self._folder)
        self._stream = None

    def __len__(self) -> int:
        """Number of requests answered successfully so far."""
        return len(self._done)

    def get(self, key: str) -> Completion | None:
        """The successful outcome recorded for a key, if there is one."""
        found = self._done.get(key)
        return found.from_ledger() if found else None

    def record(self, key: str, completion: Completion) -> None:
        """Appends an outcome and flushes it to the operating system; a killed process loses nothing."""
        if self._stream is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            name = f"{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
            self._stream = (self._folder / name).open("a", encoding="utf-8")
        self._stream.write(json.dumps({"key": key, **asdict(completion)}, ensure_ascii=False) + "\n")
        self._stream.flush()
        if completion.status == "ok":
            self._done[key] = completion


def count_finished(folder: Path | str) -> int:
    """Number of distinct requests with a successful outcome in a ledger folder."""
    return len(_load(Path(folder)))


def _load(folder: Path) -> dict[str, Completion]:
    done: dict[str, Completion] = {}
    for file in sorted(folder.glob("*.jsonl")):
        with file.open(encoding="utf-8", errors="replace") as stream:
            for line in stream:
                record = _parse(line)
                if record is not None and record[1].status == "ok":
                    done[record[0]] = record[1]
    return done


def _parse(line: str) -> tuple[str, Completion] | None:
    """One record; None for a torn line."""
    try:
        record = json.loads(line)
        key = record.pop("key")
        usage = Usage(**record.pop("usage"))
        return key, Completion(**record, usage=usage)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        return None
