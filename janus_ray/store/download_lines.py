"""Lines of progress while files come from the hub, where no terminal shows its bars."""

from __future__ import annotations

from threading import Lock
from typing import Any

from janus_ray.progress import ProgressLine

_MB = 1_000_000


def download_lines(name: str) -> Any:
    """A bar for `snapshot_download` that draws nothing and says in lines how much has come.

    The hub makes several bars for a snapshot; the one that counts what is written, in bytes, is followed.
    """
    from tqdm import tqdm

    class Lines(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            written = options.get("unit") == "B" and str(options.get("desc", "")).startswith("Reconstruct")
            self._line = ProgressLine(f"hub: MB of {name}") if written else None
            # A bar that is disabled keeps no account; files come in several threads.
            self._bytes, self._one_by_one = 0, Lock()
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            with self._one_by_one:
                self._bytes += int(n or 0)
                if self._line is not None:
                    # More files are known by and by.
                    self._line.total = round((self.total or 0) / _MB)
                    self._line.update(round(self._bytes / _MB))
            return None

    return Lines
