"""An evaluation when the ledger knows every answer: the whole way of a judgment but for the wire.

Every prompt is asked by three people under four rubrics each, so it has 4 responses and 48 judgments, which pass
through two client processes; then come the rows, the aggregate and the report. "aggregate_s" and "report_s" are those
two again, by themselves, from the rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parts._answered import MODEL, endpoint

from janus_ray.eval.aggregate import aggregate
from janus_ray.eval.bench import load_bench, siblings
from janus_ray.eval.benchmarks import multifaceted
from janus_ray.eval.recipe import HEADLINE, EvaluateRecipe
from janus_ray.eval.report import write_report
from janus_ray.eval.results import Results
from janus_ray.eval.rows import read_back
from janus_ray.eval.samples import collected_samples
from janus_ray.llm.endpoint import Endpoint
from janus_ray.llm.ledger import Ledger
from janus_ray.llm.request import Completion, LLMRequest, Usage
from janus_ray.records import DIMENSIONS
from janus_ray.store.files import read_json, write_jsonl
from janus_ray.store.folder import UNKNOWN, Ref, RunFolder

UNIT = "judgments"
SIZES = (9_600, 38_400)
TARGET = 200_000
_PEOPLE = 3
_PER_PROMPT = 48
_RESPONSE = "A response for person {} to prompt {}, of the length that responses have. " + "word " * 300
_FEEDBACK = "Feedback: what the judge thinks of it, in three or four sentences. " + "So and so. " * 30 + "[RESULT] {}"
_RUBRIC = "Criterion {} of person {}, as long as criteria are. " + "word " * 20
_LEVEL = "What a response of score {} does, in one sentence or in two. " + "word " * 12


def make(size: int, folder: Path) -> None:
    """Writes the bench, and a ledger with the answers to all requests about it."""
    write_jsonl(folder / "bench.jsonl", _bench(size // _PER_PROMPT))
    with endpoint(folder) as url:
        recipe = _recipe(folder, url)
    items = load_bench(recipe.bench)
    policy = recipe.policy.model_copy(update={"model": MODEL})
    responses, judgments = (Ledger(folder / "ledger" / name) for name in ("policy", "judge"))
    grouped = siblings(items)
    for condition, item in multifaceted.responses_due(recipe.models[0], items, grouped):
        response = _RESPONSE.format(item.system if condition == HEADLINE else "none", item.prompt)
        _record(responses, policy, multifaceted.response_request(recipe, condition, item), response)
        written_for = item.item_id if condition == HEADLINE else None
        for judged_for, rubric in multifaceted.judges_for(recipe, written_for, grouped[item.prompt_id]):
            request = multifaceted.judge_request(recipe, judged_for, rubric, response.strip())
            found = 5 if judged_for.item_id == written_for else 1 + (rubric + len(written_for or "")) % 3
            _record(judgments, recipe.judge, request, _FEEDBACK.format(found))
    responses.close()
    judgments.close()


def measure(size: int, folder: Path) -> dict[str, Any]:
    """Evaluates."""
    from janus_ray.eval.run import evaluate

    with endpoint(folder) as url:
        recipe = _recipe(folder, url)
        refs = {"bench": Ref.of(recipe.bench), "policy m": Ref(MODEL, UNKNOWN), "judge": Ref(MODEL, UNKNOWN)}
        RunFolder(recipe.output_dir, recipe, "fail").begin(refs)
        (folder / "ledger").rename(folder / "out" / "ledger")
        began = time.monotonic()
        results = evaluate(recipe, "resume")
        wall_s = time.monotonic() - began
    judged = sum(results.status_counts["judgments"]["m"].values())
    assert judged == size // _PER_PROMPT * _PER_PROMPT, judged
    assert results.headline.overall.coverage == 1.0
    again = dict(_again(recipe, results, folder / "out"))
    return {"judgments": judged, **again, "wall_s": wall_s}


def _again(recipe: EvaluateRecipe, results: Results, out: Path) -> Iterator[tuple[str, float]]:
    """The steps after the last answer, by themselves."""
    began = time.monotonic()
    rows = [read_back(out / name) for name in ("judgments.jsonl", "generations.jsonl")]
    same = aggregate(*rows, models=["m"], main_model="m", threshold=0.98, protocol=results.protocol)
    assert same.as_json() == read_json(out / "results.json")
    yield "aggregate_s", time.monotonic() - began
    began = time.monotonic()
    rows = [read_back(out / name) for name in ("generations.jsonl", "judgments.jsonl")]
    samples = collected_samples("m", load_bench(recipe.bench), *rows, number=12)
    write_report(out / "again.html", same, samples)
    yield "report_s", time.monotonic() - began


def _record(ledger: Ledger, target: Endpoint, request: LLMRequest, text: str) -> None:
    outcome = Completion("ok", text=text, finish_reason="stop", attempts=1, usage=Usage(900, 300), sent=1)
    ledger.record(request.key(target.model, target.identity), outcome)


def _recipe(folder: Path, url: str) -> EvaluateRecipe:
    return EvaluateRecipe.model_validate(
        {
            "bench": str(folder / "bench.jsonl"),
            "output_dir": str(folder / "out"),
            "main_model": "m",
            "models": [{"name": "m", "model": MODEL}],
            "policy": {"base_url": url, "max_concurrency": 64},
            "judge": {"base_url": url, "model": MODEL, "max_concurrency": 64},
            "ray": {"logical_cpus": 3, "object_store_gib": 0.3},
        }
    )


def _bench(prompts: int) -> Iterator[dict[str, Any]]:
    for number in range(prompts):
        for person in range(_PEOPLE):
            system = f"{person} of prompt {number}. " + "What this person values, in a system message. " * 8
            yield {
                "source": "scale",
                "split": ("seen", "unseen")[number % 2],
                "prompt": f"Prompt {number}, and what else a prompt has. " + "word " * 40,
                "system": system,
                "reference_answer": "The reference answer. " + "word " * 200,
                "preference_set": [
                    {"dimension": name, "subdimension": "s", "preference": "p", "description": _RUBRIC.format(0, name)}
                    for name in DIMENSIONS
                ],
                "rubrics": [
                    {
                        "criteria": _RUBRIC.format(name, person),
                        "score_descriptions": {str(score): _LEVEL.format(score) for score in range(1, 6)},
                    }
                    for name in DIMENSIONS
                ],
            }
