"""A real S3 server on loopback (moto's), in a process of its own, whose faults a test decides.

It answers only to the right access key, and can be told to fail: to ask for fewer requests, to refuse, to cut the
connection in the middle of what is sent to it, to say nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.request
import uuid
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUCKET = "runs"
_KEY = "testing"
_CONTROL = "/_faults"


@dataclass(frozen=True)
class S3:
    """A running server with one bucket."""

    address: str

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use this server; one attempt, so that a fault shows at once."""
        return {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
        }

    def folder(self) -> str:
        """The URL of a folder of its own for a test."""
        return f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}"

    def fail(self, kind: str, method: str = "", key: str = "", times: int = 1_000_000) -> None:
        """From now on requests fail.

        Args:
            kind: "slow down" (503), "refuse" (403), "cut" (the connection ends when half of the body has been read) or
                "hang" (no answer until the faults are cleared).
            method: only requests of this method.
            key: only requests whose path or query holds this text.
            times: so many requests; those after them are answered.
        """
        self._tell({"kind": kind, "method": method, "key": key, "times": times})

    def heal(self) -> None:
        """Every request is answered again, those that hang as well."""
        self._tell(None)

    def requests(self) -> list[str]:
        """Method and path of every request since the server was healed last."""
        with urllib.request.urlopen(self.address + _CONTROL, timeout=30) as answer:
            return json.loads(answer.read())

    def _tell(self, fault: dict[str, Any] | None) -> None:
        request = urllib.request.Request(self.address + _CONTROL, json.dumps(fault).encode(), method="POST")
        urllib.request.urlopen(request, timeout=30).close()


@contextmanager
def s3_server() -> Generator[S3]:
    """Starts the server with an empty bucket and ends it."""
    command = [sys.executable, str(Path(__file__))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        try:
            yield S3(process.stdout.readline().strip())
        finally:
            # It ends with what stands before it, also where the tests are killed.
            process.stdin.close()
            process.wait(30)


class _Faulty:
    """The server's application behind the faults."""

    def __init__(self, application: Any) -> None:
        self._application = application
        self._fault: dict[str, Any] | None = None
        self._requests: list[str] = []
        # The server looks and writes in two steps, which a conditional write must not show.
        self._writes = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if path == _CONTROL:
            return self._control(environ, start_response)
        named = f"{path}?{environ.get('QUERY_STRING', '')}"
        self._requests.append(f"{method} {named}")
        fault = self._fault
        if fault and fault["times"] > 0 and fault["method"] in ("", method) and fault["key"] in named:
            fault["times"] -= 1
            return self._fail(fault, environ, start_response)
        if f"Credential={_KEY}/" not in environ.get("HTTP_AUTHORIZATION", ""):
            return _error(
                environ, start_response, "403 Forbidden", "InvalidAccessKeyId", "The key you provided does not exist"
            )
        if method == "PUT":
            with self._writes:
                return list(self._application(environ, start_response))
        return self._application(environ, start_response)

    def _control(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "POST":
            before, self._fault = self._fault, json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
            if self._fault is not None:
                self._fault["healed"] = threading.Event()
            else:
                self._requests.clear()
            if before is not None:
                before["healed"].set()
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(self._requests).encode()]

    def _fail(self, fault: dict[str, Any], environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        kind = fault["kind"]
        if kind == "slow down":
            return _error(environ, start_response, "503 Slow Down", "SlowDown", "Please reduce your request rate.")
        if kind == "refuse":
            return _error(environ, start_response, "403 Forbidden", "AccessDenied", "Access Denied")
        if kind == "cut":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
            environ["werkzeug.socket"].shutdown(2)
            return []
        assert kind == "hang", kind
        fault["healed"].wait(60)
        return _error(environ, start_response, "500 Internal Server Error", "InternalError", "was hanging")


def _error(environ: dict[str, Any], start_response: Any, status: str, code: str, message: str) -> Iterable[bytes]:
    start_response(status, [("Content-Type", "application/xml")])
    # What is not read would be taken for the connection's next request.
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    if environ["REQUEST_METHOD"] == "HEAD":
        return []
    return [f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()]


def _serve() -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        # As S3 does it: a connection serves many requests.
        protocol_version = "HTTP/1.1"

        def log_request(self, *_: object) -> None:
            pass

    import logging

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    application = _Faulty(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    made = urllib.request.Request(
        f"{address}/{BUCKET}",
        method="PUT",
        headers={"Authorization": f"AWS4-HMAC-SHA256 Credential={_KEY}/x/us-east-1/s3/x"},
    )
    urllib.request.urlopen(made, timeout=30).close()
    print(address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _serve()
