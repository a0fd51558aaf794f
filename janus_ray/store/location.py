"""Where a path of a recipe leads: one kind of object for file systems and object storages, and its errors in words.

A location is a `UPath`: of a file system it is a `pathlib.Path` as any other, of an object storage it has the same
methods without being one. Credentials, regions and addresses come from where each storage's own tools read them
(AWS_*, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_*; env.py has the list).
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

from upath import UPath
from upath.implementations.cloud import AzurePath
from upath.registry import register_implementation

from janus_ray.errors import DataError, JanusError
from janus_ray.paths import is_url, spelled_path
from janus_ray.text import one_line

_SHOWN_CHARACTERS = 200
# Listings are never kept: other processes write where we read.
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"use_listings_cache": False},
    "gs": {"use_listings_cache": False},
    "abfs": {"use_listings_cache": False},
}
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "abfs": "adlfs"}
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or a role of the machine",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or a service account of the machine",
    "abfs": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_CONNECTION_STRING",
}
_ADDRESSES = {"s3": ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"), "gs": ("STORAGE_EMULATOR_HOST",), "abfs": ()}
_LIKE_A_URL = re.compile(r"[A-Za-z0-9+.-]+:[:/]")
_ADDRESS = re.compile(r"https?://[^\s/]+")
# What the storages' clients raise beside OSError, by module: it is looked up only where that module is loaded.
_CLIENT_ERRORS = {
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "aiohttp": ("ClientError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "gcsfs.retry": ("HttpError",),
    "azure.core.exceptions": ("AzureError",),
}
# Codes of S3 behind which credentials stand, whatever exception carries them.
_REFUSED = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired")
# The same of Azure.
_REFUSED += ("AuthenticationFailed", "AuthorizationFailure", "AuthorizationPermissionMismatch", "AccessDenied")
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")
_BUSY = ("SlowDown", "ServiceUnavailable", "ServerBusy", "TooManyRequests", "rateLimitExceeded", "RequestLimitExceeded")
# A code alone where an answer has no body.
_PASSING = (*_BUSY, "InternalError", "RequestTimeout", "500", "502", "503", "504", "429")


def location(reference: str | Path | UPath) -> UPath:
    """The location that a path or URL names; nothing is looked at yet.

    Raises:
        DataError: it is no path that we read, the scheme's package is missing, or its client cannot be set up.
    """
    if isinstance(reference, UPath):
        return reference
    text = os.fspath(reference)
    # Path("s3://...") is a folder of that name.
    assert not isinstance(reference, Path) or not re.match(r"(s3|gs|abfs):/", text), text
    try:
        # A path that a program put together needs no check of its names; the system says what is wrong with them.
        text = spelled_path(text) if not isinstance(reference, Path) else text
    except ValueError as error:
        raise DataError(f"{one_line(text)[:_SHOWN_CHARACTERS]}: {error}") from None
    if is_url(text):
        return _remote(text)
    # A name that universal-pathlib would take for a URL or a chain of them, and that is none.
    return UPath(os.path.abspath(text) if _LIKE_A_URL.match(str(Path(text))) else text)


class _AccountPath(AzurePath):
    """A location on Azure whose text names its account again, where its URL did: it leads back to the same place."""

    __slots__ = ()

    def __str__(self) -> str:
        text, account = super().__str__(), self.storage_options.get("account_name")
        if not account or not text.startswith("abfs://"):
            return text
        container, slash, key = text.removeprefix("abfs://").partition("/")
        return f"abfs://{container}@{account}.dfs.core.windows.net{slash}{key}"


register_implementation("abfs", _AccountPath, clobber=True)


def is_local(where: Path | UPath) -> TypeGuard[Path]:
    """Whether a location lies on a file system: it then has a path that every library takes."""
    return isinstance(where, Path)


def _remote(url: str) -> UPath:
    scheme = url.partition("://")[0]
    for variable in _ADDRESSES[scheme]:
        if (address := os.environ.get(variable)) and not _ADDRESS.match(address):
            raise DataError(f"{url}: {variable} must be an http:// or https:// address")
    # What its client says on the way is said again in one line, or retried.
    logging.getLogger(_PACKAGES[scheme]).setLevel(logging.CRITICAL)
    found = UPath(url, **_OPTIONS[scheme])
    try:
        _ = found.fs
        if scheme == "s3":
            # Some of what S3 answers in passing reaches its client without the codes that it knows.
            sys.modules["s3fs.core"].set_custom_error_handler(_passes)
    except ImportError:
        package = _PACKAGES[scheme]
        raise DataError(f"{url}: {scheme}:// needs the package {package}: pip install {package}") from None
    except ValueError as error:
        # adlfs says it so.
        said = "no account is named" if "Must provide" in str(error) else _first_line(error)
        raise DataError(f"{url}: {said}; set {_CREDENTIALS[scheme]}") from None
    return found


def _passes(error: Exception) -> bool:
    """Whether S3 may answer the same request in another moment."""
    return error_code(error) in _PASSING


def object_revision(where: UPath, info: Mapping[str, Any]) -> str:
    """What an object storage's listing says of an object's content: its size and a checksum, or its version.

    Raises:
        DataError: the storage says nothing that changes with the content.
    """
    settings = info.get("content_settings") or {}
    md5 = settings.get("content_md5") if isinstance(settings, Mapping) else getattr(settings, "content_md5", None)
    candidates = (info.get("md5Hash"), info.get("crc32c"), bytes(md5).hex() if md5 else None, info.get("ETag"))
    known = next(filter(None, (*candidates, info.get("etag"), info.get("generation"))), None)
    if known is None:
        raise DataError(f"{where}: its storage says neither a checksum nor a version of it; copy it to a local folder")
    return f"{info.get('size')} {str(known).strip(chr(34))}"


def in_time(where: UPath, act: str, *arguments: Any, longest_s: float, **named: Any) -> Any:
    """Calls a method of an object storage's client that writes, for so long.

    The clients' own limits miss a case: aiohttp starts none while it waits for leave to send a body (100 Continue).

    Raises:
        TimeoutError: there was no answer.
    """
    from fsspec.asyn import sync

    system: Any = where.fs
    return sync(system.loop, getattr(system, f"_{act}"), *arguments, timeout=longest_s, **named)


def storage_errors() -> tuple[type[Exception], ...]:
    """What reading and writing a location may raise; evaluated when something was raised, by `except` itself."""
    found: list[type[Exception]] = [OSError]
    for module, names in _CLIENT_ERRORS.items():
        if loaded := sys.modules.get(module):
            found += [getattr(loaded, name) for name in names]
    return tuple(found)


@contextmanager
def one_line_errors(
    where: Path | UPath | str, what: str = "cannot be read", kind: type[JanusError] = DataError
) -> Generator[None]:
    """Turns what a storage raises into one line: where, what, and why.

    Raises:
        JanusError: of the given kind.
    """
    try:
        yield
    except storage_errors() as error:
        raise kind(f"{one_line(str(where))}: {what}: {os_reason(error, where)}") from None


def os_reason(error: Exception, where: Path | UPath | str = "") -> str:
    """What a file system or a storage's client says, in words on one line.

    Args:
        error: what was raised; other libraries' OSErrors may hold no code.
        where: the location, whose scheme says which credentials were meant.
    """
    scheme = str(where).partition("://")[0]
    if scheme not in _PACKAGES:
        if isinstance(error, OSError) and error.errno:
            return os.strerror(error.errno)
        return getattr(error, "strerror", None) or _first_line(error)
    return _storage_reason(error, scheme)


def said_by_a_storage(error: BaseException) -> str | None:
    """What a storage's client says in an exception that no reader or writer of ours has met; None for any other."""
    for each in (error, error.__cause__):
        module = type(each).__module__
        scheme = next((scheme for start, scheme in _CLIENTS.items() if module.startswith(start)), None)
        if scheme and isinstance(each, Exception):
            return _storage_reason(each, scheme)
    return None


