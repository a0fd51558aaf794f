"""A pre-trained model, from its published weights to answers over HTTP, and in the roles of teacher and judge."""

from __future__ import annotations

import json
from typing import Literal

import pytest
from openai import OpenAI
from pydantic import BaseModel

from janus_ray.llm.client import ChatClient
from janus_ray.llm.endpoint import Endpoint
from janus_ray.llm.ledger import Ledger
from janus_ray.llm.request import LLMRequest, Sampling
from janus_ray.llm.structured import complete_structured
from janus_ray.records import DIMENSIONS
from janus_ray.store.files import read_json
from janus_ray.store.folder import read_manifest
from janus_ray.store.tables import read_jsonl, read_parquet
from tests.real.conftest import MODEL_ID, ROWS, run_job

pytestmark = pytest.mark.timeout(900)

HURRIED = [
    {"role": "system", "content": "The reader is in a hurry: one sentence, no greeting."},
    {"role": "user", "content": "Why is the sky blue?"},
]


def test_fine_tuning_makes_the_rows_more_likely(tuned):
    import torch

    before, after = (mean_nll(folder, torch.float32) for folder in (tuned.base, tuned.folder))
    assert after < 0.9 * before
    curve = read_jsonl(tuned.folder.parent / "metrics.jsonl")
    # The first step's loss is that of the published weights: a wrong template or mask would show here. The bins of a
    # step are a part of the rows, hence the width.
    assert curve[0]["loss"] == pytest.approx(before, rel=0.25)
    assert read_manifest(tuned.folder.parent)["counts"]["rows"] == len(read_jsonl(ROWS))


def mean_nll(folder, dtype) -> float:
    """Nats per token of the answers, by plain transformers and the model's own template, one row at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    total, tokens = 0.0, 0
    for row in read_jsonl(ROWS):
        system = [{"role": "system", "content": row["system"]}] if row["system"] else []
        prompt = [*system, {"role": "user", "content": row["prompt"]}]
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(start + row["output"] + "<|im_end|>", add_special_tokens=False, return_tensors="pt").input_ids
        first = len(tokenizer(start, add_special_tokens=False).input_ids)
        with torch.no_grad():
            logprobs = model(ids).logits[0, first - 1 : -1].log_softmax(-1)
        total -= float(logprobs.gather(1, ids[0, first:, None]).sum())
        tokens += len(ids[0]) - first
    return total / tokens


def test_the_openai_client_gets_what_plain_transformers_would_say(tuned, server):
    client = OpenAI(base_url=server, api_key="none")
    asked = {"model": MODEL_ID, "messages": HURRIED, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    parts = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(parts) == whole == greedy(tuned.folder, 12)


def greedy(folder, new_tokens: int) -> str:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(HURRIED, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**ids, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


class Mood(BaseModel):
    """A small answer: the engine's grammar leaves no room for a long one."""

    word: Literal["calm", "wild", "grey"]
    deep: bool


async def test_the_engine_decodes_a_schema(server, tmp_path):
    client = ChatClient(Endpoint(base_url=server, model=MODEL_ID, timeout_s=300), Ledger(tmp_path))
    request = LLMRequest(
        stage="mood",
        messages=({"role": "user", "content": "How is the sea today?"},),
        sampling=Sampling(temperature=0, max_tokens=40),
    )
    answer, outcome = await complete_structured(client, request, Mood, max_reasks=0)
    # Nothing but the grammar keeps a model of this size to the schema.
    assert isinstance(answer, Mood) and outcome.status == "ok" and outcome.sent == 1


def test_as_a_teacher_each_of_its_rows_is_valid_or_a_counted_failure(server, tmp_path):
    instructions = [{"instruction": "Why is the sky blue?"}]
    (tmp_path / "instructions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in instructions))
    recipe = f"""
        output_dir = "{tmp_path / "collection"}"
        sources = [{{ path = "{tmp_path / "instructions.jsonl"}" }}]
        teacher = {{ base_url = "{server}", model = "{MODEL_ID}", max_concurrency = 2, timeout_s = 300 }}
        sampling = {{ temperature = 0, max_tokens_preferences = 80, max_tokens_system = 24, max_tokens_response = 24 }}
        num_sets = 1
        max_reasks = 0
        ray = {{ logical_cpus = 4, object_store_gib = 0.25 }}
    """
    finished = run_job("collect", recipe, tmp_path)
    rows = read_parquet(tmp_path / "collection").to_pylist()
    assert len(rows) == 1, finished.stdout + finished.stderr
    # A model of this size seldom ends a text of its own within the room: then nothing may look finished.
    good = [row for row in rows if row["status"] == "ok"]
    assert finished.returncode == (0 if good else 2), finished.stdout + finished.stderr
    if not good:
        assert f"all {len(rows)} rows failed, the first with: {rows[0]['error_message']}" in finished.stderr
        assert not (tmp_path / "collection" / "manifest.json").exists()
    for row in rows:
        if row["status"] == "ok":
            assert [value["dimension"] for value in row["preference_set"]] == list(DIMENSIONS)
            assert all(value["description"].strip() for value in row["preference_set"])
            assert row["system"].strip() and row["output"].strip() and "<|" not in row["system"] + row["output"]
        else:
            assert row["error_kind"] == "truncated" and not row["output"] and row["completion_tokens"] > 0


def test_as_a_judge_each_of_its_verdicts_is_a_score_or_a_counted_failure(server, tmp_path):
    preference = {"dimension": "style", "subdimension": "length", "preference": "brief", "description": "Be brief."}
    rubric = {"criteria": "Is it brief?", "score_descriptions": {str(n): f"brief to degree {n}" for n in range(1, 6)}}
    item = {
        "source": "real",
        "preference_set": [preference],
        "system": "Be brief.",
        "prompt": "Why is the sky blue?",
        "reference_answer": "Air scatters blue light most.",
        "rubrics": [rubric],
    }
    (tmp_path / "bench.jsonl").write_text(json.dumps(item) + "\n")
    recipe = f"""
        bench = "{tmp_path / "bench.jsonl"}"
        output_dir = "{tmp_path / "report"}"
        main_model = "{MODEL_ID}"
        models = [{{ name = "{MODEL_ID}", model = "{MODEL_ID}" }}]
        policy = {{ base_url = "{server}", timeout_s = 300 }}
        judge = {{ base_url = "{server}", model = "{MODEL_ID}", timeout_s = 300 }}
        generation = {{ temperature = 0, max_tokens = 24 }}
        judging = {{ max_tokens = 32 }}
        ray = {{ logical_cpus = 4, object_store_gib = 0.25 }}
    """
    finished = run_job("evaluate", recipe, tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    judgments = read_jsonl(tmp_path / "report" / "judgments.jsonl")
    assert len(judgments) == 2  # with the person's system message, and without
    assert all(row["score"] in (None, 1, 2, 3, 4, 5) for row in judgments)
    results = read_json(tmp_path / "report" / "results.json")
    overall = results["models"][MODEL_ID]["own_system"]["overall"]
    scored = sum(row["score"] is not None for row in judgments if row["condition"] == "own_system")
    assert overall["coverage"] == scored / 1
    assert (overall["mean"] is None) == (scored == 0)
