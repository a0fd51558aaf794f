"""A model folder: its tokenizer, the record of its chat template, and the id of its weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from janus_ray.chat import ChatEncoder, ChatTemplate, use_template
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
_REASON_CHARACTERS = 300
# Numbers of SentencePiece's format.
_SENTENCEPIECE_BPE, _NORMAL_PIECE = 2, 1
_ODD_TEXTS = (
    "Hello",
    " two  spaces ",
    "\n\nlines\n",
    "[INST] x [/INST]",
    "ünïcode 語 🙂",
    "a\tb </b> 3.14",
    "don't",
    "é ﬁ ½",
)
_THREADS = 4


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, as its own files describe it.

    transformers builds some families' tokenizers anew instead of reading `tokenizer.json`, and reads a SentencePiece
    file without the space that it puts before a text. Where that gives other ids, the files are followed.

    Raises:
        CheckpointError: there is none, or its files cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        # Mistral's own files, where they lie beside Hugging Face's, would bring a class that has no templates.
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False, mistral_format=False)
    # The tokenizers library raises nothing narrower.
    except Exception as error:
        reason = " ".join(str(error).split())[:_REASON_CHARACTERS] or type(error).__name__
        raise CheckpointError(f"{model}: no tokenizer: {reason}") from None
    if tokenizer is None:
        raise CheckpointError(f"{model}: holds no tokenizer")
    folder = Path(model)
    if (folder / "tokenizer.json").is_file():
        return _as_its_json_says(tokenizer, folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        return _as_sentencepiece_reads(tokenizer, folder / "tokenizer.model")
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a tokenizer beside a model's config.json, and reads it again as a server will.

    Raises:
        CheckpointError: what was read gives other ids.
    """
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    # Every other class lets transformers build the tokenizer anew, and that forgets how a text begins.
    write_json(file, {**read_json(file), "tokenizer_class": "PreTrainedTokenizerFast"})
    again: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if _odd_ids(again) != _odd_ids(tokenizer) or again.eos_token_id != tokenizer.eos_token_id:
        raise CheckpointError(
            f"{tokenizer.name_or_path}: its tokenizer, written and read again, gives other ids; "
            "a model trained with it could not be served"
        )


def write_template_record(folder: Path | str, sha256: str, chat_template: ChatTemplate = "janus") -> None:
    """Stores in a model folder which chat template it was trained with, and the hash of its probe ids."""
    write_json(Path(folder) / TEMPLATE_FILE, {"chat_template": chat_template, "template_sha256": sha256})


def check_model_folder(folder: Path | str, chat_template: ChatTemplate | None = None) -> str:
    """The hash of the ids that a model folder's chat template gives.

    Raises:
        CheckpointError: as `load_encoder`.
    """
    return load_encoder(folder, chat_template).probe_sha256()


def load_encoder(folder: Path | str, chat_template: ChatTemplate | None = None) -> ChatEncoder:
    """The encoder of conversations for a model folder.

    Args:
        folder: a Hugging Face model folder.
        chat_template: the template that a recipe names; None takes the one that the folder's record names.

    Raises:
        CheckpointError: no such folder; neither a record nor a name; or the record's template or hash is another.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: not a model folder (no config.json)")
    if not (folder / TEMPLATE_FILE).is_file():
        if chat_template is None:
            raise CheckpointError(
                f"{folder}: no {TEMPLATE_FILE}, so it was not exported here; name its template in the recipe: "
                'chat_template = "own" (the one its tokenizer brings) or "janus" (the paper\'s)'
            )
        return use_template(load_tokenizer(folder), chat_template)
    trained, stored = _record(folder / TEMPLATE_FILE)
    if chat_template not in (None, trained):
        raise CheckpointError(
            f'{folder}: trained with chat_template = "{trained}", the recipe names "{chat_template}"; leave it out'
        )
    # The template in the folder is what training used, so it is not put there anew.
    encoder = ChatEncoder(load_tokenizer(folder))
    actual = encoder.probe_sha256()
    if stored != actual:
        raise CheckpointError(
            f"{folder}: template hash mismatch: trained with {stored[:12]}, tokenizer gives {actual[:12]}; "
            "the model would see other tokens than it was trained on"
        )
    return encoder


def weights_id(folder: Path | str, chat_template: ChatTemplate | None = None) -> str:
    """A short id of everything in a model folder that decides its answers: 16 hex digits.

    Two folders have the same id if weights, configuration, tokenizer and template are the same bytes under the same
    names. A 7B model takes some seconds, most of it for reading the files.

    Args:
        folder: a Hugging Face model folder.
        chat_template: the template that a recipe names; it counts where the folder has no record of its own.

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
    named = chat_template if chat_template and not (folder / TEMPLATE_FILE).is_file() else ""
    return xxhash.xxh3_64_hexdigest(f"{listing}{named}".encode())


