"""Base models that are refused: each in one line, in the driver, before anything starts."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from janus_ray.chat import use_template
from janus_ray.errors import CheckpointError
from janus_ray.model_folder import load_tokenizer
from janus_ray.train import run
from janus_ray.train.families import load_config
from janus_ray.train.model import check_base_model, generation_defaults, skeleton, write_weights
from janus_ray.train.recipe import TrainRecipe
from janus_ray.train.weights import check_weights
from tests.hub import Repository, folder_files, reached
from tests.tiny import write_collection, write_model


def recipe_for(base, **changes):
    values = {"collection": "c", "output_dir": "o", "base_model": str(base), "max_length": 128, **changes}
    return TrainRecipe.model_validate(values)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("sound"))


@pytest.fixture(scope="module")
def built(sound):
    """The sound model without memory."""
    return skeleton(str(sound), load_config(recipe_for(sound)))


@pytest.fixture
def base(sound, tmp_path):
    """A sound folder of its own, to be damaged."""
    return shutil.copytree(sound, tmp_path / "base")


def line(base, **changes):
    """The one line with which the driver refuses a base model."""
    with pytest.raises(CheckpointError) as caught:
        check_base_model(recipe_for(base, **changes))
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert text.startswith(f"base model {base}: ")
    return text


def change_config(base, **changes):
    file = base / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def change_weights(base, change):
    weights = load_file(base / "model.safetensors")
    change(weights)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def test_a_sound_model_is_let_in_without_a_word(sound, capfd):
    check_base_model(recipe_for(sound))
    assert capfd.readouterr() == ("", "")


FAMILIES = {
    "bert": "an encoder; expected a decoder",
    "bloom": "ALiBi",
    "falcon": "takes no document borders",
    "gemma3": "a wrapper of several models",
    "gpt2": "learned absolute positions",
    "gpt_neox": "known to be exact for apertus, .*mistral",
    "gpt_oss": "attention sinks",
    "granite_swa": "attention sinks",
    "jamba": "a mixture of experts|a state",
    "lfm2": "a state or a convolution",
    "llava": "a wrapper of several models",
    "mamba": "a state or a convolution",
    "mixtral": "a mixture of experts",
    "mpt": "ALiBi",
    "opt": "learned absolute positions",
    "qwen3_moe": "a mixture of experts",
    "qwen3_next": "a mixture of experts|a state",
    "t5": "an encoder with a decoder",
    "xglm": "known to be exact for",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_refused_family(family, tmp_path):
    CONFIG_MAPPING[family]().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"model type '{family}' is not trained here: .*({FAMILIES[family]})"):
        check_base_model(recipe_for(tmp_path))


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 64,
}
CONFIGURATIONS = {
    "auto_map": (
        {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}},
        "brings its own code",
    ),
    "bidirectional": ({"use_bidirectional_attention": True}, "both directions"),
    "bitsandbytes": ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"quantised weights \(bitsandbytes\)"),
    "compressed": ({"compression_config": {"format": "x"}}, "quantised weights"),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised weights \(gptq\)"),
    "heads-0": ({"num_attention_heads": 0}, "num_attention_heads = 0|ZeroDivision"),
    "heads-odd": ({"hidden_size": 33, "head_dim": None}, r"\[380, 33\] by its configuration .\d+ such weights."),
    "hidden-text": ({"hidden_size": "wide"}, "hidden_size"),
    "layers-0": ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
    "layer-types": ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    "longrope": (
        {"model_type": "phi3", "rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
        "max_length up to 64, not 128",
    ),
    "no-model-type": ({"model_type": ...}, "names no model_type"),
    "no-positions": ({"max_position_embeddings": None}, "max_position_embeddings"),
    "padding": ({"pad_token_id": 99999}, "cannot be built: .*Padding_idx must be within num_embeddings"),
    "per-layer": ({"per_layer_config": {"0": {"intermediate_size": 16}}}, "per_layer_config"),
    "positions": ({"max_position_embeddings": 100}, "100 positions, fewer than max_length = 128"),
    "rope-unknown": ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "spiral"),
    "vocab-huge": ({"vocab_size": 10**15}, "cannot be built"),
    "vocab-more": ({"vocab_size": 500}, r"is \[380, 32\] in its weights and \[500, 32\] by its configuration"),
    "vocab-less": ({"vocab_size": 379}, "1 token.s. beyond the embedding of 379 .vocab_size.; .* with id 379"),
    "window-0": ({"sliding_window": 0}, "sliding_window = 0"),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_refused_configuration(name, base):
    changes, reason = CONFIGURATIONS[name]
    change_config(base, **changes)
    with pytest.raises(CheckpointError, match=reason):
        check_base_model(recipe_for(base))
    line(base)


def test_refused_on_a_gpu_only(tmp_path):
    def refused(kind, **changes):
        CONFIG_MAPPING[kind](max_position_embeddings=512, **changes).save_pretrained(tmp_path)
        load_config(recipe_for(tmp_path))
        with pytest.raises(CheckpointError) as caught:
            load_config(recipe_for(tmp_path, use_gpu=True))
        return str(caught.value)

    assert "soft caps of attention scores" in refused("gemma2")
    assert "heads of width 320; the GPU's kernel takes multiples of 8 up to 256" in refused("gemma", head_dim=320)
    assert "heads of width 12;" in refused("qwen3", head_dim=12)
    CONFIG_MAPPING["gemma3_text"](max_position_embeddings=512).save_pretrained(tmp_path)
    load_config(recipe_for(tmp_path, use_gpu=True))


def test_a_familys_own_code_is_not_run_and_that_is_said(base, capfd):
    # As Phi-3 is published: transformers knows the type, the folder has code of its own.
    change_config(base, auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    (base / "modeling_own.py").write_text("raise SystemExit('run')")
    check_base_model(recipe_for(base))
    out, err = capfd.readouterr()
    assert "its own code (auto_map) is not run; MistralForCausalLM is transformers'" in out
    assert (len(out.splitlines()), err) == (1, "")
    write_weights(recipe_for(base), load_file(base / "model.safetensors"), torch.float32, base / "exported")
    exported = json.loads((base / "exported" / "config.json").read_text())
    assert "auto_map" not in exported
    assert exported["model_type"] == "mistral"


def test_dropout_is_not_applied_and_that_is_said(base, capfd):
    change_config(base, attention_dropout=0.25)
    check_base_model(recipe_for(base))
    assert "trained without its dropout (attention_dropout = 0.25)" in capfd.readouterr().out


HEAD, LAYER = "lm_head.weight", "model.layers.1."


def drop_layer(weights):
    for name in [name for name in weights if name.startswith(LAYER)]:
        del weights[name]


WEIGHTS = {
    "a-head-missing": (lambda weights: weights.pop(HEAD), r"weights are missing from it: lm_head\.weight$"),
    "a-layer-missing": (drop_layer, r"missing from it: model\.layers\.1\.input_layernorm\.weight, .* and \d more$"),
    "a-norm-missing": (lambda weights: weights.pop("model.norm.weight"), r"missing from it: model\.norm\.weight$"),
    "a-bias-too-many": (
        lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
        r"has no place for: model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "a-layer-too-many": (
        lambda weights: weights.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(64, 32)}),
        r"has no place for: model\.layers\.2\.mlp",
    ),
    "another-shape": (
        lambda weights: weights.update({"model.norm.weight": torch.zeros(16)}),
        r"model\.norm\.weight is \[16\] in its weights and \[32\] by its configuration \(1 such weight\)",
    ),
    "another-type": (
        lambda weights: weights.update({HEAD: weights[HEAD].to(torch.float8_e4m3fn)}),
        r"weights of type F8_E4M3, expected BF16, F16, F32, F64: lm_head\.weight",
    ),
    "integers": (lambda weights: weights.update({HEAD: weights[HEAD].to(torch.int8)}), "weights of type I8"),
    "none": (lambda weights: weights.clear(), "weights are missing from it"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_refused_weights(name, base, capfd):
    change, reason = WEIGHTS[name]
    change_weights(base, change)
    with pytest.raises(CheckpointError, match=reason):
        check_base_model(recipe_for(base))
    line(base)
    assert capfd.readouterr() == ("", "")


def test_old_buffers_in_the_weights_are_no_fault(base):
    change_weights(
        base, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    )
    check_base_model(recipe_for(base))


def test_tied_weights_are_one_or_equal(base):
    change_config(base, tie_word_embeddings=True)
    assert "ties lm_head.weight to model.embed_tokens.weight, but they differ; set tie_word_embeddings" in line(base)
    change_weights(base, lambda weights: weights.update({HEAD: weights["model.embed_tokens.weight"].clone()}))
    check_base_model(recipe_for(base))
    change_weights(base, lambda weights: weights.pop(HEAD))
    check_base_model(recipe_for(base))
    change_config(base, tie_word_embeddings=False)
    assert "weights are missing from it: lm_head.weight" in line(base)


def halved(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


FILES = {
    "adapter": (lambda base: (base / "adapter_config.json").write_text("{}"), "holds an adapter"),
    "bin": (
        lambda base: (base / "model.safetensors").rename(base / "pytorch_model.bin"),
        r"neither model.safetensors nor .*\(it has pytorch_model.bin: save it again",
    ),
    "cut": (lambda base: halved(base / "model.safetensors"), "model.safetensors is cut or damaged"),
    "cut-in-header": (
        lambda base: (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:20]),
        "model.safetensors is cut or damaged",
    ),
    "empty": (lambda base: (base / "model.safetensors").write_bytes(b""), "model.safetensors is cut or damaged"),
    "no-weights": (lambda base: (base / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "lfs": (
        lambda base: (base / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        ),
        "model.safetensors is a Git LFS pointer, not the weights; run git lfs pull",
    ),
    "web-page": (lambda base: (base / "model.safetensors").write_text("<html>" * 99), "is cut or damaged"),
    "config-missing": (lambda base: (base / "config.json").unlink(), "no config.json"),
    "config-lfs": (
        lambda base: (base / "config.json").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "config.json is no JSON",
    ),
    "config-list": (lambda base: (base / "config.json").write_text("[1]"), "config.json is no JSON object"),
    "config-nested": (lambda base: (base / "config.json").write_text("[" * 100_000), "config.json is no JSON"),
}


@pytest.mark.parametrize("name", FILES)
def test_refused_files(name, base):
    damage, reason = FILES[name]
    damage(base)
    with pytest.raises(CheckpointError, match=reason):
        check_base_model(recipe_for(base))
    line(base)


def test_shards_are_all_there(base):
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {f"model-0000{part + 1}-of-00002.safetensors": names[part::2] for part in range(2)}
    for file, held in parts.items():
        save_file({name: weights[name] for name in held}, base / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    check_base_model(recipe_for(base))
    first, second = parts
    halved(base / first)
    assert f"{first} is cut or damaged" in line(base)
    (base / second).unlink()
    assert f"model.safetensors.index.json names files that are not there: {second}" in line(base)
    (base / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    assert "model.safetensors.index.json is no index of weights" in line(base)


def test_every_token_has_an_embedding_but_those_no_text_becomes(base):
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(base)
    assert "the tokenizer has 2 token(s) beyond the embedding of 380 (vocab_size); the first is '<one>'" in line(base)


def test_the_placeholder_of_an_image_needs_no_embedding(base):
    tokenizer = load_tokenizer(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(base)
    assert "'<image_soft_token>' with id 380" in line(base)
    # As Gemma 3's folder for text alone names it.
    file = base / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_token": "<image_soft_token>"}))
    check_base_model(recipe_for(base))


class RayStartedError(Exception):
    """The driver found nothing to refuse."""


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Runs the driver up to where Ray would start."""

    def started(*_, **__):
        raise RayStartedError

    monkeypatch.setattr(run, "ray_cluster", started)
    collection = write_collection(tmp_path / "rows", 3)

    def drive(base_model):
        run.train(recipe_for(base_model, collection=str(collection), output_dir=str(tmp_path / "run")), "fail")

    return drive


