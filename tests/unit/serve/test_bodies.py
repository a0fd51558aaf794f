"""From bytes to one JSON object: what is read, and what is refused in our words."""

from __future__ import annotations

import json

import pytest

from janus_ray.serve.bodies import read_object
from janus_ray.serve.refusals import ApiError

JSON = "application/json"


def refused(raw: bytes, content_type: str | None = JSON) -> str:
    with pytest.raises(ApiError) as caught:
        read_object(raw, content_type)
    assert caught.value.status == 400
    assert caught.value.message.isprintable() and len(caught.value.message) < 300
    return caught.value.message


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "the body is empty"),
        (b" \n\t", "the body is empty"),
        (b"\xef\xbb\xbf", "the body is empty"),
        (b"{nonsense", "not valid JSON: expecting property name"),
        (b'{"a": 1} {}', "not valid JSON: extra data (line 1, column 10)"),
        (b'{"a": 1,}', "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": "\n"}', "not valid JSON"),
        (b"null", "must be a JSON object"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"5", "must be a JSON object"),
        (b'{"a": 1, "b": 2, "a": 1}', "the name 'a' stands twice"),
        (b'{"m": [{"role": "user", "role": "system"}]}', "the name 'role' stands twice"),
        (b'{"\\u0061": 1, "a": 2}', "the name 'a' stands twice"),
        (b'{"\\ud83d": 1, "\\ud83e": 2}', "stands twice"),
        (b'{"a": NaN}', "a: NaN is not a JSON number"),
        (b'{"a": [Infinity]}', "a.0: Infinity is not a JSON number"),
        (b'{"a": {"b": -Infinity}}', "a.b: -Infinity is not a JSON number"),
        (b'{"a": 1e999}', "a: this number is too large: '1e999'"),
        (b'{"a": -1e400}', "too large"),
        (b'{"a": ' + b"7" * 5000 + b"}", "a: this number has 5000 digits"),
        (b'{"a": -' + b"7" * 100_000 + b"}", "digits"),
        (b"[" * 100_000, "nested more than 64 levels"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested more than 64 levels"),
        (b'{"a":' + b"[" * 65 + b"]" * 65 + b"}", "nested more than 64 levels"),
        ('{"a": "é"}'.encode("latin-1"), "must be UTF-8; byte 7 is not"),
        (b'{"a": "\xed\xa0\xbd"}', "must be UTF-8; byte 7 is not"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
        ('{"a": 1}'.encode("utf-16-le"), "UTF-16"),
        ('{"a": 1}'.encode("utf-16-be"), "UTF-16"),
        ('{"a": 1}'.encode("utf-32"), "UTF-16 or UTF-32"),
        ('{"a": 1}'.encode("utf-32-be"), "UTF-16 or UTF-32"),
        (b'{"a\\n\\u2028": 1, "a\\n\\u2028": 1}', "stands twice"),
    ],
    ids=lambda value: repr(value[:24]),
)
def test_what_two_readers_could_read_differently_is_refused(raw, words):
    assert words in refused(raw)


@pytest.mark.parametrize(
    ("raw", "content_type"),
    [
        (b"model=m&messages=x", "application/x-www-form-urlencoded"),
        (b"--x\r\n\r\n{}", "multipart/form-data; boundary=x"),
        (b"<a/>", "application/xml"),
        (b"hello", "text/plain; charset=utf-8"),
    ],
)
def test_another_kind_of_body_is_refused_by_its_name(raw, content_type):
    assert (
        f"not valid JSON: expecting value (line 1, column 1); it was sent as '{content_type.split(';')[0]}'"
        in refused(raw, content_type)
    )


@pytest.mark.parametrize("charset", ["utf-16", "latin-1", "cp1252"])
def test_another_encoding_is_refused_where_it_matters(charset):
    assert f"must be UTF-8, not '{charset}'" in refused('{"a": "é"}'.encode(), f"{JSON}; charset={charset}")
    assert read_object(b'{"a": 1}', f"{JSON}; charset={charset}") == {"a": 1}


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        JSON,
        "Application/JSON",
        f"{JSON};charset=UTF-8",
        f'{JSON}; charset="utf8"',
        "application/x.y+json",
        f"{JSON}; charset",
        f"{JSON}; charset=utf-8-sig",
        "application/x-www-form-urlencoded",
        "text/plain",
        "é/ü",
        ";;;",
        "json",
    ],
)
def test_json_by_any_name_is_read(content_type):
    assert read_object('{"a": "é"}'.encode(), content_type) == {"a": "é"}


def test_what_nobody_could_misread_is_read():
    assert read_object(b'\xef\xbb\xbf {"a": "\xc3\xa9"} ', JSON) == {"a": "é"}
    assert read_object(b'{"a": "ok \\ud83d", "\\ude00": ["\\ud83d\\ude00"]}', JSON) == {
        "a": "ok \ufffd",
        "\ufffd": ["😀"],
    }
    assert read_object(b'{"a": 12345678901234567890123, "b": 0.1, "c": 1e300}', JSON) == {
        "a": 12345678901234567890123,
        "b": 0.1,
        "c": 1e300,
    }
    deep = b'{"a":' + b"[" * 63 + b"]" * 63 + b"}"
    assert read_object(deep, JSON) == json.loads(deep)
