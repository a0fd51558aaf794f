"""The untrained model: a tokenizer and a Mistral of about two million parameters, built from a collection."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from janus_ray.chat import use_template
from janus_ray.config import IfExists
from janus_ray.miniature.recipe import BaseModelRecipe
from janus_ray.model_folder import write_template_record
from janus_ray.store.fetch import upload_folder
from janus_ray.store.folder import Ref, RunFolder
from janus_ray.store.tables import read_parquet

_SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_TEMPLATE_TOKENS = ["[INST]", "[/INST]"]


def build_base_model(recipe: BaseModelRecipe, if_exists: IfExists) -> dict[str, Any]:
    """Writes a Hugging Face model folder with random weights and returns its manifest.

    Raises:
        ConfigError, DataError: the folder may not be used, or there is no collection.
    """
    import torch
    from transformers import MistralConfig, MistralForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()

    rows = read_parquet(recipe.collection, ["system", "prompt", "output", "status"]).to_pylist()
    folder = RunFolder(recipe.output_dir, recipe, if_exists)
    tokenizer = train_tokenizer(
        (text for row in rows if row["status"] == "ok" for text in (row["system"], row["prompt"], row["output"])),
        recipe.vocab_size,
    )
    sha256 = use_template(tokenizer, "janus").probe_sha256()
    torch.manual_seed(recipe.seed)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=recipe.num_heads,
            num_key_value_heads=recipe.num_kv_heads,
            max_position_embeddings=recipe.max_position_embeddings,
            initializer_range=recipe.initializer_range,
            # Mistral-7B-v0.2 has no sliding window; the configuration's default would add one.
            sliding_window=None,
            # Mistral does not tie them.
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    folder.begin({"collection": Ref.of(recipe.collection)})
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_template_record(temporary, sha256)
        upload_folder(Path(temporary), folder.path)
    parameters = model.num_parameters()
    print(f"miniature: untrained Mistral, {parameters:,} parameters, vocabulary {len(tokenizer)} -> {folder.path}")
    return folder.finish(counts={"parameters": parameters}, template_sha256=sha256)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer with the special tokens of the chat template, as a Hugging Face fast tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*_SPECIAL_TOKENS.values(), *_TEMPLATE_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    # Through a file, because transformers then keeps the tokenizer exactly as it was trained.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        bpe.save(str(path))
        return PreTrainedTokenizerFast(tokenizer_file=str(path), clean_up_tokenization_spaces=False, **_SPECIAL_TOKENS)
