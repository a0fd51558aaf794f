from __future__ import annotations

import json

import pytest

from janus_ray.chat import use_template
from janus_ray.errors import CheckpointError
from janus_ray.model_folder import (
    TEMPLATE_FILE,
    check_model_folder,
    load_encoder,
    load_tokenizer,
    save_tokenizer,
    weights_id,
    write_template_record,
)
from tests import tokenizer_kinds as kinds

USER = [{"role": "user", "content": "How do I start?"}]


def test_the_weights_id_is_of_content_and_nothing_else(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "config.json").write_text("{}")
    (second / "manifest.json").write_text('{"finished_at": "today"}')
    assert weights_id(first) == weights_id(second)
    assert len(weights_id(first)) == 16
    assert len({weights_id(first), weights_id(first, "own"), weights_id(first, "janus")}) == 3
    (second / "chat_template.jinja").write_text("{{ bos_token }}")
    assert weights_id(first) != weights_id(second)
    (second / "chat_template.jinja").unlink()
    (second / "model.safetensors").write_bytes(b"weightt")
    assert weights_id(first) != weights_id(second)
    with pytest.raises(CheckpointError, match="no such folder"):
        weights_id(tmp_path / "absent")


def write(folder, tokenizer, template):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}))
    encoder = use_template(tokenizer, template)
    save_tokenizer(tokenizer, folder)
    write_template_record(folder, encoder.probe_sha256(), template)
    return folder


def test_a_model_folder_passes_until_its_template_or_vocabulary_changes(tmp_path):
    folder = write(tmp_path, kinds.byte_level(""), "janus")
    sha256 = check_model_folder(folder)
    assert len(sha256) == 64
    template = folder / "chat_template.jinja"
    original = template.read_text()
    template.write_text(original.replace("' [/INST]'", "' [/INST] '"))
    with pytest.raises(CheckpointError, match="template hash mismatch"):
        check_model_folder(folder)
    template.write_text(original)
    assert check_model_folder(folder) == sha256
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["model"]["merges"] = tokens["model"]["merges"][:-5]
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(CheckpointError, match="template hash mismatch"):
        check_model_folder(folder)


def test_a_record_of_the_first_release_is_read(tmp_path):
    folder = write(tmp_path, kinds.byte_level(""), "janus")
    # What that release wrote for this tokenizer; it had one template and did not name it.
    sha256 = "e094c57f3aae1be92ee193e835953a58f098e625e99e0dd1bdb2f97a21e07197"
    (folder / TEMPLATE_FILE).write_text(json.dumps({"template_sha256": sha256}))
    assert check_model_folder(folder) == sha256


@pytest.mark.parametrize("record", ['"text"', "[]", "{}", '{"template_sha256": 3}', '{"chat_template": "chatml"}'])
def test_a_damaged_record_is_one_line(tmp_path, record):
    folder = write(tmp_path, kinds.byte_level(""), "janus")
    (folder / TEMPLATE_FILE).write_text(record)
    with pytest.raises(CheckpointError, match="not a template record") as caught:
        check_model_folder(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_record_is_served_once_the_recipe_names_its_template(tmp_path):
    folder = write(tmp_path, kinds.chatml(), "own")
    (folder / TEMPLATE_FILE).unlink()
    with pytest.raises(CheckpointError, match='name its template in the recipe: chat_template = "own"'):
        load_encoder(folder)
    own, janus = load_encoder(folder, "own"), load_encoder(folder, "janus")
    assert own.tokenizer.decode(own.encode_prompt(USER)).startswith("<|im_start|>system\nYou are helpful.<|im_end|>\n")
    assert janus.tokenizer.decode(janus.encode_prompt(USER)) == "[INST] How do I start? [/INST]"
    with pytest.raises(CheckpointError, match="not a model folder"):
        load_encoder(tmp_path / "absent", "own")


def test_a_recipe_cannot_name_another_template_than_the_one_of_training(tmp_path):
    folder = write(tmp_path, kinds.chatml(), "own")
    assert load_encoder(folder, "own").probe_sha256() == check_model_folder(folder)
    with pytest.raises(CheckpointError, match='trained with chat_template = "own", the recipe names "janus"'):
        load_encoder(folder, "janus")


def test_a_tokenizer_without_an_end_or_a_template_is_refused():
    tokenizer = kinds.chatml()
    tokenizer.chat_template = None
    with pytest.raises(CheckpointError, match='brings no chat template; chat_template = "janus"'):
        use_template(tokenizer, "own")
    tokenizer.eos_token = None
    with pytest.raises(CheckpointError, match="no EOS token"):
        use_template(tokenizer, "janus")


def starts_as_published(pieces):
    """The space of a text that stands by itself before the first bracket, and no token but BOS before it."""
    return pieces[:2] == ["<s>", "▁["] and "".join(pieces) == "<s>▁[INST]▁Hello▁[/INST]"


@pytest.mark.parametrize(
    "files",
    [
        {"model_type": "mistral", "merged": 1000},
        {"model_type": "llama", "merged": 1000},
        {"model_type": "llama", "merged": 1000, "legacy": None},
        {"model_type": "llama", "merged": 1000, "legacy": False},
        {"model_type": "mistral", "json_too": False, "configuration": None},
    ],
)
def test_llama_2_style_files_give_the_papers_ids_and_keep_them(tmp_path, files):
    base = kinds.write_mistral(tmp_path / "base", **files)
    tokenizer = load_tokenizer(base)
    encoder = use_template(tokenizer, "janus")
    ids = encoder.encode_prompt([{"role": "user", "content": "Hello"}])
    assert starts_as_published(tokenizer.convert_ids_to_tokens(ids))
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "config.json").write_text((base / "config.json").read_text())
    save_tokenizer(tokenizer, exported)
    write_template_record(exported, encoder.probe_sha256())
    assert load_encoder(exported).encode_prompt([{"role": "user", "content": "Hello"}]) == ids
    from transformers import AutoTokenizer

    # As vLLM reads it.
    again = AutoTokenizer.from_pretrained(exported)
    turns = [*USER, {"role": "assistant", "content": " two  spaces"}, *USER]
    assert again.apply_chat_template(turns, return_dict=False) == encoder.encode_prompt(turns)
