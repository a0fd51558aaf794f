from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import adlfs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from upath import UPath

from janus_ray.config import PathText, Recipe, validate
from janus_ray.errors import ConfigError, DataError
from janus_ray.paths import checked_path, is_inside, is_url, spelled_path
from janus_ray.store.files import arrow_filesystem
from janus_ray.store.location import is_local, location


class Reading(Recipe):
    data: PathText
    """Where from."""


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        (" S3A://bucket/a/b/ ", "s3://bucket/a/b"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a b%20c#d/ü*[x]", "s3://bucket/a b%20c#d/ü*[x]"),
        ("gcs://bucket/a", "gs://bucket/a"),
        ("az://container/a", "abfs://container/a"),
        ("abfss://c@account.dfs.core.windows.net/a", "abfs://c@account.dfs.core.windows.net/a"),
        ("file:///tmp/a b", "/tmp/a b"),
        ("FILE:/tmp/a", "/tmp/a"),
        ("file://localhost/tmp/a", "/tmp/a"),
        ("runs/a:b", "runs/a:b"),
        ("a:b", "a:b"),
        ("./s3:/a", "./s3:/a"),
        ("org/name@main", "org/name@main"),
        ("~", os.path.expanduser("~")),
    ],
)
def test_a_path_has_one_spelling(written, meant):
    assert checked_path(written) == meant
    assert checked_path(meant) == meant
    assert validate(Reading, {"data": written}, "r.toml").data == meant


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("s3:/bucket/a", "must be written s3://bucket/..."),
        ("s3:bucket/a", "must be written s3://bucket/..."),
        ("s3:///a", "must name a bucket"),
        ("s3://", "must name a bucket"),
        ("s3://bucket//a", "must not hold //"),
        ("s3://bucket/a/../b", "must not hold"),
        ("s3://bucket/./b", "must not hold"),
        ("s3://bucket/a?versionId=3", "must not hold ?"),
        ("s3://bu cket/a", "a bucket has letters"),
        ("s3://bucket/" + "x" * 1025, "at most 1024 bytes"),
        ("hf://datasets/org/name", "hf://: unknown kind of path (what lies on the hub is named org/name)"),
        ("http://host/a", "http://: unknown kind of path; allowed: a local path, s3://bucket/..."),
        ("simplecache::s3://bucket/a", "simplecache::s3://: unknown kind of path"),
        ("C:/Users", "C://: unknown kind of path"),
        ("memory://x", "unknown kind of path"),
        ("file://host/a", "must be written file:///folder/name"),
        ("abfs:///a", "must name a container"),
    ],
)
def test_what_could_be_misread_as_a_local_folder_is_refused(written, reason):
    with pytest.raises(ConfigError) as caught:
        validate(Reading, {"data": written}, "r.toml")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError):
        location(written)


def test_a_secret_in_a_url_is_refused_and_not_shown():
    for url in ("s3://AKIA123:hunter2secret@bucket/a", "gs://hunter2secret@bucket/x", "abfs://hunter2secret:x@y/z"):
        with pytest.raises(ConfigError) as caught:
            validate(Reading, {"data": url}, "r.toml")
        assert "hunter2" not in str(caught.value)


@settings(max_examples=60)
@given(
    text=st.builds(
        "".join,
        st.lists(
            st.sampled_from(
                [
                    "s3",
                    "S3",
                    "gs",
                    "abfs",
                    "file",
                    "hf",
                    ":",
                    "/",
                    "//",
                    "://",
                    "::",
                    "@",
                    "?",
                    "..",
                    ".",
                    "~",
                    " ",
                    "\n",
                ]
            )
            | st.text(max_size=4),
            max_size=8,
        ),
    )
)
@example("s3://b/a\ud800")
@example("s3s3::")
@example("~\n")
@example("./s3:/a")
def test_any_text_is_a_location_of_the_same_name_or_one_line(text):
    try:
        found = location(text)
    except DataError as error:
        assert "\n" not in str(error)
        return
    path = spelled_path(text)
    if is_url(path):
        assert not is_local(found) and path.endswith(found.path.rstrip("/"))
        assert text.strip().lower().startswith(("s3://", "s3a://", "gs://", "gcs://", "abfs", "az://"))
    else:
        assert isinstance(found, Path) and found.absolute() == Path(path).absolute()
        assert (found / "a::b").name == "a::b" and (found / "x").parent == found


def test_a_location_of_a_file_system_is_a_path_as_any_other():
    assert isinstance(location("/tmp/x"), Path) and location("/tmp/x") == Path("/tmp/x")
    assert location(Path("a")) == Path("a")
    remote = location("s3://bucket/a")
    assert location(remote) is remote and not isinstance(remote, Path)
    with pytest.raises(AssertionError):
        location(Path("s3://bucket/a"))


@pytest.mark.parametrize(
    ("outer", "inner", "inside"),
    [
        ("s3://bucket/a", "s3://bucket/a", True),
        ("s3://bucket/a", "s3://bucket/a/b", True),
        ("s3://bucket/a", "s3://bucket/ab", False),
        ("s3://bucket", "s3://bucket/a", True),
        ("s3://bucket/a", "gs://bucket/a", False),
        ("/", "s3://bucket/a", False),
        ("/tmp/a", "/tmp/a/../a/b", True),
        ("/tmp/a", "/tmp/ab", False),
    ],
)
def test_what_lies_inside_a_folder(outer, inner, inside):
    assert is_inside(inner, outer) is inside


def test_every_kind_of_storage_has_its_client(monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    for url, client in (
        ("s3://b/x", "S3FileSystem"),
        ("gs://b/x", "GCSFileSystem"),
        ("abfs://c/x", "AzureBlobFileSystem"),
    ):
        found = location(url)
        assert type(found.fs).__name__.endswith(client.removeprefix("GCS")), type(found.fs)
        system, path = arrow_filesystem(url)
        assert path == url.partition("://")[2] and system.handler.fs is found.fs
    named = location("abfs://c@other.dfs.core.windows.net/x")
    assert named.fs.account_name == "other"
    # What is written down leads back to the same account.
    assert str(named / "y") == "abfs://c@other.dfs.core.windows.net/x/y" and location(str(named)) == named
    assert pickle.loads(pickle.dumps(named)) == named and named.parent / "x" == named


def test_what_is_missing_for_a_storage_is_one_line(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(DataError, match=r"s3://b/x: AWS_ENDPOINT_URL must be an http:// or https:// address"):
        location("s3://b/x")
    for variable in [name for name in os.environ if name.startswith("AZURE_STORAGE")]:
        monkeypatch.delenv(variable)
    adlfs.AzureBlobFileSystem.clear_instance_cache()
    with pytest.raises(DataError, match=r"abfs://c/x: no account is named; set AZURE_STORAGE_ACCOUNT_NAME and"):
        location("abfs://c/x")

    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setattr(sys.modules["s3fs"].S3FileSystem, "__init__", missing)
    monkeypatch.setattr(UPath, "fs", property(missing))
    with pytest.raises(DataError, match=r"s3://b/x: s3:// needs the package s3fs: pip install s3fs"):
        location("s3://b/x")
