"""The whole collection with its requests sent from this process instead of Ray actors, against a loopback teacher."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext

import pytest

from janus_ray.data import collect as module
from janus_ray.data.collect import collect
from janus_ray.data.recipe import CollectRecipe
from janus_ray.miniature import teacher as miniature_teacher
from janus_ray.miniature.world import instructions
from janus_ray.records import COLLECTION
from janus_ray.store.files import write_jsonl
from janus_ray.store.tables import read_parquet
from tests.loopback import Reply, chat_reply, loopback

ROWS = COLLECTION.names


@pytest.fixture
def asked(monkeypatch):
    """The prompts of the instructions that a process was asked about."""
    prompts = []

    def fan_out(items, process, arguments, target, ledger, num_actors):
        async def answer(some):
            client = process(target.model_dump(mode="json"), str(ledger), target.max_concurrency, *arguments)
            answers = await client.answer(some)
            await client.close()
            return answers.results

        for item in items:
            prompts.append(item.prompt)
            yield [item], asyncio.run(answer([item]))

    monkeypatch.setattr(module, "ray_cluster", lambda *arguments, **keywords: nullcontext())
    monkeypatch.setattr(module, "fan_out", fan_out)
    return prompts


def test_a_resume_asks_only_about_what_is_not_whole_and_keeps_the_rest(tmp_path, asked, capsys):
    broken = {"prompts": {row["instruction"] for row in instructions()[1:5:3]}}

    def answer(n, body):
        messages = body["messages"]
        if messages[0]["role"] == "system" and messages[1]["content"] in broken["prompts"] and n % 2:
            return Reply({"error": {"message": "not today"}}, 400)
        return chat_reply(miniature_teacher.answer(messages, body["seed"]))

    listed = Reply({"data": [{"id": "m", "weights_id": "first"}]})
    with loopback(answer, models=listed) as server:
        write_jsonl(tmp_path / "in.jsonl", instructions()[:6])
        recipe = CollectRecipe.model_validate(
            {
                "sources": [{"path": str(tmp_path / "in.jsonl"), "source_column": "family"}],
                "output_dir": str(tmp_path / "out"),
                "teacher": {"base_url": server.url, "model": "m"},
                "rows_per_file": 4,
            }
        )
        first = collect(recipe, "fail")["counts"]
        assert first["rows_ok"] + first["rows_failed"] == 18
        failed = [row for row in rows_in(tmp_path) if row["status"] == "error"]
        assert {row["prompt"] for row in failed} <= broken["prompts"]
        assert failed
        broken["prompts"] = set()
        asked.clear()
        second = collect(recipe, "resume")["counts"]
        assert sorted(asked) == sorted({row["prompt"] for row in failed})
        assert (second["rows_ok"], second["rows_failed"], second["requests_sent"]) == (18, 0, len(failed))
        assert second["completion_tokens"] == first["completion_tokens"] + 2 * len(failed)
        whole = rows_in(tmp_path)
        assert len({row["row_id"] for row in whole}) == 18
        # Killed before the manifest: nobody is asked about anything.
        (tmp_path / "out" / "manifest.json").unlink()
        asked.clear()
        third = collect(recipe, "resume")["counts"]
        assert (asked, third["requests_sent"], third["rows_ok"]) == ([], 0, 18)
        assert "collect: 18 of 18 rows are there" in capsys.readouterr().out
        assert rows_in(tmp_path) == whole


def rows_in(folder):
    order = [("prompt_id", "ascending"), ("set_index", "ascending")]
    return read_parquet(folder / "out").sort_by(order).select(ROWS).to_pylist()
