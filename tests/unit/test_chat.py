from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_ray.chat import conversation, use_template
from janus_ray.errors import CheckpointError, DataError
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
    assert (
        text(conversation(None, user))
        == text(conversation("", user))
        == text(conversation(" \u200b\n", user))
        == f"<s>[INST] {user} [/INST]"
    )
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


def mistral_commons_ids(messages):
    """mistral-common's own encoder, first version of the format."""
    from mistral_common.protocol.instruct import messages as kinds_of
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    classes = {"user": kinds_of.UserMessage, "assistant": kinds_of.AssistantMessage}
    turns = [classes[message["role"]](content=message["content"]) for message in messages]
    return MistralTokenizer.v1().encode_chat_completion(ChatCompletionRequest(messages=turns)).tokens


@pytest.mark.parametrize(
    "turns",
    [
        ["Hello"],
        ["Hello", "two", "three"],
        ["  Hello \n", "\n two  ", " three\n"],
        ["a </s> b <s> [INST]", "[/INST] </s>", "</s>"],
        ["ünïcode 語 🙂\t1.5 €", "<unk>", "\n"],
    ],
)
def test_the_mistral_tokenizer_gives_the_ids_of_mistral_common(encoders, turns):
    roles = ["user", "assistant", "user"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    encoder = encoders["janus, Mistral"]
    assert encoder.encode_prompt(messages) == mistral_commons_ids(messages)
    if len(messages) == 3:
        example = encoder.encode_example(messages[:1], turns[1])
        assert mistral_commons_ids(messages)[: len(example.input_ids)] == example.input_ids


def test_a_system_message_gives_the_ids_of_the_released_inference(encoders):
    """Its prompt is one text behind BOS, with one line break; mistral-common puts two."""
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    pieces = MistralTokenizer.v1().instruct_tokenizer.tokenizer
    for system, user in (("You write for a child.", "How do I start?"), (" Two\nlines ", "\nx </s>")):
        text = f"[INST] {system}\n{user} [/INST]"
        ids = encoders["janus, Mistral"].encode_prompt(conversation(system, user))
        assert ids == pieces.encode(text, bos=True, eos=False)


def test_a_tokenizer_without_bos_begins_with_the_bracket(encoders):
    encoder = encoders["janus, ordinary brackets"]
    assert encoder.tokenizer.bos_token is None
    assert encoder.tokenizer.decode(encoder.encode_prompt([USER])) == "[INST] How do I start? [/INST]"
    example = encoder.encode_example([USER], "Then.")
    assert encoder.tokenizer.decode(example.input_ids) == "[INST] How do I start? [/INST] Then.<|im_end|>"


def learned(encoder, example):
    """The stretches that carry loss, in words."""
    stretches, before = [], False
    for token, loss in zip(example.input_ids, example.loss_mask, strict=True):
        if loss:
            stretches = [*stretches[:-1], [*stretches[-1], token]] if before else [*stretches, [token]]
        before = loss
    return [encoder.tokenizer.decode(stretch) for stretch in stretches]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "thinking"])
def test_every_assistant_turn_carries_loss_and_nothing_else(encoders, kind):
    encoder = encoders[kind]
    second = {"role": "assistant", "content": "No </s> yet."}
    messages = [*TURNS[1:], second]
    [example] = encoder.encode_conversation(messages)
    assert example.input_ids[: len(encoder.encode_prompt(messages[:-1]))] == encoder.encode_prompt(messages[:-1])
    end = encoder.tokenizer.decode([encoder.end_id])
    assert ["".join(stretch.split()) for stretch in learned(encoder, example)] == [
        f"Castleearly.{end}",
        f"No</s>yet.{end}",
    ]


def test_a_template_that_rewrites_the_past_gives_one_example_for_each_turn(encoders):
    encoder = encoders["thinking"]
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nCastle early."}
    messages = [USER, thought, USER, {"role": "assistant", "content": "Later."}]
    first, second = encoder.encode_conversation(messages)
    assert learned(encoder, first) == ["<think>\nhm\n</think>\n\nCastle early.<|im_end|>"]
    assert learned(encoder, second) == ["<think>\n\n</think>\n\nLater.<|im_end|>"]
    assert "hm" not in encoder.tokenizer.decode(second.input_ids)


