"""Rows of files that other people and other programs wrote."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from janus_ray.errors import DataError
from janus_ray.store.fingerprint import fingerprint
from janus_ray.store.hub import model_folder
from janus_ray.store.tables import read_rows
from janus_ray.train.collection import read_collection

ROWS = [{"a": "ü", "n": 1}, {"a": "zwei", "n": None}]
LINES = '{"a": "ü", "n": 1}\n{"a": "zwei", "n": null}\n'
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 192000000\n"


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def zipped() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("xl/workbook.xml", "<xml/>")
    return sink.getvalue()


def values(path) -> list[dict]:
    return [row.values for row in read_rows(str(path))]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES.encode()),
        ("lines_by_another_ending.json", LINES.encode()),
        ("no_ending", LINES.encode()),
        ("array.json", json.dumps(ROWS, indent=2).encode()),
        ("array.jsonl", json.dumps(ROWS).encode()),
        ("array_from_a_database.json", ("\n\n[" + LINES.replace("\n", ",\n").rstrip(",\n") + "]\n").encode()),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("bom.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
        (
            "joined_with_cat.jsonl",
            b"\xef\xbb\xbf" + LINES.split("\n")[0].encode() + b'\n\xef\xbb\xbf{"a": "zwei", "n": null}',
        ),
        ("crlf.jsonl", LINES.replace("\n", "\r\n\r\n").encode()),
        ("old_mac.jsonl", LINES.replace("\n", "\r").encode()),
        ("no_last_newline.jsonl", LINES.rstrip().encode()),
        ("spaces.jsonl", LINES.replace("\n", "  \n \t\n").encode()),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("gzip_by_content.jsonl", gzip.compress(LINES.encode(), mtime=0)),
        ("a.jsonl.bz2", bz2.compress(LINES.encode())),
        ("a.jsonl.zst", pa.compress(LINES.encode(), codec="zstd", asbytes=True)),
        ("a.parquet", parquet(pa.Table.from_pylist(ROWS))),
        ("parquet_by_content.data", parquet(pa.Table.from_pylist(ROWS))),
    ],
)
def test_the_same_rows_however_they_are_written(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert values(tmp_path / name) == ROWS


@pytest.mark.parametrize(
    ("name", "text", "encoding"),
    [
        ("comma.csv", 'a,n\nü,1\n"zwei, oder\ndrei ""x""",\n', "utf-8"),
        ("from_excel.csv", 'a;n\r\nü;1\r\n"zwei, oder\r\ndrei ""x""";\r\n', "utf-8-sig"),
        ("tab.tsv", 'a\tn\nü\t1\n"zwei, oder\ndrei ""x"""\t\n', "utf-8"),
        ("said.csv", 'sep=;\na;n\nü;1\n;\n"zwei, oder\ndrei ""x""";\n\n', "utf-8"),
    ],
)
def test_tables_of_a_spreadsheet(tmp_path, name, text, encoding):
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert values(tmp_path / name) == [{"a": "ü", "n": "1"}, {"a": 'zwei, oder\ndrei "x"', "n": ""}]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "latin1.jsonl",
            '{"a": "x"}\n{"a": "ü"}\n'.encode("latin-1"),
            "line 2: not UTF-8: save it as UTF-8, or convert it",
        ),
        ("cp1252.json", '[\n{"a": "x"},\n{"a": "“ü”"}]'.encode("cp1252"), "line 3: not UTF-8"),
        (
            "utf16.jsonl",
            LINES.encode("utf-16"),
            "line 1: not UTF-8: save it as UTF-8, or convert it with `iconv -f UTF-16",
        ),
        (
            "utf16_without_mark.jsonl",
            b'{"a": 1}\n'.decode().encode("utf-16-le"),
            "line 1: not UTF-8: save it as UTF-8, or",
        ),
        ("latin1.csv", "a;n\nx;1\nü;2\n".encode("latin-1"), "line 3: not UTF-8"),
        ("utf16.tsv", "a\tn\nx\t1\n".encode("utf-16"), "`iconv -f UTF-16 -t UTF-8`"),
        ("digits.jsonl", b'{"a": 1}\n{"a": ' + b"9" * 5000 + b"}\n", "line 2: holds a number with more digits than"),
        ("nested.jsonl", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "line 1: nested too deeply"),
        ("nested.json", b"[\n" + b"[" * 100_000 + b"]" * 100_000 + b"]\n", "line 2: nested too deeply"),
        ("deep_but_read.jsonl", b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}\n", "line 1: nested too deeply"),
        ("cut.jsonl", b'{"a": 1}\n{"a": 2}\n{"a": "thr', "line 3: not valid JSON: Unterminated string"),
        ("cut_late.jsonl", b'{"a": 1}\n{"a": 2', "the file seems cut off"),
        ("garbage.jsonl", b'{"a": 1}\n{"a": 2} trailing\n', "line 2: not valid JSON: something follows the object"),
        ("log.jsonl", b'{"a": 1}\n\nDone.\n', "line 3: not valid JSON: Expecting value (column 1)"),
        (
            "cut.json",
            b'[{"a": 1},\n{"a": 2}',
            "line 2: not valid JSON: the array ends without ]; the file seems cut off",
        ),
        ("cut_after_comma.json", b'[{"a": 1},\n', "the file seems cut off"),
        ("cut_inside.json", b'[{"a": 1},\n\n{"a":\n', "line 4: not valid JSON: Expecting value"),
        ("comma.json", b'[{"a": 1},\n]', "line 2: not valid JSON: Expecting value"),
        ("no_comma.json", b'[{"a": 1}\n{"a": 2}]', "line 2: not valid JSON: expected , or ] between two objects"),
        ("two_arrays.json", b'[{"a": 1}]\n[{"a": 2}]', "line 2: not valid JSON: something follows the array's end"),
        ("texts.json", b'[\n\n"a"]', "line 3: expected a JSON object, found str"),
        ("number.jsonl", b'{"a": 1}\n5\n', "line 2: expected a JSON object, found int"),
        ("twins.jsonl", b'{"a": 1, "b": 2, "a": 3}\n', "line 1: the key 'a' stands twice in one object"),
        ("pretty.json", b'{\n  "a": 1\n}\n', "line 1: not valid JSON"),
        ("pointer.jsonl", LFS, "is a Git LFS pointer, not the data itself"),
        ("pointer.parquet", LFS, "is a Git LFS pointer, not the data itself"),
        ("book.xlsx", zipped(), "is a ZIP archive or an Excel workbook: unpack it, or save the sheet as CSV UTF-8"),
        ("cut.jsonl.gz", gzip.compress(LINES.encode() * 50)[:40], "cannot be read"),
        ("empty.parquet", b"", "is empty, not a Parquet file"),
        ("cut.parquet", parquet(pa.Table.from_pylist(ROWS))[:-20], "not a Parquet file (it seems cut off)"),
        ("magic.parquet", b"PAR1", "not a Parquet file (it seems cut off)"),
        ("fields.csv", b"a,n\n1,2\n3,4,5\n", "line 3: 3 fields, but the header names 2"),
        ("header.csv", b"a,a\n1,2\n", "line 1: the header names the column 'a' twice"),
        ("nameless.csv", b"a,,b\n1,2,3\n", "line 1: the header has a column without a name"),
        ("mixed.csv", b"a,b;c\n1,2;3\n", "line 1: cannot tell which of , ; and tab separates the columns"),
        ("quote.csv", b'a,b\n1,"2\n3,4\n', "line 2: not valid CSV"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and " " not in value else "",
)
def test_what_cannot_be_read_for_certain_is_one_line_with_its_line(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        values(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_parquet_text_that_is_not_utf8_is_named_by_its_row(tmp_path):
    raw = pa.array([b"fine"] * 2000 + [b"\xff"] + [b"fine"] * 50, pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    (tmp_path / "a.parquet").write_bytes(parquet(pa.table({"a": text})))
    with pytest.raises(DataError, match=r"a\.parquet, row 2001: a text is not UTF-8"):
        values(tmp_path / "a.parquet")


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["a", "a"])
    (tmp_path / "a.parquet").write_bytes(parquet(table))
    with pytest.raises(DataError, match="two columns are named 'a'"):
        values(tmp_path / "a.parquet")


def test_places_are_those_that_an_editor_shows(tmp_path):
    (tmp_path / "part-0.json").write_text('\n[{"n": 1}, {"n": 2},\n\n {"n":\n 3}, {"n": 4}]')
    (tmp_path / "part-1.json").write_text('{"n": 5}\n\n\n{"n": 6}\n')
    (tmp_path / "manifest.json").write_text("{}")
    assert [(row.place, row.values["n"]) for row in read_rows(str(tmp_path))] == [
        ("part-0.json, line 2", 1),
        ("part-0.json, line 2", 2),
        ("part-0.json, line 4", 3),
        ("part-0.json, line 5", 4),
        ("part-1.json, line 1", 5),
        ("part-1.json, line 4", 6),
    ]
    (tmp_path / "a.csv").write_text('n,t\n\n1,"two\nlines"\n2,x\n')
    assert [row.place for row in read_rows(str(tmp_path / "a.csv"))] == ["line 3", "line 5"]
    (tmp_path / "a.parquet").write_bytes(parquet(pa.table({"n": [1, 2]})))
    assert [row.place for row in read_rows(str(tmp_path / "a.parquet"))] == ["row 1", "row 2"]


def test_a_folder_is_read_by_split_and_never_its_ledger(tmp_path):
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(json.dumps({"from": name}))
    assert values(tmp_path) == [{"from": "train.jsonl"}]
    assert [row.values for row in read_rows(str(tmp_path), split="test")] == [{"from": "test.jsonl"}]
    ours = tmp_path / "unfinished"
    (ours / "ledger").mkdir(parents=True)
    (ours / "ledger" / "1.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"holds no \.parquet file"):
        values(ours)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    content=st.binary(max_size=60)
    | st.text(st.sampled_from('[]{}":,;\t\n\r \\u\ud8000aé\ufeff"'), max_size=60).map(
        lambda text: text.encode("utf-8", "surrogatepass")
    ),
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet"]),
    magic=st.sampled_from([b"", b"PAR1", b"\x1f\x8b", b"\xef\xbb\xbf", b"[", b'{"a":']),
)
def test_hostile_files_give_rows_or_an_error_of_ours(tmp_path, content, name, magic):
    (tmp_path / name).write_bytes(magic + content)
    try:
        for row in read_rows(str(tmp_path / name)):
            json.dumps(row.values, ensure_ascii=False).encode()
    except DataError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["x" * 256, "a/" * 2100, "circle"])
@pytest.mark.parametrize("look", [lambda path: next(read_rows(path)), read_collection, fingerprint, model_folder])
def test_a_path_that_the_system_does_not_follow_is_one_line(tmp_path, name, look):
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(DataError, match=r"cannot be read: (File name too long|Too many levels)") as caught:
        look(str(tmp_path / name))
    assert "\n" not in str(caught.value)