def _record(file: Path) -> tuple[str, str]:
    """The chat template and the hash in a folder's record."""
    record = read_json(file)
    values = record if isinstance(record, dict) else {}
    # Records of the first release name no template: there was one.
    template, sha256 = values.get("chat_template", "janus"), values.get("template_sha256")
    if template not in get_args(ChatTemplate) or not isinstance(sha256, str):
        raise CheckpointError(f"{file}: not a template record; expected chat_template and template_sha256")
    return template, sha256


def _odd_ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of texts that tokenizers which differ at all tend to read differently."""
    ends = [token or "" for token in (tokenizer.bos_token, tokenizer.eos_token)]
    texts = (*_ODD_TEXTS, *(f"{ends[0]}[INST] {text} [/INST]{text}{ends[1]}{text}" for text in _ODD_TEXTS))
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def _as_its_json_says(tokenizer: PreTrainedTokenizerBase, file: Path) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    if type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer
    named = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    written = PreTrainedTokenizerFast.from_pretrained(file.parent)
    written.add_special_tokens({name: token for name, token in named.items() if getattr(written, name, None) is None})
    if _odd_ids(written) == _odd_ids(tokenizer):
        return tokenizer
    return written


def _as_sentencepiece_reads(tokenizer: PreTrainedTokenizerBase, file: Path) -> PreTrainedTokenizerBase:
    """A tokenizer built from a SentencePiece file alone, with that file's merges and its space before a text.

    transformers orders the merges by id instead of by score, and leaves the space out for some families. The space
    comes before every stretch of text between two control tokens, as in the tokenizer.json of published Llama 2 and
    Mistral folders, unless the folder's configuration says `"legacy": false`.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import decoders, models, normalizers, pre_tokenizers
    from transformers.convert_slow_tokenizer import SentencePieceExtractor
    from transformers.tokenization_utils_base import generate_merges

    backend: Any = getattr(tokenizer, "_tokenizer", None)
    try:
        pieces = SentencePieceProcessor(model_file=str(file))
    except RuntimeError:
        # A tiktoken file by the same name.
        return tokenizer

    def agrees() -> bool:
        return all(tokenizer(t, add_special_tokens=False)["input_ids"] == pieces.encode(t) for t in _ODD_TEXTS)

    proto: Any = SentencePieceExtractor(str(file)).proto
    if backend is None or agrees() or proto.trainer_spec.model_type != _SENTENCEPIECE_BPE:
        return tokenizer
    vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces}
    controls = [piece.piece for piece in proto.pieces if piece.type != _NORMAL_PIECE]
    unknown = pieces.id_to_piece(pieces.unk_id())
    merges: Any = generate_merges(vocab, scores, skip_tokens=controls)
    backend.model = models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    configuration = file.with_name("tokenizer_config.json")
    legacy = not configuration.is_file() or read_json(configuration).get("legacy") is not False
    prefix = proto.normalizer_spec.add_dummy_prefix
    before = [normalizers.Prepend("▁")] if prefix and legacy else []
    first = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    backend.normalizer = (
        None if prefix and not legacy else normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    )
    backend.pre_tokenizer = first if prefix and not legacy else None
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    if not agrees():
        print(f"{file}: read otherwise than by SentencePiece; a tokenizer.json beside it would be followed", flush=True)
    return tokenizer


def _xxh3(file: Path) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
