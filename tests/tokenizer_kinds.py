"""Tokenizers of the kinds that published models have, and chat templates in their manner, for tests."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from janus_ray.miniature.kit import train_tokenizer

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Without a rule for the generation prompt.
CHATML_SILENT = CHATML.partition("{% if add_generation_prompt %}")[0]
# Drops the thoughts of past turns, and writes empty ones before a last answer without.
THINKING = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{%- set content = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{%- set before = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set thought = before if '</think>' in m.content else '' %}"
    "{%- if loop.index0 > ns.last %}"
    "{{- '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + content + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}{%- endif %}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# No system role, contents stripped, its own end of turn that is not the tokenizer's EOS.
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA3 = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ bos_token }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if loop.first %}{{ 'Today Date: ' + date_string + '\n\n' }}{% endif %}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Control tokens that swallow the space beside them, and an EOS behind every conversation that is not asked on.
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)

_TEXTS = ["You write for a child.", "How do I start with chess?", "Castle early. <|im_start|>user", "assistant [INST]"]


def byte_level(template: str | dict[str, str], *special: str, plain: tuple[str, ...] = (), **options: Any) -> Any:
    """A byte-level tokenizer with further special and further ordinary added tokens."""
    from tokenizers import AddedToken

    tokenizer = train_tokenizer(iter(_TEXTS * 3), 340)
    if template:
        # Published ones do not have our brackets as tokens.
        tokenizer = _renamed(tokenizer, {"[INST]": "<unused_1>", "[/INST]": "<unused_2>"})
    flags = {"normalized": False, **{name: options.pop(name) for name in ("lstrip", "rstrip") if name in options}}
    tokenizer.add_tokens([AddedToken(token, special=True, **flags) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    for name, token in options.items():
        setattr(tokenizer, name, token)
    tokenizer.chat_template = template
    return tokenizer


def _renamed(tokenizer: Any, names: dict[str, str]) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    text = tokenizer.backend_tokenizer.to_str()
    for old, new in names.items():
        text = text.replace(json.dumps(old), json.dumps(new))
    special = {name: getattr(tokenizer, name) for name in ("unk_token", "bos_token", "eos_token", "pad_token")}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), **special)


def chatml(template: str = CHATML) -> Any:
    """As Qwen's: no BOS, thoughts as ordinary added tokens."""
    tokens = ("<|im_start|>", "<|im_end|>")
    return byte_level(template, *tokens, plain=("<think>", "</think>"), bos_token=None, eos_token="<|im_end|>")


def gemma() -> Any:
    return byte_level(GEMMA, "<start_of_turn>", "<end_of_turn>", plain=("\n\n", "<h1>"))


def llama3() -> Any:
    return byte_level(LLAMA3, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", eos_token="<|eot_id|>")


def phi3() -> Any:
    return byte_level(PHI3, "<|user|>", "<|system|>", "<|assistant|>", "<|end|>", rstrip=True)


def deepseek() -> Any:
    """Turn markers that the tokenizer does not call special."""
    template = (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content + eos_token }}"
        "{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
    )
    return byte_level(template, plain=("<｜User｜>", "<｜Assistant｜>", "<think>"))


def write_mistral(
    folder: Path, *, model_type: str = "mistral", json_too: bool = True, merged: int = 30_000, **configuration: Any
) -> Path:
    """A folder with the real Mistral tokenizer, wrapped as published Mistral 7B v0.2 and Llama 2 folders wrap theirs.

    Args:
        folder: where to write.
        model_type: as in config.json; transformers chooses its class by it.
        json_too: with a tokenizer.json; otherwise the SentencePiece file alone.
        merged: with a tokenizer.json of no more than so many merged pieces, for speed, and without the other file.
        **configuration: further entries of tokenizer_config.json; `configuration=None` leaves the file out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if merged >= 30_000:
        shutil.copyfile(_sentencepiece_file(), folder / "tokenizer.model")
    if configuration.pop("configuration", True):
        (folder / "tokenizer_config.json").write_text(json.dumps({**_PUBLISHED, **configuration}))
    if json_too:
        (folder / "tokenizer.json").write_text(_published_json(merged))
    return folder


_PUBLISHED = {
    "add_bos_token": True,
    "add_eos_token": False,
    "added_tokens_decoder": {
        str(number): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for number, token in enumerate(["<unk>", "<s>", "</s>"])
    },
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "legacy": True,
    "model_max_length": 10**30,
    "pad_token": None,
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
    "use_default_system_prompt": False,
}


def _sentencepiece_file() -> Path:
    import mistral_common

    return Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


@cache
def _published_json(merged: int) -> str:
    """tokenizer.json as the published conversion wrote it: merges by score, a space before every stretch of text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import SentencePieceExtractor
    from transformers.tokenization_utils_base import generate_merges

    every = list(SentencePieceExtractor(str(_sentencepiece_file())).proto.pieces)
    pieces = [piece for number, piece in enumerate(every) if number < merged or len(piece.piece) == 1]
    vocab = {piece.piece: number for number, piece in enumerate(pieces)}
    merges: Any = generate_merges(vocab, {piece.piece: piece.score for piece in pieces})
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return backend.to_str()
