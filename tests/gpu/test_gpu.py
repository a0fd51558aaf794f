"""What only an NVIDIA GPU can show: the variable-length kernel, NCCL with bfloat16 under Ray Train, vLLM on CUDA."""

from __future__ import annotations

import math
import threading
import time

import openai
import pytest
import torch

from janus_ray.cluster import ray_cluster
from janus_ray.config import RayConfig
from janus_ray.serve.launch import deployed
from janus_ray.serve.recipe import ServeRecipe
from janus_ray.store.tables import read_jsonl
from janus_ray.train.attention import document_attention
from janus_ray.train.recipe import TrainRecipe
from janus_ray.train.run import train
from tests.local_ray.serve.conftest import free_port
from tests.tiny import write_collection, write_model


@pytest.mark.parametrize("window", [None, 1, 7, 64])
def test_the_gpu_kernel_computes_what_the_cpu_computes_document_by_document(window):
    torch.manual_seed(0)
    ends = torch.tensor([0, 5, 69, 128], dtype=torch.int32)
    inputs = [torch.randn(1, heads, 128, 64) for heads in (8, 2, 2)]
    on_gpu = [tensor.to("cuda", torch.bfloat16).requires_grad_() for tensor in inputs]
    options = {"scaling": 0.125, "sliding_window": window, "longest_document": 64}
    on_cpu = [tensor.detach().float().cpu().requires_grad_() for tensor in on_gpu]
    expected, _ = document_attention(None, *on_cpu, None, document_ends_N=ends, **options)
    ours, _ = document_attention(None, *on_gpu, None, document_ends_N=ends.to("cuda"), **options)
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours.float().cpu(), expected, rtol=3e-2, atol=3e-2)
    expected.square().sum().backward()
    ours.float().square().sum().backward()
    for left, right in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(left.grad.float().cpu(), right.grad, rtol=6e-2, atol=6e-2)


@pytest.mark.timeout(600)
def test_training_on_a_gpu_follows_the_curve_of_the_cpu(tmp_path):
    # Heads of 32 or more, which the kernel asks for.
    base = write_model(tmp_path / "base", hidden_size=128)
    collection = write_collection(tmp_path / "rows", 60)
    curves = {}
    for device in ("cpu", "gpu"):
        recipe = TrainRecipe(
            collection=str(collection),
            base_model=str(base),
            output_dir=str(tmp_path / device),
            max_length=128,
            bins_per_step=5,
            epochs=3,
            learning_rate=1e-3,
            log_every_steps=1,
            num_workers=1,
            use_gpu=device == "gpu",
            precision="bf16" if device == "gpu" else "fp32",
            ray=RayConfig(logical_cpus=4),
        )
        train(recipe, "fail")
        curves[device] = read_jsonl(tmp_path / device / "metrics.jsonl")
    assert [row["step"] for row in curves["gpu"]] == [row["step"] for row in curves["cpu"]]
    for ours, theirs in zip(curves["gpu"], curves["cpu"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05), ours["step"]
    assert curves["gpu"][-1]["mfu"] is None or 0 < curves["gpu"][-1]["mfu"] < 1
    assert math.isfinite(curves["gpu"][-1]["grad_norm"])


@pytest.mark.timeout(600)
def test_a_model_is_served_from_a_gpu(tmp_path):
    from ray import serve

    base = write_model(tmp_path / "base", hidden_size=128)
    model = {"model_id": "m", "path": str(base), "max_model_len": 256, "num_gpus": 1, "gpu_memory_utilization": 0.2}
    recipe = ServeRecipe.model_validate({"models": [model], "port": free_port(), "start_timeout_s": 500})
    with ray_cluster(RayConfig(logical_cpus=8), 3, "the test", needed_gpus=1):
        with deployed(recipe, threading.Event(), time.monotonic()):
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{recipe.port}/v1", api_key="none")
            answer = client.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": "How do I start?"}],
                max_tokens=8,
                extra_body={"ignore_eos": True, "janus": {"preferences": ["Be brief."]}},
            )
        serve.shutdown()
    assert answer.usage.completion_tokens == 8
