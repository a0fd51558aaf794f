"""The base model's weights on disk: found and judged without reading them, then read.

transformers makes up at random what is missing, so a run would go on, finish, and export a damaged model. Its own
loader is therefore asked beforehand what it would do, with the shapes in the files' headers in the place of weights.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Collection, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from janus_ray.errors import CheckpointError
from janus_ray.train.families import NONSENSE, in_one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_SHOWN = 4


def check_weights(base_model: str, skeleton: PreTrainedModel) -> None:
    """Compares the weights in a folder with those that the model has, by name, shape and type.

    Args:
        base_model: the folder.
        skeleton: the model without memory.

    Raises:
        CheckpointError: a file is missing or damaged; weights are missing, too many, of another shape or quantised;
            two weights that the configuration ties are not equal.
    """
    headers = _headers(base_model)
    if wrong := sorted(
        name for name, (_, dtype) in headers.items() if dtype not in _FLOATS and name in skeleton.state_dict()
    ):
        kinds = ", ".join(sorted({headers[name][1] for name in wrong}))
        raise _refused(base_model, f"weights of type {kinds}, expected {', '.join(sorted(_FLOATS))}: {_some(wrong)}")
    found = _judged(base_model, skeleton, {name: shape for name, (shape, _) in headers.items()})
    if missing := found["missing_keys"]:
        raise _refused(base_model, f"weights are missing from it: {_some(missing)}")
    if unexpected := found["unexpected_keys"]:
        raise _refused(base_model, f"holds weights that its configuration has no place for: {_some(unexpected)}")
    if mismatched := found["mismatched_keys"]:
        name, there, expected = min(mismatched, key=lambda entry: entry[0])
        raise _refused(
            base_model,
            f"{name} is {list(there)} in its weights and {list(expected)} by its configuration "
            f"({len(mismatched)} such weight{'s' if len(mismatched) > 1 else ''})",
        )
    for name, source in skeleton.all_tied_weights_keys.items():
        if name in headers and source in headers and not _equal(base_model, name, source):
            raise _refused(
                base_model,
                f"its configuration ties {name} to {source}, but they differ; set tie_word_embeddings = false there",
            )


def read_weights(base_model: str, config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """All weights by the model's names, in FP32.

    Raises:
        CheckpointError: they cannot be read, or are no longer what `check_weights` saw.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                base_model, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise _refused(base_model, in_one_line(error)) from None
    model, found = loaded
    if found["missing_keys"] or found["unexpected_keys"]:
        raise _refused(base_model, f"weights changed since the start: {_some(found['missing_keys'])}")
    return model.state_dict()


@contextmanager
def quiet_transformers() -> Generator[None]:
    """No progress bar and no report of the loader on the terminal: what matters is in our own errors."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _judged(base_model: str, skeleton: PreTrainedModel, shapes: dict[str, list[int]]) -> dict[str, Any]:
    """What transformers would say of weights with these names and shapes, after its own renaming and tying."""
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        with quiet_transformers():
            loaded: Any = type(skeleton).from_pretrained(
                None,
                config=copy.deepcopy(skeleton.config),
                state_dict=weights,
                device_map="meta",
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except NONSENSE as error:
        raise _refused(base_model, in_one_line(error)) from None
    return loaded[1]


def _headers(base_model: str) -> dict[str, tuple[list[int], str]]:
    """Shape and type of every weight in the folder."""
    from safetensors import SafetensorError, safe_open

    headers: dict[str, tuple[list[int], str]] = {}
    for file in _files(base_model):
        try:
            with file.open("rb") as stream:
                if stream.read(len(_POINTER)) == _POINTER:
                    raise _refused(base_model, f"{file.name} is a Git LFS pointer, not the weights; run git lfs pull")
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (no mapping)
                    entry = opened.get_slice(name)
                    headers[name] = (entry.get_shape(), entry.get_dtype())
        except (OSError, SafetensorError, ValueError) as error:
            raise _refused(
                base_model, f"{file.name} is cut or damaged ({in_one_line(error)}); fetch it again"
            ) from None
    return headers


def _files(base_model: str) -> list[Path]:
    folder = Path(base_model)
    if (folder / "adapter_config.json").is_file():
        raise _refused(base_model, "holds an adapter (adapter_config.json); merge it into its base first")
    if (folder / _FILE).is_file():
        return [folder / _FILE]
    if not (folder / _INDEX).is_file():
        others = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".gguf", ".pt", ".pth"))
        instead = f" (it has {_some(others)}: save it again with transformers)" if others else ""
        raise _refused(base_model, f"neither {_FILE} nor {_INDEX}{instead}")
    try:
        names = set(json.loads((folder / _INDEX).read_bytes())["weight_map"].values())
        missing = sorted(name for name in names if not (folder / os.path.basename(name)).is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _refused(base_model, f"{_INDEX} is no index of weights") from None
    if missing:
        raise _refused(base_model, f"{_INDEX} names files that are not there: {_some(missing)}")
    return sorted(folder / os.path.basename(name) for name in names)


def _equal(base_model: str, name: str, other: str) -> bool:
    from safetensors import safe_open

    found = []
    for file in _files(base_model):
        with safe_open(file, framework="pt") as opened:
            found += [opened.get_tensor(key) for key in opened.keys() if key in (name, other)]  # noqa: SIM118
    return torch.equal(*found)


def _some(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _refused(base_model: str, reason: str) -> CheckpointError:
    return CheckpointError(f"base model {base_model}: {reason}")
