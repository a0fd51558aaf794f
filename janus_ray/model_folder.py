"""A model folder: its tokenizer, the record of its chat template, and the id of its weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from janus_ray.chat import ChatTemplate, template_sha256
from janus_ray.errors import CheckpointError
from janus_ray.store.files import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FILE = "janus_template.json"

# What makes a model answer as it does. Manifests, recipes, optimizer states and read-me files are not among it.
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "*.gguf",
    "tokenizer*",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*chat_template*",
    TEMPLATE_FILE,
)
_CHUNK_BYTES = 1 << 24
_THREADS = 4


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        CheckpointError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model}: no tokenizer: {str(error).splitlines()[0]}") from None
    if tokenizer is None:
        raise CheckpointError(f"{model}: holds no tokenizer")
    return tokenizer


def write_template_record(folder: Path | str, sha256: str, chat_template: ChatTemplate = "janus") -> None:
    """Stores in a model folder which chat template it was trained with, and the hash of its probe ids."""
    write_json(Path(folder) / TEMPLATE_FILE, {"chat_template": chat_template, "template_sha256": sha256})


def check_model_folder(folder: Path | str) -> str:
    """Compares the hash stored in a model folder with the one its tokenizer gives now, and returns it.

    Raises:
        CheckpointError: no such folder, no stored hash, or a mismatch.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: not a model folder (no config.json)")
    if not (folder / TEMPLATE_FILE).is_file():
        raise CheckpointError(f"{folder}: no {TEMPLATE_FILE}: it cannot be shown that training used this chat template")
    stored = read_json(folder / TEMPLATE_FILE).get("template_sha256")
    actual = template_sha256(load_tokenizer(folder))
    if stored != actual:
        raise CheckpointError(
            f"{folder}: template hash mismatch: trained with {str(stored)[:12]}, tokenizer gives {actual[:12]}; "
            "the model would see other tokens than it was trained on"
        )
    return actual


def weights_id(folder: Path | str) -> str:
    """A short id of everything in a model folder that decides its answers: 16 hex digits.

    Two folders have the same id if weights, configuration, tokenizer and template are the same bytes under the same
    names. A 7B model takes some seconds, most of it for reading the files.

    Raises:
        CheckpointError: no such folder, or a file in it cannot be read.
    """
    import xxhash

    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a model folder (no such folder)")
    files = sorted(
        file for file in folder.iterdir() if file.is_file() and any(fnmatch(file.name, kind) for kind in _MODEL_FILES)
    )
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            hashes = list(pool.map(_xxh3, files))
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from None
    listing = "".join(f"{file.name}\0{digest}\n" for file, digest in zip(files, hashes, strict=True))
    return xxhash.xxh3_64_hexdigest(listing.encode())


def _xxh3(file: Path) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
