"""The overview for Grafana: what is committed is what the code gives, and its queries name what there is."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from dashboards import generate
from janus_ray import metrics

NAME = re.compile(r"\bray_[a-z0-9_]+")


def queries() -> list[str]:
    panels = [panel for panels in generate.ROWS.values() for panel in panels]
    return [expression for panel in panels for expression, _ in panel.queries]


def metric_names() -> set[str]:
    """Without a histogram's endings."""
    return {re.sub(r"_bucket$", "", name) for query in queries() for name in NAME.findall(query)}


def test_the_committed_files_are_what_the_code_gives(tmp_path, monkeypatch, capsys):
    assert generate.main(["--check"]) == 0
    monkeypatch.setattr(generate, "FOLDER", tmp_path)
    assert generate.main(["--check"]) == 1 and capsys.readouterr().err.count("run python dashboards/generate.py") == 2
    assert generate.main([]) == 0 and generate.main(["--check"]) == 0
    for name, text in generate.texts().items():
        (tmp_path / name).write_text(text.replace("atency", "elay"))
        assert generate.main(["--check"]) == 1 and name in capsys.readouterr().err
        (tmp_path / name).write_text(text)
    assert generate.main(["--chekc"]) == 2


def test_the_file_holds_every_panel_with_its_queries():
    board = json.loads((generate.FOLDER / "overview.json").read_text())
    shown = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert [panel["title"] for panel in board["panels"] if panel["type"] == "row"] == list(generate.ROWS)
    assert [target["expr"] for panel in shown for target in panel["targets"]] == queries()
    assert len({panel["id"] for panel in shown}) == len(shown)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in shown]
    assert len(set(places)) == len(places) and all(
        x + panel["gridPos"]["w"] <= 24 for (x, _), panel in zip(places, shown, strict=True)
    )


def test_queries_name_our_metrics_as_they_are_exported():
    ours = {name for name in metric_names() if name.startswith("ray_janus_")}
    assert ours <= {metric.series for metric in metrics.ALL}
    assert not {
        name
        for name in metric_names() - ours
        if not name.startswith(("ray_serve_", "ray_vllm_", "ray_node_", "ray_cluster_", "ray_object_"))
    }


def test_every_metric_of_ours_is_on_a_panel():
    on_none = {metric.name for metric in metrics.ALL if metric.series not in metric_names()}
    assert on_none == {metrics.SUPERVISED_TOKENS.name}


@pytest.mark.parametrize("query", queries())
def test_a_query_is_balanced(query):
    for opening, closing in ("()", "{}", "[]"):
        assert query.count(opening) == query.count(closing)
    assert query.count('"') % 2 == 0


def test_no_panel_is_without_data_for_no_reason():
    panels = [panel for panels in generate.ROWS.values() for panel in panels]
    assert {panel.no_data for panel in panels} == {"", "needs an NVIDIA GPU"}


def test_what_grafana_and_prometheus_are_given_can_be_read():
    folder = generate.FOLDER
    source = yaml.safe_load((folder / "provisioning/datasources/prometheus.yaml").read_text())
    assert source["datasources"][0]["type"] == "prometheus"
    providers = yaml.safe_load((folder / "provisioning/dashboards/dashboards.yaml").read_text())["providers"]
    assert [provider["name"] for provider in providers] == ["janus_ray", "Ray"]
    jobs = yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"]
    assert jobs[0]["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
