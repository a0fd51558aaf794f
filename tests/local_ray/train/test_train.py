"""FSDP2 under Ray Train for real: the number of workers, a killed worker, a killed driver, the exported model."""

from __future__ import annotations

import os
import shutil
import signal
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
from janus_ray.train import run as run_module
from janus_ray.train.checkpoint import newest_healthy
from janus_ray.train.context import LocalWorkers
from janus_ray.train.loop import train_loop
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
def killed(tmp_path_factory, recipe_for):
    """A run with two workers, whose rank 0 is killed as soon as there is a checkpoint: its folder, and that process."""
    folder, pids = tmp_path_factory.mktemp("killed") / "out", []

    class Killing(run_module.StepLines):
        def __call__(self, record):
            super().__call__(record)
            if not pids and newest_healthy(folder)[0] is not None:
                pids.append(record["worker_pid"])
                os.kill(pids[0], signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_module, "ray_cluster", lambda *arguments, **keywords: nullcontext())
        patched.setattr(run_module, "StepLines", Killing)
        train(recipe_for(folder), "fail")
    assert pids
    return folder, pids[0]


def test_training_learns_and_leaves_a_model_that_can_be_served(killed):
    folder, _ = killed
    losses = curve(folder)
    manifest = read_manifest(folder)
    assert sorted(losses) == list(range(1, manifest["counts"]["steps"] + 1))
    assert losses[max(losses)] < 0.25 * losses[1]
    assert manifest["template_sha256"] == check_model_folder(folder / "model")
    assert manifest["counts"]["rows"] == 60
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.generation_config.eos_token_id == model.config.eos_token_id
    encoder = load_encoder(folder / "model")
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
    record = read_jsonl(folder / "metrics.jsonl")[0]
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_s", "mfu", "padding_share"} <= record.keys()


def test_a_killed_worker_resumes_from_the_checkpoint(killed, recipe_for, inputs, tmp_path):
    folder, pid = killed
    assert not psutil.pid_exists(pid)
    rows = read_jsonl(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    resumed = [row["step"] for row in rows if row["worker_pid"] != pid]
    # Not from the start: from the last checkpoint before the kill, a multiple of 8.
    assert min(resumed) % 8 == 1
    assert min(resumed) > 8
    # The same run without Ray, by one worker that nobody kills.
    alone = shutil.copytree(folder, tmp_path / "out", ignore=shutil.ignore_patterns("checkpoints", "metrics*", "model"))
    recipe = recipe_for(alone, bins_per_micro_batch=3)
    LocalWorkers().run(1, train_loop, recipe, alone, {}, None)
    ours, theirs = curve(folder), curve(alone)
    assert ours.keys() == theirs.keys()
    for step in range(1, 11):
        assert ours[step] == pytest.approx(theirs[step], rel=2e-3), step
    assert ours[max(ours)] == pytest.approx(theirs[max(theirs)], rel=0.15, abs=0.02)


def test_a_run_that_gave_up_is_resumed_by_its_recipe(recipe_for, inputs, tmp_path, capsys, monkeypatch):
    """An export that fails ends the run; the resume goes on from what is whole, wherever the folders lie by then."""
    recipe = recipe_for(tmp_path / "out", max_failures=0, epochs=2, num_workers=1, checkpoint_every_steps=2)

    class InTheWay(run_module.StepLines):
        def __call__(self, record):
            # A file where the model's folder must be written.
            (tmp_path / "out" / ".model.partial").write_text("in the way")

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "StepLines", InTheWay)
        with pytest.raises(CheckpointError, match=r"out/model cannot be written: File exists \(\.model\.partial\)"):
            train(recipe, "fail")
    (tmp_path / "out" / ".model.partial").unlink()
    before = curve(tmp_path / "out")
    moved = shutil.copytree(tmp_path / "out", tmp_path / "bigger disk" / "out")
    elsewhere = shutil.copytree(inputs["collection"], tmp_path / "rows")
    [part] = (moved / "checkpoints" / "checkpoint_00000006").rglob("__0_0.distcp")
    for file in (part, moved / "documents" / "shard-00000.tokens"):
        file.write_bytes(file.read_bytes()[:1000])
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
    write_collection(elsewhere, 61)
    with pytest.raises(ConfigError, match="was made from other inputs"):
        train(recipe_for(moved, epochs=2, collection=str(elsewhere)), "resume")


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
