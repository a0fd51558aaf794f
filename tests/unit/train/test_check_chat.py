"""What is known of template and tokenizer before Ray starts."""

from __future__ import annotations

import json

import pytest

from janus_ray.chat import ChatEncoder, EncodedExample, conversation
from janus_ray.errors import CheckpointError, DataError
from janus_ray.model_folder import save_tokenizer
from janus_ray.train.collection import Rows
from janus_ray.train.prepare import check_chat
from janus_ray.train.recipe import TrainRecipe
from tests import tokenizer_kinds as kinds

PROMPT, OUTPUT = "How do I start?", "Castle </s> early."


@pytest.fixture
def recipe_for(tmp_path):
    def make(tokenizer, chat_template) -> TrainRecipe:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
        save_tokenizer(tokenizer, tmp_path)
        return TrainRecipe(
            collection="rows", base_model=str(tmp_path), output_dir="out", chat_template=chat_template, max_length=64
        )

    return make


def rows(*systems):
    answer = {"role": "assistant", "content": OUTPUT}
    return Rows([*conversation(system, PROMPT), answer] for system in systems)


def test_both_templates_pass_and_have_their_own_hash(recipe_for):
    tokenizer = kinds.chatml()
    own, janus = (check_chat(recipe_for(tokenizer, name), rows("You are brief.", "")) for name in ("own", "janus"))
    assert own != janus


def test_rows_that_the_models_own_template_refuses_are_named(recipe_for):
    recipe = recipe_for(kinds.gemma(), "own")
    assert check_chat(recipe, rows("", None))
    number = r"^rows: the chat template refuses 2 of the 3 rows looked at, the first: "
    reason = (
        r"row with the prompt 'How do I start\?': .*System role not supported; chat_template = \"janus\" takes them$"
    )
    with pytest.raises(DataError, match=number + reason):
        check_chat(recipe, rows("", "You are brief.", "You are long."))
    assert check_chat(recipe_for(kinds.gemma(), "janus"), rows("You are brief."))


@pytest.mark.parametrize(
    ("odd", "ordinary", "stops"),
    [
        # All there are, however few.
        (1, 0, True),
        # One is odd, whatever its share.
        (1, 1, False),
        (2, 1, True),
        (2, 198, False),
        (3, 197, True),
        # Of many some are looked at, which may hold more of the odd ones than their share.
        (6, 594, False),
        (300, 300, True),
    ],
)
def test_single_rows_that_the_template_refuses_do_not_stop_the_run(recipe_for, odd, ordinary, stops):
    recipe = recipe_for(kinds.gemma(), "own")
    mixed = rows(*["You are brief."] * odd, *[None] * ordinary)
    if not stops:
        assert check_chat(recipe, mixed)
        return
    with pytest.raises(DataError, match="the chat template refuses"):
        check_chat(recipe, mixed)


def test_a_wrong_mask_in_one_row_stops_at_once(recipe_for, monkeypatch):
    def cut(encoder, messages):
        example = encoder.encode_example(messages[:-1], messages[-1]["content"])
        wrong = EncodedExample(example.input_ids, [*example.loss_mask[:-1], False])
        return [wrong if messages[0]["role"] == "system" else example]

    monkeypatch.setattr(ChatEncoder, "encode_conversation", cut)
    with pytest.raises(DataError, match=r"^row with the prompt 'How do I start\?': mask audit"):
        check_chat(recipe_for(kinds.chatml(), "janus"), rows(*[None] * 50, "You are brief."))


def test_no_end_and_no_template_are_refused(recipe_for):
    tokenizer = kinds.chatml()
    tokenizer.chat_template = None
    with pytest.raises(CheckpointError, match="brings no chat template"):
        check_chat(recipe_for(tokenizer, "own"), rows(""))
    tokenizer.eos_token = None
    with pytest.raises(CheckpointError, match="no EOS token"):
        check_chat(recipe_for(tokenizer, "janus"), rows(""))
