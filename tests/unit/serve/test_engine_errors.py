import pytest

from janus_ray.serve.engine_errors import in_our_words, refusal


@pytest.mark.parametrize(
    ("said", "ours"),
    [
        (
            "This model's maximum context length is 1024 tokens. However, you requested 0 output tokens and your "
            "prompt contains at least 1025 input tokens, for a total of at least 1025 tokens. Please reduce the "
            "length of the input prompt or the number of requested output tokens. (parameter=input_tokens, value=1025)",
            "the prompt is too long: it has at least 1025 tokens, this model takes 1024 tokens, answer included",
        ),
        (
            "This model's maximum context length is 1024 tokens. However, you requested 900 output tokens and your "
            "prompt contains 811 input tokens, for a total of 1711 tokens.",
            "the prompt is too long: it has 811 tokens, 900 more tokens are asked for, "
            "this model takes 1024 tokens, answer included",
        ),
        (
            "This model's maximum context length is 1024 tokens. However, you requested 5 output tokens and your "
            "prompt contains 99999 characters (more than 16304 characters, the upper bound for 1019 input tokens).",
            "the prompt is too long: it has 99999 characters, 5 more tokens are asked for, "
            "this model takes 1024 tokens, answer included",
        ),
        (
            "The decoder prompt (length 5000) is longer than the maximum model length of 1024. Make sure that ...",
            "the prompt is too long: it has 5000 tokens, this model takes 1024 tokens, answer included",
        ),
        (
            "Input length (1030) exceeds model's maximum context length (1024).",
            "the prompt is too long: it has 1030 tokens, this model takes 1024 tokens, answer included",
        ),
    ],
)
def test_a_prompt_that_is_too_long_is_told_how_long_it_is_and_what_is_allowed(said, ours):
    assert in_our_words(said, "input_tokens") == (ours, "messages")


@pytest.mark.parametrize(
    ("said", "param", "ours", "our_param"),
    [
        (
            "token_id(s) [5000] in logit_bias contain out-of-vocab token ids. Vocabulary size: 400 (parameter=x)",
            None,
            "logit_bias: a token id is not in the vocabulary of 400",
            "logit_bias",
        ),
        (
            "Grammar error: Invalid type: nonsense",
            None,
            "response_format: this schema cannot be followed: Invalid type: nonsense",
            "response_format",
        ),
        (
            "1 validation error for ChatCompletionRequest\nseed\n  Input should be less than 5 [type=x, input_value=9]",
            None,
            "seed: Input should be less than 5",
            "seed",
        ),
        (
            "2 validation errors for ChatCompletionRequest\nstop.str\n  Input should be a valid string "
            "[type=string_type, input_value=['a', 'b'], input_type=list]\n    For further information visit https://errors.pydantic.dev\n"
            "stop.list[str]\n  List should have at most 4 items after validation, not 5 [type=too_long, input_value=[]",
            None,
            "stop: List should have at most 4 items after validation, not 5",
            "stop",
        ),
        (
            "1 validation error for ChatCompletionRequest\n  Value error, these do not go together [type=value_error]",
            None,
            "these do not go together",
            None,
        ),
        (
            "Grammar error: regex parse error:\n    (\n    ^\nerror: unclosed group",
            None,
            "response_format: this schema cannot be followed: regex parse error: unclosed group",
            "response_format",
        ),
        ("1 validation error for ChatCompletionRequest", None, "the request was refused", None),
        (
            "n must be 1 when using greedy sampling, got 4.",
            None,
            "n: at temperature 0 all answers are the same; ask for 1",
            "n",
        ),
        ("ValueError: no\nTraceback", "stop", "stop: no", "stop"),
        ("", None, "the request was refused", None),
    ],
)
def test_other_reasons_are_one_sentence(said, param, ours, our_param):
    assert in_our_words(said, param) == (ours, our_param)


def test_what_fails_inside_the_engine_stays_there():
    assert refusal("secret: /home/x", 500)["error"] == {
        "message": "the engine failed on this request",
        "code": 500,
        "param": None,
    }
    dead = refusal("EngineCore encountered an issue. See stack trace (above) for the root cause.", 500)["error"]
    assert dead["code"] == 503 and "stack trace" not in dead["message"]
    assert refusal("no", 400, "stop") == {"error": {"message": "stop: no", "code": 400, "param": "stop"}}
