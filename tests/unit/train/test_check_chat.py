"""What is known of template and tokenizer before Ray starts."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from janus_ray.errors import CheckpointError, DataError
from janus_ray.model_folder import save_tokenizer
from janus_ray.train.prepare import check_chat
from janus_ray.train.recipe import TrainRecipe
from tests import tokenizer_kinds as kinds

ROW = {"prompt": "How do I start?", "output": "Castle </s> early."}


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
    return pa.Table.from_pylist([{"system": system, **ROW} for system in systems])


def test_both_templates_pass_and_have_their_own_hash(recipe_for):
    tokenizer = kinds.chatml()
    own, janus = (check_chat(recipe_for(tokenizer, name), rows("You are brief.", "")) for name in ("own", "janus"))
    assert own != janus


def test_rows_that_the_models_own_template_refuses_are_named(recipe_for):
    recipe = recipe_for(kinds.gemma(), "own")
    assert check_chat(recipe, rows("", None))
    with pytest.raises(DataError, match=r"row with the prompt 'How do I start\?': .*System role not supported"):
        check_chat(recipe, rows("", "You are brief."))
    assert check_chat(recipe_for(kinds.gemma(), "janus"), rows("You are brief."))


def test_no_end_and_no_template_are_refused(recipe_for):
    tokenizer = kinds.chatml()
    tokenizer.chat_template = None
    with pytest.raises(CheckpointError, match="brings no chat template"):
        check_chat(recipe_for(tokenizer, "own"), rows(""))
    tokenizer.eos_token = None
    with pytest.raises(CheckpointError, match="no EOS token"):
        check_chat(recipe_for(tokenizer, "janus"), rows(""))
