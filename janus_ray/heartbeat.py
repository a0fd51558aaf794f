"""Noticing that a Ray cluster does not answer: before a job starts on it, and while the job runs.

Ray itself tries for more than a minute, prints the ends of its logs meanwhile, and then ends the process from within
without a word. Nothing here asks Ray anything, because such a question would wait as well.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from janus_ray.store.log import flush_all

_CONNECT_S = 10.0
# For a head that is busy with other things.
_HEAD_ANSWERS_S = 10.0
_INTERVAL_S = 2.0
_PROBE_S = 5.0
# A head with a store of its own (Redis) may be started again: Ray's workers wait for it for 60 s.
_HEAD_GRACE_S = 40.0
# What a head answers by the name it has had since Ray 2.0, to an empty request.
_ARE_YOU_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"


class Address(NamedTuple):
    """A host and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address | None:
    """Host and port of "host:port" or "[::1]:port"; None where the text is neither."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (host and port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        return None
    return Address(host, int(port))


def why_silent(address: Address, timeout_s: float = _CONNECT_S) -> str | None:
    """Why nothing listens at an address; None where something does."""
    try:
        with socket.create_connection(address, timeout=timeout_s):
            return None
    # A name that cannot be encoded is a UnicodeError.
    except (OSError, UnicodeError) as error:
        return (error.strerror if isinstance(error, OSError) else None) or str(error)


def why_no_head(address: Address, timeout_s: float = _HEAD_ANSWERS_S) -> str | None:
    """Why an address where something listens is not the head of a Ray cluster; None where it is.

    A head that asks for a token first is one.
    """
    import grpc

    # A proxy finds another machine, or none; Ray does not use it either.
    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(str(address), options=options) as channel:
        ask = channel.unary_unary(_ARE_YOU_ALIVE, request_serializer=bytes, response_deserializer=bytes)
        try:
            ask(b"", timeout=timeout_s)
        except grpc.RpcError as error:
            code = error.code()  # ty: ignore[missing-attribute]
            if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                return None
            if code == grpc.StatusCode.DEADLINE_EXCEEDED:
                return f"what listens there said nothing for {timeout_s:g} s"
            return "what listens there is not the head of a Ray cluster"
    return None


def why_lost(head: Address, own: Address) -> str | None:
    """What of a cluster has gone, in words; None where both its head and Ray's process on this machine answer."""
    if reason := why_silent(own, _PROBE_S):
        # The process is ours and on this machine: nothing starts it again.
        return f"Ray's own process on this machine ({own}) has ended ({reason.lower()})"
    if reason := why_silent(head, _PROBE_S):
        return f"the head of the Ray cluster at {head} does not answer ({reason.lower()})"
    return None


@contextmanager
def watched(head: Address, own: Address, *, head_may_return: bool, ending: Callable[[], bool]) -> Generator[None]:
    """Within the block, a cluster that has gone is said in one line, and ends the process with exit code 2.

    At once, as a signal does: whatever a job writes is whole or absent, and what waits for Ray would wait for long.

    Args:
        head: where the cluster's head listens.
        own: where Ray's process on this machine listens.
        head_may_return: whether somebody may start the head again; it is then waited for.
        ending: whether the job is on its way out, so that nobody need be told.
    """
    over = threading.Event()

    def watch() -> None:
        silent_since: float | None = None
        while not over.wait(_INTERVAL_S):
            if ending() or (lost := why_lost(head, own)) is None:
                silent_since = None
                continue
            now = time.monotonic()
            patient = head_may_return and why_silent(own, _PROBE_S) is None
            if silent_since is None:
                silent_since = now
                if patient:
                    print(f"ray: {lost}; waiting up to {_HEAD_GRACE_S:g} s for it", flush=True)
            elif (not patient or now - silent_since > _HEAD_GRACE_S) and not (over.is_set() or ending()):
                _end(lost)

    thread = threading.Thread(target=watch, name="janus_ray-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_INTERVAL_S + 3 * _PROBE_S)


def _end(lost: str) -> None:
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        print(f"error: {lost}; run the same command again, with --if-exists resume, to continue", file=sys.stderr)
        sys.stderr.flush()
    flush_all()
    os._exit(2)
