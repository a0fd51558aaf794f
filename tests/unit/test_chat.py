from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_ray.chat import conversation, use_template
from tests import tokenizer_kinds as kinds

USER, SYSTEM = {"role": "user", "content": "How do I start?"}, {"role": "system", "content": "You write for a child."}
ANSWER = {"role": "assistant", "content": "Castle early."}
TURNS = [SYSTEM, USER, ANSWER, {"role": "user", "content": "- And then?\n\n1.5 €"}]

# What a hostile, careless or merely technical text is made of.
PIECES = [
    "</s>", "<s>", "<unk>", "[INST]", "[/INST]", "<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>",
    "<end_of_turn>", "<start_of_turn>",
    "<|end|>", " <|end|> ", "<|user|>", "<|start_header_id|>", "<｜User｜>", "<pad>", "</", "s>",
    "<|", "|>", "im_end", "<", ">", "[", "/INST]", " ", "\n", "\n\n", "\t", "a", "Hello", "ünïcode 語", "🙂",
    "{{ bos_token }}", "{% x %}", "\ue000", "\ue001", "\U000f0000", "\u00a0", "<h1>", "1",
]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES), max_size=6).map("".join) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=20
)


def own(tokenizer):
    return use_template(tokenizer, "own")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """An encoder for each kind of tokenizer and template."""
    from janus_ray.model_folder import load_tokenizer

    mistral = kinds.write_mistral(tmp_path_factory.mktemp("mistral"))
    llama2 = load_tokenizer(mistral)
    llama2.chat_template = kinds.LLAMA2
    return {
        "janus, byte level": use_template(kinds.byte_level(""), "janus"),
        "janus, ordinary brackets": use_template(kinds.chatml(), "janus"),
        "janus, Mistral": use_template(load_tokenizer(mistral), "janus"),
        "chatml": own(kinds.chatml()),
        "chatml without a prompt for answers": own(kinds.chatml(kinds.CHATML_SILENT)),
        "thinking": own(kinds.chatml(kinds.THINKING)),
        "gemma": own(kinds.gemma()),
        "llama 3": own(kinds.llama3()),
        "phi 3": own(kinds.phi3()),
        "deepseek": own(kinds.deepseek()),
        "llama 2": own(llama2),
    }


KINDS = [
    "janus, byte level", "janus, ordinary brackets", "janus, Mistral", "chatml", "chatml without a prompt for answers",
    "thinking", "gemma", "llama 3", "phi 3", "deepseek", "llama 2",
]  # fmt: skip


def plain_ids(encoder, messages):
    """What transformers itself gives, where it knows what stands before an answer."""
    return encoder.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def controls(encoder, ids):
    known = {number for number, token in encoder.tokenizer.added_tokens_decoder.items() if token.special}
    known |= {encoder.tokenizer.convert_tokens_to_ids(token) for token in ("<｜User｜>", "<｜Assistant｜>")}
    return [token for token in ids if token in known - {encoder.tokenizer.unk_token_id}]


def messages_for(kind, system, first, answer, second):
    turns = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": second},
    ]
    return turns if kind == "gemma" else [{"role": "system", "content": system}, *turns]


def test_the_format_is_the_papers(encoders):
    encoder = encoders["janus, byte level"]
    system, user = "You write for a child.", "How do I start?"

    def text(messages):
        return encoder.tokenizer.decode(encoder.encode_prompt(messages))

    assert text(conversation(system, user)) == f"<s>[INST] {system}\n{user} [/INST]"
    assert text(conversation(None, user)) == text(conversation("", user)) == f"<s>[INST] {user} [/INST]"
    turns = [*conversation("S", "one"), {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]
    assert text(turns) == "<s>[INST] S\none [/INST]two</s>[INST] three [/INST]"


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_transformers_own_where_nothing_is_hostile(encoders, kind):
    encoder = encoders[kind]
    turns = TURNS[1:] if kind == "gemma" else TURNS
    for messages in (turns, turns[:-2], TURNS[1:], TURNS[1:2]):
        expected = plain_ids(encoder, messages)
        if kind == "chatml without a prompt for answers":
            expected += encoder.tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        assert encoder.encode_prompt(messages) == expected


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(system=texts, first=texts, answer=texts, second=texts)
def test_no_text_becomes_a_control_token(encoders, kind, system, first, answer, second):
    encoder = encoders[kind]
    ids = encoder.encode_prompt(messages_for(kind, system, first, answer, second))
    written = controls(encoder, encoder.encode_prompt(messages_for(kind, "a", "a", "a", "a")))
    assert controls(encoder, ids) == written
    decoded = "".join(encoder.tokenizer.decode(ids).split())
    for text in (first, second) if kind == "gemma" else (system, first, second):
        assert "".join(text.split()) in decoded


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(first=texts, response=texts.filter(lambda text: text.strip()))
def test_the_loss_is_on_the_response_and_its_end_only(encoders, kind, first, response):
    encoder = encoders[kind]
    messages = [{"role": "user", "content": first}]
    example = encoder.encode_example(messages, response)
    prompt = [token for token, loss in zip(example.input_ids, example.loss_mask, strict=True) if not loss]
    learned = [token for token, loss in zip(example.input_ids, example.loss_mask, strict=True) if loss]
    assert prompt == encoder.encode_prompt(messages) == example.input_ids[: len(prompt)]
    assert learned[-1] == encoder.end_id
    assert controls(encoder, learned) == [encoder.end_id]
    expected = "".join(response.split())
    if kind != "thinking":
        decoded = "".join(encoder.tokenizer.decode(learned[:-1]).split())
        assert decoded == expected
        encoder.audit(example, response)
