"""What an endpoint says when it refuses."""

from __future__ import annotations

import json

import pytest

from janus_ray.llm.faults import fault_message, kind_of, parsed, rejects_response_format


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"error": {"message": "bad field"}}, "bad field"),
        ({"error": {"message": ["one", "two"]}}, "one; two"),
        ({"error": "just text"}, "just text"),
        ({"message": "bad field", "error": "Bad Request"}, "bad field"),
        ({"detail": "Not enabled"}, "Not enabled"),
        ({"detail": [{"loc": ["body", "top_p"], "msg": "too large"}]}, "body.top_p: too large"),
        ([{"error": {"message": "in a list"}}], "in a list"),
        (["words", 3], "words"),
        ("a JSON text", "a JSON text"),
        ({"errors": [{"code": 1, "message": "first"}, {"message": "second"}]}, "first; second"),
        ({"error": {"error": {"message": "deep"}}}, "deep"),
        ({"error": {"code": 17}}, '{"error": {"code": 17}}'),
        ({"error": {"message": "half \ud83d"}}, "half �"),
    ],
)
def test_the_providers_words_are_shown(content, words):
    body = parsed(json.dumps(content).encode())
    assert fault_message(400, body) == f"HTTP 400: {words}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"plain text", "HTTP 502: plain text"),
        (b"<html><head><title>502 Bad Gateway</title></head><body>x</body></html>", "HTTP 502: 502 Bad Gateway"),
        (b"<html><style>p {}</style><p>Try &amp; wait</p></html>", "HTTP 502: Try & wait"),
        (b"", "HTTP 502: Bad Gateway"),
        (b"{}", "HTTP 502: Bad Gateway"),
        (b"\xff\xfe", "HTTP 502: \ufffd\ufffd"),
    ],
)
def test_bodies_that_are_no_json(content, message):
    assert fault_message(502, parsed(content)) == message
    assert fault_message(799, parsed(b"")) == "HTTP 799: without a word"
    assert len(fault_message(502, parsed(b"<title" * 50_000))) < 5000


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, {}, "bad_request"),
        (404, {}, "bad_request"),
        (422, {}, "bad_request"),
        (401, {}, "auth"),
        (403, {}, "auth"),
        (402, {}, "quota"),
        (429, {}, "rate_limit"),
        (429, {"error": {"code": "insufficient_quota"}}, "quota"),
        (429, {"error": {"type": "insufficient_quota"}}, "quota"),
        (408, {}, "server"),
        (500, {}, "server"),
        (529, {}, "server"),
        (400, {"error": {"code": "content_filter"}}, "content_filter"),
        (400, {"error": {"code": "x", "innererror": {"code": "ResponsibleAIPolicyViolation"}}}, "content_filter"),
        (400, {"error": {"type": "content_policy_violation"}}, "content_filter"),
        (400, {"code": "data_inspection_failed"}, "content_filter"),
        (400, {"error": {"code": "content-filter"}}, "content_filter"),
        (400, {"error": {"code": 400, "metadata": {"raw": '{"error": {"code": "content_filter"}}'}}}, "content_filter"),
        (403, {"error": {"code": 403, "metadata": {"flagged_input": "x"}}}, "content_filter"),
        (429, {"error": {"code": "content_filter"}}, "rate_limit"),
        (400, {"error": {"message": "content_filter is a field we do not know"}}, "bad_request"),
        # With an error status the status decides, and not a number inside.
        (400, {"error": {"code": 502}}, "bad_request"),
        (200, {"error": {"code": 404}}, "bad_request"),
        (200, {"error": {"code": 1e999}}, "server"),
        (200, {"error": {"code": [429]}}, "server"),
        (200, "text", "server"),
    ],
)
def test_the_kind_of_a_fault(status, body, kind):
    assert kind_of(status, body) == kind


@pytest.mark.parametrize(
    ("status", "error", "refused"),
    [
        (400, {"message": "Invalid parameter", "param": "response_format"}, True),
        (400, {"message": "'response_format' of type 'json_schema' is not supported with this model"}, True),
        (422, {"message": "response_format.type: should be 'text' or 'json_object'"}, True),
        (400, {"message": "This model does not support structured outputs", "param": None}, True),
        (400, {"message": "no JSON mode here", "param": 3}, True),
        (400, {"message": "max_tokens is too large"}, False),
        (400, {"message": "too long for response_format", "param": "messages"}, False),
        (429, {"message": "response_format"}, False),
        (500, {"message": "response_format"}, False),
    ],
)
def test_which_refusals_are_about_the_response_format(status, error, refused):
    assert rejects_response_format(status, {"error": error}) == refused


def test_a_refusal_that_is_no_object_may_be_about_the_format_too():
    assert rejects_response_format(400, "unknown field: response_format")
    assert rejects_response_format(422, {"detail": [{"loc": ["body", "response_format"], "msg": "extra"}]})
    assert not rejects_response_format(
        422, {"detail": [{"loc": ["body", "seed"], "msg": "extra", "input": "json_schema"}]}
    )
