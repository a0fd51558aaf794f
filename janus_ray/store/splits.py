"""Which files of a dataset hold a split: by its own configuration, or else by their names."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from janus_ray.errors import DataError

# The first kind that is there is read: a folder of Parquet often has JSON files that describe it.
_DATA_ENDINGS = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
_NOT_DATA = (
    "manifest.json",
    "recipe.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
)
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}


def data_names(names: Iterable[str]) -> list[str]:
    """The data files among the names, of the first kind that there is, in order."""
    names = sorted(
        name
        for name in names
        if not any(part.startswith(".") for part in name.split("/")) and _base(name) not in _NOT_DATA
    )
    for ending in _DATA_ENDINGS:
        found = [name for name in names if ending in (Path(name).suffix, Path(name.removesuffix(".gz")).suffix)]
        if found:
            return found
    return []


def of_split(reference: str, names: Sequence[str], split: str) -> list[str]:
    """The files whose names carry the split, or all where no name carries one."""
    if not names:
        raise DataError(f"{reference}: holds no .parquet, .jsonl, .json or .csv file")
    labels = {name: _label(name) for name in names}
    present = sorted({label or "train" for label in labels.values()})
    wanted = _SPLIT_NAMES.get(split, split)
    # Where names tell no splits apart, all files are the one split that there is.
    chosen = [name for name, label in labels.items() if (label or "train") == wanted]
    if not chosen:
        raise DataError(f"{reference}: no split {split!r}; it has: {', '.join(present)}")
    _check_shards(reference, chosen)
    return chosen


def _label(name: str) -> str | None:
    words = re.split(r"[^a-z0-9]+", name.lower())
    return next((_SPLIT_NAMES[word] for word in words if word in _SPLIT_NAMES), None)


def _check_shards(reference: str, names: Iterable[str]) -> None:
    """Refuses a set of files "…-00001-of-00003…" that is not whole: what is missing would be missed by nobody."""
    parts: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if match := re.search(r"^(.*?)-?(\d{4,6})-of-(\d{4,6})", name):
            parts.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (prefix, count), there in parts.items():
        first = 1 if count in there else 0
        if missing := sorted(set(range(first, first + count)) - there):
            raise DataError(f"{reference}: {prefix}: part {missing[0]:05d} of {count} is missing; fetch it again")


def read_card(file: Path) -> dict[str, Any]:
    """The YAML part of a dataset's README; empty where there is none that can be read."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    try:
        return metadata_load(file) or {}
    # Somebody wrote this page by hand; without it the files' names decide.
    except (yaml.YAMLError, ValueError, OSError):
        return {}


def of_card(reference: str, card: dict[str, Any], names: Sequence[str], split: str) -> list[str] | None:
    """The files that a dataset's own configuration names for the split; None where it names none at all."""
    stated = card.get("configs")
    configurations = [
        one for one in (stated if isinstance(stated, list) else []) if isinstance(one, dict) and one.get("data_files")
    ]
    if not configurations:
        return None
    marked = [one for one in configurations if one.get("default") or one.get("config_name") == "default"]
    chosen = marked[:1] or configurations
    if len(chosen) > 1:
        titles = ", ".join(str(one.get("config_name")) for one in chosen)
        raise DataError(f"{reference}: has several configurations ({titles}); download one and name its folder")
    entries = chosen[0]["data_files"]
    if not (isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)):
        entries = [{"split": "train", "path": entries}]
    by_split = {str(entry.get("split", "train")): entry.get("path") for entry in entries}
    if split not in by_split:
        raise DataError(f"{reference}: no split {split!r}; it has: {', '.join(sorted(by_split))}")
    stated = by_split[split]
    patterns = [str(pattern).removeprefix("./") for pattern in (stated if isinstance(stated, list) else [stated])]
    found = sorted({name for name in names for pattern in patterns if fnmatch.fnmatch(name, pattern)})
    if not found:
        raise DataError(f"{reference}: no file for split {split!r} ({', '.join(patterns)}) is there")
    _check_shards(reference, found)
    return found


def _base(name: str) -> str:
    return name.rpartition("/")[2]