_CLIENTS = {"botocore.": "s3", "google.auth.": "gs", "gcsfs.": "gs", "azure.": "abfs"}


def _storage_reason(error: Exception, scheme: str) -> str:
    code, said = error_code(error), _first_line(error)
    title = type(error).__name__
    if title in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"):
        return f"no credentials ({said}): set {_CREDENTIALS[scheme]}"
    if is_no_bucket(error):
        return "no such container" if scheme == "abfs" else "no such bucket"
    if code in _BUSY or any(text in said for text in _BUSY) or code in ("503", "429"):
        return f"the storage asks for fewer requests, also after retries ({code or said})"
    unauthorised = isinstance(error, PermissionError) or code in (*_REFUSED, "401", "403") or title in _GOOGLE_OR_AZURE
    if unauthorised:
        return (
            f"the storage refuses these credentials ({_with_code(said, code)}); they come from {_CREDENTIALS[scheme]}"
        )
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, TimeoutError) and not str(error):
        return "no answer in time"
    if isinstance(error, OSError) and error.errno == errno.EIO and not said:
        return os.strerror(error.errno)
    return _with_code(said, code)


def is_no_bucket(error: BaseException) -> bool:
    """Whether an error says that there is no such bucket or container."""
    return error_code(error) in _NO_BUCKET or any(text in str(error) for text in _NO_BUCKET)


# Named by their classes, because looking at them must not import those libraries.
_GOOGLE_OR_AZURE = ("RefreshError", "ClientAuthenticationError", "TransportError")


def error_code(error: BaseException) -> str:
    """The storage's own code of an error, also where another error was made of it; empty where there is none."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        found = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
        found = found or getattr(seen, "error_code", None) or getattr(seen, "code", None)
        # Azure's are an enumeration.
        found = getattr(found, "value", found)
        if found and isinstance(found, str | int):
            return str(found)
        seen = seen.__cause__
    return ""


def _with_code(said: str, code: str) -> str:
    return said if not code or code in said else f"{code}: {said}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = (lines[0] if lines else "")[:_SHOWN_CHARACTERS]
    return one_line(said) or type(error).__name__
