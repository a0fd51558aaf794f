"""FSDP2 under Ray Train for real: the number of workers, a killed worker, a killed driver, the exported model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from contextlib import nullcontext

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from janus_ray.chat import conversation
from janus_ray.errors import CheckpointError, ConfigError, DataError, TrainingError
from janus_ray.model_folder import check_model_folder, load_encoder
from janus_ray.store.folder import read_manifest
from janus_ray.store.tables import read_jsonl
from janus_ray.train import launch as launch_module
from janus_ray.train import run as run_module
from janus_ray.train.recipe import TrainRecipe
from janus_ray.train.run import train
from tests.tiny import texts, write_collection, write_model


@pytest.fixture(autouse=True)
def in_the_shared_cluster(monkeypatch):
    monkeypatch.setattr(run_module, "ray_cluster", lambda *arguments, **keywords: nullcontext())


# What is hard in one small model: tied embeddings, a window shorter than a document, soft caps, a scaled embedding.
GEMMA = {"head_dim": 12, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    base = write_model(folder / "base", kind="gemma2", special=GEMMA)
    return {"base_model": str(base), "collection": str(write_collection(folder / "rows", 60))}


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


def test_a_run_that_gave_up_is_resumed_by_its_recipe(recipe_for, inputs, tmp_path, capsys):
    """An export that fails ends the run; the resume goes on from what is whole, wherever the folders lie by then."""
    recipe = recipe_for(tmp_path / "out", max_failures=0, epochs=2, num_workers=1, checkpoint_every_steps=2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.json").write_text(recipe.model_dump_json())
    # A file where the model's folder must be written.
    (tmp_path / "out" / ".model.partial").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"out/model cannot be written: File exists \(\.model\.partial\)"):
        train(recipe, "resume")
    (tmp_path / "out" / ".model.partial").unlink()
    before = curve(tmp_path / "out")
    moved = shutil.copytree(tmp_path / "out", tmp_path / "bigger disk" / "out")
    elsewhere = shutil.copytree(inputs["collection"], tmp_path / "rows")
    for file in ("checkpoints/checkpoint_00000006/__0_0.distcp", "documents/shard-00000.tokens"):
        (moved / file).write_bytes((moved / file).read_bytes()[:1000])
    capsys.readouterr()
    train(recipe_for(moved, epochs=2, num_workers=1, collection=str(elsewhere)), "resume")
    shown = capsys.readouterr().out
    assert "documents is damaged and is made again" in shown
    assert "damaged checkpoint passed over: " in shown
    assert "going on after step 4" in shown
    assert curve(moved) == pytest.approx(before, rel=1e-4)
    manifest = read_manifest(moved)
    assert manifest["counts"]["steps"] == 6
    assert manifest["counts"]["final_loss"] == curve(moved)[6]
    with pytest.raises(ConfigError, match="another recipe"):
        train(recipe_for(moved, epochs=1), "resume")
    (moved / "manifest.json").unlink()
    (moved / "documents" / "inputs.json").write_text('{"collection": "other"}')
    with pytest.raises(ConfigError, match="was made from other inputs"):
        train(recipe_for(moved, epochs=2), "resume")


def test_a_value_that_is_not_finite_ends_the_run_at_once(recipe_for, inputs, tmp_path, monkeypatch):
    """All workers agree on it, nothing is tried again and nothing is left that looks like a model."""
    from safetensors.torch import load_file, save_file

    spoilt = shutil.copytree(inputs["base_model"], tmp_path / "base")
    weights = load_file(spoilt / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, spoilt / "model.safetensors", metadata={"format": "pt"})
    starts = []
    start = launch_module._start_workers
    monkeypatch.setattr(launch_module, "_start_workers", lambda *given: starts.append(given) or start(*given))
    with pytest.raises(TrainingError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds values that are not finite"):
        train(recipe_for(tmp_path / "out", base_model=str(spoilt)), "fail")
    assert len(starts) == 1
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not (tmp_path / "out" / "model").exists()


def test_what_can_be_refused_is_refused_before_ray_and_the_folder(recipe_for, inputs, tmp_path, monkeypatch):
    def never(*arguments, **keywords):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(run_module, "ray_cluster", never)
    lists = pa.table({"system": ["s"], "prompt": [["turn 1", "turn 2"]], "output": ["o"]})
    pq.write_table(lists, tmp_path / "lists.parquet")
    for changes, error, said in (
        ({"collection": str(tmp_path / "lists.parquet")}, DataError, "row 1: prompt is a list, expected text"),
        ({"collection": str(tmp_path / "none")}, DataError, "no such file or folder"),
        ({"base_model": str(tmp_path / "none")}, CheckpointError, "no such folder"),
        ({"base_model": inputs["collection"]}, CheckpointError, "base model"),
        ({"max_length": 4096}, CheckpointError, "512 positions"),
        ({"learning_rate": 1e30}, TrainingError, "learning_rate = 1e\\+30: stopped before step 1"),
    ):
        with pytest.raises(error, match=said):
            train(recipe_for(tmp_path / "out", **changes), "fail")
        assert not (tmp_path / "out").exists()