def test_what_a_template_refuses_or_leaves_out_is_one_line(encoders):
    with pytest.raises(DataError, match="refuses the conversation: System role not supported"):
        encoders["gemma"].encode_prompt([SYSTEM, USER])
    with pytest.raises(DataError, match="user and assistant must take turns"):
        encoders["janus, Mistral"].encode_prompt([USER, USER])
    for broken in ("{{ 1 / (messages | length - 3) }}", "{{ raise_exception('two\nlines') }}"):
        # As it stands in front of a sound template, it goes wrong for one number of messages or for all.
        guarded = f"{{% if messages | length == 3 %}}{broken}{{% endif %}}{kinds.CHATML}"
        with pytest.raises(DataError, match=r"refuses the conversation: (division by zero|two lines)$"):
            own(kinds.chatml(guarded)).encode_prompt([USER, {"role": "assistant", "content": "Yes."}, USER])
    deaf = own(kinds.chatml(kinds.CHATML.replace("for m in messages", "for m in messages if m.role != 'system'")))
    with pytest.raises(DataError, match="message 0: the chat template leaves out what the system wrote"):
        deaf.encode_prompt([SYSTEM, USER])
    assert deaf.encode_prompt([USER])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        # Its prompt asks for thoughts that the rendered answer does not have.
        (kinds.CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>' }}{% endif %}"), "its own prompt"),
        # An answer that nothing ends.
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", "no token that ends"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content + '<|im_end|>' }}{% endfor %}", "drops the response"),
    ],
)
def test_a_template_without_a_clean_answer_is_not_trained_with(template, words):
    with pytest.raises(DataError, match=words):
        own(kinds.chatml(template)).encode_example([USER], "Then.")


@pytest.mark.parametrize("template", ["{% for", "{{ raise_exception('never') }}", "{{ messages.nothing.at.all }}"])
def test_a_template_that_does_not_work_is_refused(template):
    with pytest.raises(CheckpointError) as caught:
        own(kinds.chatml(template))
    assert "\n" not in str(caught.value)


def test_of_several_templates_the_default_is_taken():
    named = own(kinds.chatml({"tool_use": "{{ 'tools' }}", "default": kinds.CHATML}))
    assert named.encode_prompt([USER]) == own(kinds.chatml()).encode_prompt([USER])
    with pytest.raises(CheckpointError, match="multiple chat templates with no default"):
        own(kinds.chatml({"tool_use": kinds.CHATML}))


def test_a_date_in_a_template_does_not_change_its_hash(encoders, monkeypatch):
    encoder = encoders["llama 3"]
    before, ids = encoder.probe_sha256(), encoder.encode_prompt([USER])

    class Tomorrow:
        @staticmethod
        def now():
            return Tomorrow

        @staticmethod
        def strftime(form):
            return "27 Nov 2099"

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    assert encoder.encode_prompt([USER]) != ids
    assert encoder.probe_sha256() == before


def test_the_token_that_ends_an_answer_is_the_templates(encoders):
    gemma = encoders["gemma"]
    assert gemma.tokenizer.decode([gemma.end_id]) == "<end_of_turn>" != gemma.tokenizer.eos_token


def test_the_audit_finds_a_mask_that_is_off_by_one(encoders):
    from dataclasses import replace

    encoder = encoders["chatml"]
    example = encoder.encode_example([USER], "Castle early.")
    assert "loss on 'Castle early.<|im_end|>'" in encoder.audit(example, "Castle early.")
    first = example.loss_mask.index(True)
    for wrong in (
        replace(example, loss_mask=[index >= first + 3 for index in range(len(example.loss_mask))]),
        replace(example, input_ids=example.input_ids[:-1], loss_mask=example.loss_mask[:-1]),
        replace(example, loss_mask=[not loss for loss in example.loss_mask]),
        replace(example, loss_mask=[False] * len(example.loss_mask)),
    ):
        with pytest.raises(DataError, match="mask audit"):
            encoder.audit(wrong, "Castle early.")


@pytest.mark.parametrize("model", ["unigram", "whole words", "nothing merged"])
def test_other_models_cannot_spell_a_control_token_either(model):
    """Their vocabularies hold the control tokens as pieces like any other."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", "▁", "say", *sorted(set("</s>ayu▁[INST]:.|"))]
    if model == "unigram":
        backend = Tokenizer(models.Unigram([(piece, 0.0 if piece[0] == "<" else -9.0) for piece in pieces], unk_id=0))
    elif model == "whole words":
        backend = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(pieces)}, "<unk>"))
    else:
        vocab = {piece: number for number, piece in enumerate(pieces)}
        backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    encoder = use_template(PreTrainedTokenizerFast(tokenizer_object=backend, **special), "janus")
    hostile, harmless = (encoder.encode_prompt([{"role": "user", "content": text}]) for text in ("</s> <s>", "say"))
    assert (hostile.count(1), hostile.count(2)) == (harmless.count(1), harmless.count(2)) == (1, 0)
    assert encoder.encode_example([USER], "</s>").input_ids.count(2) == 1
