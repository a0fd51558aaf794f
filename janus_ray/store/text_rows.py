"""Rows out of text files: JSON lines, JSON arrays, CSV; whoever wrote them, with whatever program.

What cannot be read for certain is refused with the line that an editor shows; nothing is guessed and no byte replaced.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import pyarrow as pa
from upath import UPath

from janus_ray.errors import DataError
from janus_ray.store.files import opened, read_bytes
from janus_ray.store.location import os_reason, storage_errors
from janus_ray.text import well_formed_values

LFS_POINTER = b"version https://git-lfs.github.com/spec"
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\x04\x22\x4d\x18": "lz4"}
_REFUSED = {
    LFS_POINTER: "is a Git LFS pointer, not the data itself: run `git lfs pull` where it was cloned",
    b"PK\x03\x04": "is a ZIP archive or an Excel workbook: unpack it, or save the sheet as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "is an old Excel workbook: save the sheet as CSV UTF-8",
    b"\xfd7zXZ": "is compressed with xz: unpack it",
}
_NOT_UTF8 = "not UTF-8: save it as UTF-8, or convert it with `iconv -f {} -t UTF-8`"
_DELIMITERS = ",;\t"
# A field longer than this is a quotation mark that was never closed.
_LONGEST_FIELD = 16 * 1024**2

Numbered = tuple[int, dict[str, Any]]


def text_rows(path: Path | UPath) -> Iterator[Numbered]:
    """The rows of a JSON or CSV file, each with the number of the line on which it begins.

    JSON may be one object per line or an array of objects; the content decides, not the ending. Files that end in .csv
    or .tsv are tables with a header. A byte order mark and gzip, zstd, bz2 or lz4 compression are fine.

    Raises:
        DataError: the file, the line, and what is wrong with it.
    """
    with _opened(path) as stream:
        ending = (
            path.suffix.lower()
            if path.suffix.lower() not in (".gz", ".zst", ".bz2", ".lz4")
            else PurePosixPath(path.stem).suffix
        )
        rows = _csv_rows(stream, path, ending) if ending in (".csv", ".tsv") else _json_rows(stream, path)
        yield from rows


def json_lines(path: Path | UPath) -> Iterator[Numbered]:
    """The rows of a file with one JSON object per line, and nothing else, numbered as `text_rows` does.

    Raises:
        DataError: the file, the line, and what is wrong with it.
    """
    with _opened(path) as stream:
        for number, line in enumerate(_lines(stream, path), start=1):
            if text := line.strip():
                yield number, _object(_parsed(text, path, number), path, number)


@contextmanager
def _opened(path: Path | UPath) -> Generator[TextIO]:
    """The file as text; bytes that are not UTF-8 become lone surrogates, which `_checked` refuses by line."""
    try:
        magic = read_bytes(path, 0, 64)
        for mark, problem in _REFUSED.items():
            if magic.startswith(mark):
                raise DataError(f"{path}: {problem}")
        kind = next((name for mark, name in _COMPRESSIONS.items() if magic.startswith(mark)), None)
        with opened(path) as plain, pa.input_stream(plain, compression=kind) as binary:
            yield io.TextIOWrapper(binary, encoding="utf-8", errors="surrogateescape", newline=None)
    except storage_errors() as error:
        raise DataError(f"{path}: cannot be read: {os_reason(error, path)}") from None


def _lines(stream: TextIO, path: Path | UPath) -> Iterator[str]:
    """The lines as an editor shows them.

    Raises:
        DataError: a line is not UTF-8.
    """
    for number, line in enumerate(stream, start=1):
        yield _checked(line, path, number)


def _checked(line: str, path: Path | UPath, number: int) -> str:
    if not line.isascii():
        try:
            line.encode()
        except UnicodeEncodeError:
            raw = line.encode("utf-8", "surrogateescape")
            utf16 = b"\0" in raw or raw.startswith((b"\xff\xfe", b"\xfe\xff"))
            guess = "UTF-16" if utf16 else "WINDOWS-1252"
            raise DataError(f"{path}, line {number}: {_NOT_UTF8.format(guess)}") from None
    if "\0" in line:
        raise DataError(f"{path}, line {number}: {_NOT_UTF8.format('UTF-16')}")
    # Also where two files with marks were joined.
    return line.lstrip("\ufeff")


def _json_rows(stream: TextIO, path: Path | UPath) -> Iterator[Numbered]:
    lines = _lines(stream, path)
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        if text.startswith("["):
            # Objects one per line would not begin so: what remains belongs to the same array.
            yield from _array_rows("\n" * (number - 1) + line + "".join(lines), path)
            return
        yield number, _object(_parsed(text, path, number), path, number)


def _array_rows(text: str, path: Path | UPath) -> Iterator[Numbered]:
    """The objects of a JSON array, each with the line on which it begins."""
    position, number = text.index("[") + 1, 1 + text.count("\n", 0, text.index("[") + 1)
    expected = "an object or ]"
    while True:
        following = _skip(text, position)
        number += text.count("\n", position, following)
        mark = text[following : following + 1]
        if mark == "]" and expected != "an object":
            break
        if not mark:
            raise DataError(f"{path}, line {number}: not valid JSON: the array ends without ]; the file seems cut off")
        if expected == ", or ]":
            if mark != ",":
                raise DataError(f"{path}, line {number}: not valid JSON: expected , or ] between two objects")
            position, expected = following + 1, "an object"
            continue
        value, position = _parsed_at(text, following, path, number)
        yield number, _object(value, path, number)
        number += text.count("\n", following, position)
        expected = ", or ]"
    rest = text[following + 1 :]
    if rest.strip():
        number += rest.count("\n", 0, len(rest) - len(rest.lstrip()))
        raise DataError(f"{path}, line {number}: not valid JSON: something follows the array's end")


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twins(next(name for name in names if names.count(name) > 1))
    return built


class _Twins(Exception):
    """One key stands twice in an object: readers differ in which of the values they take."""


_DECODER = json.JSONDecoder(object_pairs_hook=_without_twins)


def _parsed(text: str, path: Path | UPath, number: int) -> Any:
    value, end = _parsed_at(text, 0, path, number)
    if text[end:].strip():
        raise DataError(f"{path}, line {number}: not valid JSON: something follows the object (column {end + 1})")
    return value


def _parsed_at(text: str, position: int, path: Path | UPath, number: int) -> tuple[Any, int]:
    """The JSON value at a position, with well-formed texts, and the position behind it.

    Raises:
        DataError: what is wrong, by line.
    """
    try:
        value, end = _DECODER.raw_decode(text, position)
        return well_formed_values(value), end
    except json.JSONDecodeError as error:
        line = number + text.count("\n", position, error.pos)
        column = error.pos - max(text.rfind("\n", 0, error.pos), -1)
        cut = "; the file seems cut off" if not text[error.pos :].strip() else ""
        reason = f"not valid JSON: {error.msg} (column {column}){cut}"
        raise DataError(f"{path}, line {line}: {reason}") from None
    except RecursionError:
        reason = "nested too deeply"
    except _Twins as twins:
        reason = f"the key {_shown(str(twins))} stands twice in one object"
    except ValueError:
        reason = "holds a number with more digits than can be read"
    raise DataError(f"{path}, line {number}: {reason}")


def _object(value: Any, path: Path | UPath, number: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{path}, line {number}: expected a JSON object, found {type(value).__name__}")
    return value


def _csv_rows(stream: TextIO, path: Path | UPath, ending: str) -> Iterator[Numbered]:
    """The rows of a table with a header; fields are texts, and an empty one is an empty text."""
    lines = _lines(stream, path)
    first = next(lines, "")
    before = 0
    delimiter = "\t" if ending == ".tsv" else None
    if first.lower().startswith("sep=") and len(first.strip()) == 5:
        # Excel's own way to name the delimiter.
        delimiter, first, before = first.strip()[4], next(lines, ""), 1
    if not first.strip():
        if rest := next((line for line in lines if line.strip()), None):
            raise DataError(
                f"{path}, line {before + 1}: expected the names of the columns, found an empty line ({rest!r})"
            )
        return
    delimiter = delimiter or _delimiter(first, path)
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(_chain(first, lines), delimiter=delimiter, strict=True)
    begins = before + 1
    try:
        header = [name.strip() for name in next(reader)]
        _check_header(header, path, begins)
        begins = before + reader.line_num + 1
        for fields in reader:
            if fields and any(field.strip() for field in fields):
                if len(fields) != len(header):
                    raise DataError(f"{path}, line {begins}: {len(fields)} fields, but the header names {len(header)}")
                yield begins, dict(zip(header, fields, strict=True))
            begins = before + reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {begins}: not valid CSV: {error}") from None


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _delimiter(header: str, path: Path | UPath) -> str:
    """The one of comma, semicolon and tab that stands in the header outside quotes; a comma where none does."""
    bare = "".join(header.split('"')[::2])
    found = [delimiter for delimiter in _DELIMITERS if delimiter in bare]
    if len(found) > 1:
        raise DataError(
            f"{path}, line 1: cannot tell which of , ; and tab separates the columns: {_shown(header.strip())}"
        )
    return found[0] if found else ","


def _check_header(header: list[str], path: Path | UPath, number: int) -> None:
    twins = [name for name in header if header.count(name) > 1]
    if twins or "" in header:
        problem = f"names the column {_shown(twins[0])} twice" if twins and twins[0] else "has a column without a name"
        raise DataError(f"{path}, line {number}: the header {problem}")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
