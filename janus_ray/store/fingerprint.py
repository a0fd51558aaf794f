"""What a file, a folder or a published model or dataset holds, as a hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

# Files of ours that say how a folder was made, not what is in it.
MANIFEST = "manifest.json"
RECIPE = "recipe.json"
LOCK = ".lock"


def fingerprint(path: Path | str) -> str | None:
    """SHA-256 over a file, or over the names and contents of a folder's files; None where the path is not local."""
    path = Path(path)
    if path.is_file():
        return _file_sha256(path)
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.name not in (MANIFEST, RECIPE, LOCK)):
        digest.update(f"{file.relative_to(path)}\0{_file_sha256(file)}\n".encode())
    return digest.hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
