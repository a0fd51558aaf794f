"""One small model behind the real gateway, Ray Serve and vLLM, for all tests of this folder."""

from __future__ import annotations

import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from janus_ray import chat
from janus_ray.config import validate
from janus_ray.model_folder import write_template_record
from janus_ray.serve.ingress import base_url
from janus_ray.serve.launch import deployed
from janus_ray.serve.recipe import ServeRecipe

MODEL = "tiny/model-1.0"


def model_handle() -> Any:
    """The replicas of the running endpoint, without the gateway before them."""
    from ray import serve

    from janus_ray.serve.app import APP_NAME

    return serve.get_deployment_handle("model:tiny--model-1_0", APP_NAME)


def unfinished() -> int:
    """Requests that the engine of the running endpoint has in its list."""
    return model_handle().counts.remote().result()["unfinished"]


@dataclass
class Served:
    """A running endpoint, and what /health answered while it started."""

    recipe: ServeRecipe
    url: str
    health_while_starting: list[int]


def write_tiny_model(folder: Path) -> Path:
    """A random 2-layer Mistral with a byte-level tokenizer and our chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "[INST]", "[/INST]"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(["What do you value? I value short answers."] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    sha256 = chat.use_template(tokenizer, "janus").probe_sha256()
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        sliding_window=None,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    MistralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_template_record(folder, sha256)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def recipe_for(folder: Path, port: int) -> ServeRecipe:
    model = {
        "model_id": MODEL,
        "path": str(folder),
        "max_model_len": 1024,
        "kv_cache_gib": 0.1,
        "max_num_seqs": 2,
        "max_ongoing_requests": 2,
        "target_ongoing_requests": 2,
        "max_queued_requests": 1,
        "drain_timeout_s": 5,
    }
    values = {"models": [model], "port": port, "retry_after_s": 3, "start_timeout_s": 240, "max_tokens": 900}
    return validate(ServeRecipe, values, "test")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def served(tiny_model: Path, shared_ray_cluster: None) -> Iterator[Served]:
    from ray import serve

    recipe = recipe_for(tiny_model, free_port())
    statuses: list[int] = []
    stop = threading.Event()
    watcher = threading.Thread(
        target=_watch_health, args=[base_url(recipe.host, recipe.port), statuses, stop], daemon=True
    )
    watcher.start()
    try:
        with deployed(recipe, threading.Event(), time.monotonic()) as url:
            stop.set()
            watcher.join()
            yield Served(recipe, url, statuses)
    finally:
        stop.set()
        serve.shutdown()


def _watch_health(url: str, statuses: list[int], stop: threading.Event) -> None:
    while not stop.wait(0.2):
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                statuses.append(answer.status)
        except urllib.error.HTTPError as error:
            statuses.append(error.code)
        except OSError:
            pass