def test_a_refusal_comes_before_ray_and_before_the_folder_is_begun(base, tmp_path, driver):
    with pytest.raises(RayStartedError):
        driver(base)
    change_weights(base, drop_layer)
    with pytest.raises(CheckpointError, match="weights are missing"):
        driver(base)
    assert not (tmp_path / "run" / "manifest.json").exists()
    assert not (tmp_path / "run" / "documents").exists()


def test_a_published_base_model_is_checked_like_a_folder(base, tmp_path, driver, monkeypatch):
    whole = Repository("some-org/whole", folder_files(base))
    change_weights(base, drop_layer)
    with reached(monkeypatch, tmp_path / "cache", whole, Repository("some-org/part", folder_files(base))):
        with pytest.raises(RayStartedError):
            driver("some-org/whole")
        with pytest.raises(CheckpointError, match="weights are missing"):
            driver("some-org/part")
        with pytest.raises(CheckpointError, match="model some-org/none: no such folder here"):
            driver("some-org/none")


def test_every_end_of_the_base_model_stays_one_and_its_sampling_does_not(base):
    encoder = use_template(load_tokenizer(base), "janus")

    def written(stated):
        (base / "generation_config.json").write_text(stated)
        return generation_defaults(str(base), encoder)

    end = encoder.tokenizer.eos_token_id
    kept = written(json.dumps({"eos_token_id": [7, end, 9], "temperature": 0.6, "repetition_penalty": 1.3}))
    assert (kept.eos_token_id, kept.temperature, kept.repetition_penalty) == ([end, 7, 9], None, None)
    assert written(json.dumps({"eos_token_id": 7})).eos_token_id == [end, 7]
    for nothing in ("{}", "no JSON", "[]", '{"eos_token_id": null}', '{"eos_token_id": "</s>"}'):
        assert written(nothing).eos_token_id == end
    (base / "generation_config.json").unlink()
    assert generation_defaults(str(base), encoder).bos_token_id == encoder.tokenizer.bos_token_id


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
FIELDS = [
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window", "layer_types", "rope_parameters",
    "tie_word_embeddings", "quantization_config", "auto_map", "hidden_act", "rms_norm_eps", "dtype", "architectures",
    "attention_dropout", "per_layer_config", "text_config", "pad_token_id", "eos_token_id", "initializer_range",
]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3))
def test_a_configuration_of_nonsense_is_refused_or_makes_no_difference(sound, tmp_path_factory, changes):
    base = tmp_path_factory.mktemp("hostile")
    for file in sound.iterdir():
        (base / file.name).symlink_to(file)
    stated = json.loads((base / "config.json").read_text())
    (base / "config.json").unlink()
    (base / "config.json").write_text(json.dumps({**stated, **changes}))
    try:
        check_base_model(recipe_for(base))
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1
    else:
        # Whatever decides a weight's place or shape is as before.
        config = load_config(recipe_for(base))
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
            assert getattr(config, name) == stated[name]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_weight_file_of_nonsense_is_refused_or_makes_no_difference(sound, built, tmp_path_factory, data):
    file = tmp_path_factory.mktemp("hostile") / "model.safetensors"
    whole = (sound / file.name).read_bytes()
    header = int.from_bytes(whole[:8], "little")
    start, noise = data.draw(st.integers(0, header + 8)), data.draw(st.binary(min_size=1, max_size=12))
    cut, longer, other = whole[:start], whole[start:], whole[start + len(noise) :]
    file.write_bytes(data.draw(st.sampled_from([noise, cut, cut + noise + longer, cut + noise + other])))
    try:
        check_weights(str(file.parent), built)
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1
    else:
        found, expected = load_file(file), load_file(sound / file.name)
        assert {name: each.shape for name, each in found.items()} == {
            name: each.shape for name, each in expected.items()
        }
