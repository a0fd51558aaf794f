"""A real Prometheus with the committed configuration, pointed at the Ray cluster of the test session."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
_FOUND_BY = "/tmp/ray/prom_metrics_service_discovery.json"
_INTERVAL = "10s"

PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")


class Prometheus:
    """What a running Prometheus can be asked."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, query: str) -> list[dict[str, Any]]:
        """The series of a query that have a value at this moment; Grafana's own variable is filled in."""
        found = self._get("query", query=query.replace("$__rate_interval", "1m"))["result"]
        # No traffic, no quantile.
        return [one for one in found if one["value"][1] != "NaN"]

    def names(self) -> set[str]:
        """Every metric that was ever scraped."""
        return set(self._get("label/__name__/values"))

    def _get(self, what: str, **parameters: str) -> Any:
        url = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None


def discovered(targets: list[str]) -> str:
    """The file by which Prometheus finds a Ray cluster, as its dashboard process writes it."""
    return json.dumps([{"labels": {"job": "ray"}, "targets": targets}])


def configuration(folder: Path, targets: list[str], interval: str) -> Path:
    """The committed configuration with the place of the file of targets, and the interval, replaced."""
    (folder / "targets.json").write_text(discovered(targets))
    committed = (REPOSITORY / "dashboards" / "prometheus.yml").read_text()
    assert _FOUND_BY in committed and f"scrape_interval: {_INTERVAL}" in committed
    text = committed.replace(_FOUND_BY, str(folder / "targets.json"))
    (folder / "prometheus.yml").write_text(
        text.replace(f"scrape_interval: {_INTERVAL}", f"scrape_interval: {interval}")
    )
    return folder / "prometheus.yml"


@contextmanager
def prometheus(folder: Path, targets: list[str], wait: Callable[[], bool]) -> Generator[Prometheus]:
    """Runs Prometheus within the block.

    Args:
        folder: where its configuration and its data go.
        targets: addresses to scrape, each second.
        wait: called between looks whether it is ready; false gives up.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(PROMETHEUS),
        f"--config.file={configuration(folder, targets, '1s')}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    url = f"http://127.0.0.1:{port}"
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not _ready(url):
                assert process.poll() is None and wait(), (folder / "prometheus.log").read_text()
            yield Prometheus(url)
        finally:
            process.terminate()
            process.wait(timeout=60)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
