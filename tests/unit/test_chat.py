from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_ray.chat import (
    conversation,
    encode_example,
    encode_prompt,
    install_template,
    render_prompt,
)
from janus_ray.errors import CheckpointError, DataError
from janus_ray.miniature.kit import train_tokenizer
from janus_ray.model_folder import TEMPLATE_FILE, check_model_folder, write_template_record

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer(iter(["You write for a child.", "How do I start with chess?", "Castle early."] * 3), 320)
    install_template(made)
    return made


def test_the_format_is_the_papers():
    system, user = "You write for a child.", "How do I start?"
    assert render_prompt(conversation(system, user), "<s>", "</s>") == f"<s>[INST] {system}\n{user} [/INST]"
    assert render_prompt(conversation(None, user), "<s>", "</s>") == f"<s>[INST] {user} [/INST]"
    turns = [*conversation("S", "one"), {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]
    assert render_prompt(turns, "<s>", "</s>") == "<s>[INST] S\none [/INST]two</s>[INST] three [/INST]"


@settings(deadline=None, max_examples=60)
@given(text, text, text)
def test_the_jinja_template_renders_what_training_encodes(tokenizer, system, first, second):
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": first},
        {"role": "assistant", "content": second},
        {"role": "user", "content": first},
    ]
    for part in (messages, messages[1:], messages[:2]):
        rendered = tokenizer.apply_chat_template(part, tokenize=False)
        assert rendered == render_prompt(part, "<s>", "</s>")
        assert tokenizer(rendered, add_special_tokens=False)["input_ids"] == encode_prompt(tokenizer, part)


def test_loss_is_on_the_response_and_its_end_only(tokenizer):
    example = encode_example(tokenizer, conversation("You write for a child.", "How do I start?"), "Castle early.")
    carrying = [token for token, loss in zip(example.input_ids, example.loss_mask, strict=True) if loss]
    assert tokenizer.decode(carrying) == "Castle early.</s>"
    prompt = [token for token, loss in zip(example.input_ids, example.loss_mask, strict=True) if not loss]
    assert tokenizer.decode(prompt) == "<s>[INST] You write for a child.\nHow do I start? [/INST]"
    assert prompt == encode_prompt(tokenizer, conversation("You write for a child.", "How do I start?"))


def test_roles_out_of_turn_are_refused(tokenizer):
    wrong = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(DataError, match="message 1: role 'user' where 'assistant' is due"):
        render_prompt(wrong, "<s>", "</s>")
    with pytest.raises(Exception, match="must take turns"):
        tokenizer.apply_chat_template(wrong, tokenize=False)


@pytest.fixture
def model_folder(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mistral", "architectures": ["MistralForCausalLM"]})
    )
    write_template_record(tmp_path, install_template(tokenizer))
    return tmp_path


def test_a_response_that_names_special_tokens_does_not_end_there(tokenizer):
    example = encode_example(tokenizer, conversation(None, "How?"), "Use <s>old</s> in HTML. Then more.")
    assert example.input_ids.count(tokenizer.eos_token_id) == 1
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(example.input_ids).endswith("Use <s>old</s> in HTML. Then more.</s>")


def test_a_model_folder_passes_until_its_template_or_vocabulary_changes(model_folder):
    sha256 = check_model_folder(model_folder)
    assert len(sha256) == 64
    template = model_folder / "chat_template.jinja"
    original = template.read_text()
    template.write_text(original.replace("' [/INST]'", "' [/INST] '"))
    with pytest.raises(CheckpointError, match="template hash mismatch"):
        check_model_folder(model_folder)
    template.write_text(original)
    assert check_model_folder(model_folder) == sha256
    tokens = json.loads((model_folder / "tokenizer.json").read_text())
    tokens["model"]["merges"] = tokens["model"]["merges"][:-5]
    (model_folder / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(CheckpointError, match="template hash mismatch"):
        check_model_folder(model_folder)


def test_a_folder_without_a_record_is_refused(model_folder, tmp_path_factory):
    (model_folder / TEMPLATE_FILE).unlink()
    with pytest.raises(CheckpointError, match="cannot be shown"):
        check_model_folder(model_folder)
    with pytest.raises(CheckpointError, match="not a model folder"):
        check_model_folder(tmp_path_factory.mktemp("empty"))
