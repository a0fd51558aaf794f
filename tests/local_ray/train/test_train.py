"""FSDP2 under Ray Train for real: the number of workers, a killed worker, a killed driver, the exported model."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import nullcontext

import psutil
import pytest
import torch

from janus_ray.chat import conversation
from janus_ray.errors import CheckpointError, ConfigError
from janus_ray.model_folder import check_model_folder, load_encoder
from janus_ray.store.folder import read_manifest
from janus_ray.store.tables import read_jsonl
from janus_ray.train import run as run_module
from janus_ray.train.recipe import TrainRecipe
from janus_ray.train.run import train
from tests.tiny import texts, write_collection, write_model


@pytest.fixture(autouse=True)
def in_the_shared_cluster(monkeypatch):
    monkeypatch.setattr(run_module, "ray_cluster", lambda *arguments, **keywords: nullcontext())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return {"base_model": str(write_model(folder / "base")), "collection": str(write_collection(folder / "rows", 60))}


@pytest.fixture(scope="module")
def recipe_for(inputs):
    def make(output_dir, **changes):
        settings = {
            "max_length": 128,
            "bins_per_step": 5,
            "bins_per_micro_batch": 2,
            "epochs": 24,
            "learning_rate": 1e-2,
            "warmup_steps": 3,
            "precision": "fp32",
            "activation_checkpointing": False,
            "checkpoint_every_steps": 8,
            "log_every_steps": 1,
            "export_dtype": "float32",
            **inputs,
            **changes,
        }
        return TrainRecipe(output_dir=str(output_dir), **settings)

    return make


def curve(folder):
    return {row["step"]: row["loss"] for row in read_jsonl(folder / "metrics.jsonl")}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, recipe_for):
    """One run with two workers that the others are compared with."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    original = run_module.ray_cluster
    run_module.ray_cluster = lambda *arguments, **keywords: nullcontext()
    try:
        train(recipe_for(folder), "fail")
    finally:
        run_module.ray_cluster = original
    return folder


def test_training_learns_and_leaves_a_model_that_can_be_served(uninterrupted):
    losses = curve(uninterrupted)
    manifest = read_manifest(uninterrupted)
    assert sorted(losses) == list(range(1, manifest["counts"]["steps"] + 1))
    assert losses[max(losses)] < 0.25 * losses[1]
    assert manifest["template_sha256"] == check_model_folder(uninterrupted / "model")
    assert manifest["counts"]["rows"] == 60
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(uninterrupted / "model")
    assert model.generation_config.eos_token_id == model.config.eos_token_id
    encoder = load_encoder(uninterrupted / "model")
    tokenizer = encoder.tokenizer
    # Plain transformers on the exported folder finds the loss at which training ended.
    nats, supervised = 0.0, 0
    for text in texts(60):
        example = encoder.encode_example(conversation(text["system"], text["prompt"]), text["output"])
        labels = torch.tensor([example.input_ids]).masked_fill(~torch.tensor([example.loss_mask]), -100)
        nats += model(input_ids=torch.tensor([example.input_ids]), labels=labels).loss.item() * sum(example.loss_mask)
        supervised += sum(example.loss_mask)
    last_epoch = [losses[step] for step in sorted(losses)[-3:]]
    assert nats / supervised == pytest.approx(sum(last_epoch) / 3, rel=0.1)
    ids = torch.tensor([encoder.encode_prompt(conversation(None, "How do I start with number 6?"))])
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=False)
    assert tokenizer.decode(generated[0, ids.shape[1] :]) in {f"{text['output']}</s>" for text in texts(60)}
    record = read_jsonl(uninterrupted / "metrics.jsonl")[0]
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_s", "mfu", "padding_share"} <= record.keys()


def test_one_worker_computes_what_two_compute(uninterrupted, recipe_for, tmp_path):
    train(recipe_for(tmp_path / "out", num_workers=1, bins_per_micro_batch=3), "fail")
    ours, theirs = curve(tmp_path / "out"), curve(uninterrupted)
    assert ours.keys() == theirs.keys()
    # The order of summation differs, and training amplifies that; the first steps must agree to many digits.
    for step in range(1, 11):
        assert ours[step] == pytest.approx(theirs[step], rel=2e-3), step
    assert ours[max(ours)] == pytest.approx(theirs[max(theirs)], rel=0.15, abs=0.02)


def test_a_killed_worker_resumes_from_the_checkpoint(uninterrupted, recipe_for, tmp_path):
    killed = []

    def kill_a_worker():
        """Kills rank 0 as soon as there is a checkpoint."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if any((tmp_path / "out" / "checkpoints").glob("checkpoint_*")):
                last = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1]
                killed.append(json.loads(last)["worker_pid"])
                os.kill(killed[0], signal.SIGKILL)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=kill_a_worker)
    thread.start()
    train(recipe_for(tmp_path / "out"), "fail")
    thread.join()
    assert killed
    assert not psutil.pid_exists(killed[0])
    rows = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    resumed = [row["step"] for row in rows if row["worker_pid"] != killed[0]]
    # Not from the start: from the last checkpoint before the kill, a multiple of 8.
    assert min(resumed) % 8 == 1
    assert min(resumed) > 8
    ours, theirs = curve(tmp_path / "out"), curve(uninterrupted)
    assert ours.keys() == theirs.keys()
    assert ours[max(ours)] == pytest.approx(theirs[max(theirs)], rel=1e-3)


def test_a_run_that_gave_up_is_resumed_by_its_recipe(recipe_for, tmp_path):
    """An export that fails ends the run; the resume trains no step again and finishes the folder."""
    recipe = recipe_for(tmp_path / "out", max_failures=0, epochs=2, num_workers=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.json").write_text(recipe.model_dump_json())
    # A file where the model's folder must be written.
    (tmp_path / "out" / ".model.partial").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"out/model cannot be written: File exists \(\.model\.partial\)"):
        train(recipe, "resume")
    (tmp_path / "out" / ".model.partial").unlink()
    before = (tmp_path / "out" / "metrics.jsonl").read_text()
    train(recipe, "resume")
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == before
    assert read_manifest(tmp_path / "out")["counts"]["steps"] == len(before.splitlines())
    with pytest.raises(ConfigError, match="another recipe"):
        train(recipe_for(tmp_path / "out", epochs=1), "resume")
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "packed" / "inputs.json").write_text('{"collection": "other"}')
    with pytest.raises(ConfigError, match="belongs to other data"):
        train(recipe, "resume")
