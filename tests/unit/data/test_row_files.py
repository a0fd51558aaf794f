"""What a resume keeps of an earlier run's files, whatever state that run left them in."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_ray.data.recipe import CollectRecipe
from janus_ray.data.row_files import RowFiles, made_with, unfinished
from janus_ray.data.sources import Instructions
from janus_ray.llm.endpoint import ReachedEndpoint
from janus_ray.records import COLLECTION, Instruction, content_id
from janus_ray.store.files import write_text
from janus_ray.store.tables import read_parquet

SETS = 2
ASKED = [Instruction(content_id(str(n)), "main", "origin", f"Question {n}?") for n in range(4)]


def row(instruction, index, status="ok"):
    failed = {"error_kind": "server", "error_message": "down"} if status == "error" else {}
    return {
        "main_source": instruction.main_source, "original_source": instruction.original_source, "system": "S",
        "prompt": instruction.prompt, "output": "O", "row_id": content_id(instruction.prompt_id, str(index)),
        "prompt_id": instruction.prompt_id, "set_index": index, "status": status, "attempts": 1, "prompt_tokens": 5,
        "completion_tokens": 7, "preference_set": [], **failed,
    }  # fmt: skip


def table(rows):
    return pa.Table.from_pylist(rows, schema=COLLECTION)


def written(folder, rows, origin="now", rows_per_file=3):
    files = RowFiles(folder, origin, rows_per_file)
    files.add(table(rows))
    files.close()


others = [Instruction(ASKED[0].prompt_id, "main", "origin", "Question  0?"), Instruction("0" * 16, "m", "o", "Gone.")]
earlier = st.lists(
    st.builds(row, st.sampled_from([*ASKED, *others]), st.integers(0, SETS), st.sampled_from(["ok", "ok", "error"])),
    max_size=14,
)


@given(before=earlier, foreign=earlier, again=st.lists(st.integers(0, 9), max_size=2), rows_per_file=st.integers(1, 5))
@settings(max_examples=25)
def test_a_resume_ends_with_every_row_once_and_makes_only_what_is_missing(before, foreign, again, rows_per_file):
    """Rows that failed, are missing or are there twice; of instructions that changed or left; of another teacher."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written(folder, [*before, *(before[n] for n in again if n < len(before))], rows_per_file=rows_per_file)
        for number, made_before in enumerate((foreign, foreign[:1])):
            written(folder / "foreign", made_before, "another teacher", rows_per_file=99)
            if made_before:
                (folder / "foreign" / "part-00000.parquet").rename(folder / f"part-9000{number}.parquet")
        write_text(folder / "part-99999.parquet", "no Parquet at all")
        instructions = Instructions(ASKED)
        files = RowFiles(folder, "now", rows_per_file)
        done = files.keep(instructions, SETS)
        whole = [all(row(instruction, index) in before for index in range(SETS)) for instruction in ASKED]
        assert list(done) == whole
        assert files.num_rows == SETS * sum(whole)
        missing = list(unfinished(instructions, done))
        assert missing == [instruction for instruction, is_whole in zip(ASKED, whole, strict=True) if not is_whole]
        for instruction in missing:
            files.add(table([row(instruction, index) for index in range(SETS)]))
        files.close()
        instructions.close()
        found = read_parquet(folder).select(COLLECTION.names).to_pylist()
        key = lambda each: (each["prompt_id"], each["set_index"])  # noqa: E731
        expected = table([row(instruction, index) for instruction in ASKED for index in range(SETS)]).to_pylist()
        assert sorted(found, key=key) == sorted(expected, key=key)
        assert files.counts == {
            "rows_ok": 8, "rows_failed": 0, "attempts": 8, "prompt_tokens": 40, "completion_tokens": 56
        }  # fmt: skip
        assert files.files == len(list(folder.glob("*.parquet"))) == -(-8 // rows_per_file)


def test_whole_files_of_an_earlier_run_are_not_written_again(tmp_path):
    written(tmp_path, [row(each, index) for each in ASKED[:3] for index in range(SETS)])
    before = {path: path.stat().st_ino for path in tmp_path.glob("*.parquet")}
    files = RowFiles(tmp_path, "now", 3)
    assert list(files.keep(Instructions(ASKED), SETS)) == [True, True, True, False]
    files.add(table([row(ASKED[3], index, "error") for index in range(SETS)]))
    files.close()
    assert len(before) == 2
    assert {path: path.stat().st_ino for path in before} == before
    assert (files.counts["rows_ok"], files.failures, files.first_failure) == (6, {"server": 2}, "down")


def test_rows_of_another_teacher_sampling_or_weights_have_another_origin():
    def recipe(**changes):
        fields = {"sources": [{"path": "x"}], "output_dir": "y", "teacher": {"base_url": "http://a/v1", "model": "m"}}
        return CollectRecipe.model_validate(fields | changes)

    teacher = ReachedEndpoint(base_url="http://a/v1", model="m")
    origins = [
        made_with(recipe(), teacher),
        made_with(recipe(seed=1), teacher),
        made_with(recipe(num_sets=2), teacher),
        made_with(recipe(sampling={"temperature": 0.5}), teacher),
        made_with(recipe(), teacher.reached("some weights")),
        made_with(recipe(), teacher.model_copy(update={"model": "n"})),
    ]
    assert len(set(origins)) == len(origins)
    # What only says how hard is no other collection.
    assert made_with(recipe(client_actors=3, rows_per_file=5), teacher) == origins[0]
