"""Generates overview.json, the overview for Grafana, from the panels below, and metrics.md, a table of our metrics.

    python dashboards/generate.py            writes them
    python dashboards/generate.py --check    exit code 1 where a committed file is another

Names of our own metrics come from janus_ray/metrics.py; ray_serve_*, ray_vllm_* and ray_node_* are exported by Ray, and
by vLLM through Ray. tests/local_ray/serve/test_dashboards.py asks a real Prometheus every query.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models import dashboard as models

from janus_ray import metrics as ours

FOLDER = Path(__file__).parent
UID = "janus-overview"
_SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
_NO_GPU = "needs an NVIDIA GPU"


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel: its queries with their legends."""

    title: str
    unit: str
    """Of Grafana: reqps, ms, s, percentunit, short, bytes, ..."""
    queries: tuple[tuple[str, str], ...]
    help: str
    is_stat: bool = False
    no_data: str = ""
    """Why the tests' cluster cannot answer; empty where it can."""


def rate(metric: ours.Metric | str, *, by: str = "", where: str = "", part: str = "") -> str:
    """The summed rate of a counter, per second."""
    name = metric if isinstance(metric, str) else metric.series
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped}(rate({name}{part}{where}[$__rate_interval]))"


def quantile(share: float, metric: ours.Metric | str, by: str, where: str = "") -> str:
    """A quantile of a histogram."""
    return f"histogram_quantile({share}, {rate(metric, by=f'{by}, le', where=where, part='_bucket')})"


def or_none(query: str) -> str:
    """Zero where a counter does not exist, because what it counts has never happened."""
    return f"{query} or vector(0)"


def progress(metric: ours.Metric, stages: str) -> str:
    """A gauge of the progress of some stages."""
    return f'{metric.series}{{stage=~"{stages}"}}'


def share_done(stages: str) -> str:
    """How far some stages are, from 0 to 1."""
    done, total = progress(ours.PROGRESS_DONE, stages), progress(ours.PROGRESS_TOTAL, stages)
    return f"max by (stage, what) ({done} / {total})"


_TTFT, _ITL = "ray_vllm_time_to_first_token_seconds", "ray_vllm_inter_token_latency_seconds"
_WRITTEN, _READ = "ray_vllm_generation_tokens_total", "ray_vllm_prompt_tokens_total"
_HITS, _LOOKED_UP = "ray_vllm_prefix_cache_hits_total", "ray_vllm_prefix_cache_queries_total"
_QUEUED = "ray_serve_deployment_queued_queries"
_HEALTHY, _TARGET = "ray_serve_deployment_replica_healthy", "ray_serve_autoscaling_target_replicas"
_WELL, _FULL = '{status="200"}', '{status="429"}'
_ASKING, _STAGES = "collect|evaluate", "collect|train|evaluate"

ROWS: dict[str, tuple[Panel, ...]] = {
    "Now": (
        Panel("Requests", "reqps", ((rate(ours.GATEWAY_REQUESTS), ""),), "Chat requests with an answer.", is_stat=True),
        Panel(
            "Answered well",
            "percentunit",
            ((f"{rate(ours.GATEWAY_REQUESTS, where=_WELL)} / {rate(ours.GATEWAY_REQUESTS)}", ""),),
            "Share of the chat requests that ended with status 200.",
            is_stat=True,
        ),
        Panel(
            "Latency, p95",
            "ms",
            ((quantile(0.95, ours.GATEWAY_LATENCY, "kind", _WELL), "{{kind}}"),),
            "Request to last byte of those answered well, at the gateway.",
            is_stat=True,
        ),
        Panel(
            "First token, p95",
            "s",
            ((quantile(0.95, _TTFT, "model_name"), "{{model_name}}"),),
            "Measured by the engine.",
            is_stat=True,
        ),
        Panel(
            "Healthy replicas",
            "short",
            ((f"sum by (deployment) ({_HEALTHY})", "{{deployment}}"),),
            "Of the gateway and of each model.",
            is_stat=True,
        ),
        Panel(
            "Done",
            "percentunit",
            ((share_done(_STAGES), "{{stage}}: {{what}}"),),
            "Jobs within the time shown.",
            is_stat=True,
        ),
    ),
    "Serving": (
        Panel(
            "Requests by status",
            "reqps",
            ((rate(ours.GATEWAY_REQUESTS, by="status"), "{{status}}"),),
            "429: a queue was full. 499: the caller went away. 503: no replica.",
        ),
        Panel(
            "Latency",
            "ms",
            tuple(
                (quantile(q, ours.GATEWAY_LATENCY, "model", _WELL), f"p{100 * q:.0f} {{{{model}}}}")
                for q in (0.5, 0.95, 0.99)
            ),
            "Request to last byte of those answered well, at the gateway.",
        ),
        Panel(
            "Time to first token",
            "s",
            tuple((quantile(q, _TTFT, "model_name"), f"p{100 * q:.0f} {{{{model_name}}}}") for q in (0.5, 0.95)),
            "Measured by the engine, its queue included.",
        ),
        Panel(
            "Time between tokens",
            "s",
            tuple((quantile(q, _ITL, "model_name"), f"p{100 * q:.0f} {{{{model_name}}}}") for q in (0.5, 0.95)),
            "Measured by the engine.",
        ),
        Panel(
            "Tokens",
            "short",
            (
                (rate(_WRITTEN, by="model_name"), "written, {{model_name}}"),
                (rate(_READ, by="model_name"), "read, {{model_name}}"),
            ),
            "Per second.",
        ),
        Panel(
            "Engine's cache",
            "percentunit",
            (
                (
                    f"{rate(_HITS, by='model_name')} / {rate(_LOOKED_UP, by='model_name')}",
                    "prefix hits, {{model_name}}",
                ),
                ("max by (model_name) (ray_vllm_kv_cache_usage_perc)", "in use, {{model_name}}"),
            ),
            "Prefix hits: share of the prompts' tokens that were there already, as equal system messages are. "
            "Full: requests wait or are preempted.",
        ),
        Panel(
            "Queues",
            "short",
            (
                (f'sum by (deployment) ({_QUEUED}{{deployment!="gateway"}})', "at the gateway, {{deployment}}"),
                ("sum by (model_name) (ray_vllm_num_requests_waiting)", "in the engine, {{model_name}}"),
                ("sum by (model_name) (ray_vllm_num_requests_running)", "being answered, {{model_name}}"),
            ),
            "Requests that wait, and those being answered. An engine that has nothing to do reports nothing.",
        ),
        Panel(
            "Refused",
            "reqps",
            (
                (rate(ours.GATEWAY_REQUESTS, where=_FULL), "by the gateway"),
                (or_none(rate(ours.GATEWAY_REFUSED_EARLY)), "by the proxy"),
            ),
            "429 because every queue was full; the proxy refuses before a request costs anything.",
        ),
        Panel(
            "Replicas",
            "short",
            (
                (f"sum by (deployment) ({_HEALTHY})", "healthy, {{deployment}}"),
                (f"max by (deployment) ({_TARGET})", "wanted, {{deployment}}"),
            ),
            "Fewer than wanted for longer than a start takes: look into the replica's log.",
        ),
    ),
    "Collecting and evaluating": (
        Panel(
            "Progress",
            "percentunit",
            ((share_done(_ASKING), "{{stage}}: {{what}}"),),
            "Done of all, failed ones included.",
        ),
        Panel(
            "Time left",
            "s",
            ((f"max by (stage, what) ({progress(ours.PROGRESS_LEFT, _STAGES)})", "{{stage}}: {{what}}"),),
            "At the pace of the last minute, as the terminal says it.",
        ),
        Panel(
            "Answers by status",
            "reqps",
            ((rate(ours.ASKED, by="request, status"), "{{request}}: {{status}}"),),
            "Of the endpoints that are asked: teacher, policies, judge.",
        ),
        Panel(
            "Tokens of answers",
            "short",
            ((rate(ours.ASKED_TOKENS, by="kind"), "{{kind}}"),),
            "Per second; what the ledger knew costs none.",
        ),
        Panel(
            "Requests sent, sent again, known",
            "reqps",
            (
                (rate(ours.ASKED_SENT, by="request"), "sent, {{request}}"),
                (or_none(rate(ours.ASKED_RETRIES)), "sent again"),
                (or_none(rate(ours.ASKED_LEDGER_HITS)), "known to the ledger"),
            ),
            "Many sent again: the endpoint's limit is lower than max_concurrency.",
        ),
        Panel(
            "Failures",
            "short",
            (
                (f"max by (stage, what) ({progress(ours.PROGRESS_FAILED, _STAGES)})", "failed, {{stage}}: {{what}}"),
                (or_none(f"sum({ours.TRAIN_RESTARTS.series})"), "restarts of a training"),
            ),
            "Rows and requests that failed in jobs that run now (a resume tries them again), and workers that died.",
        ),
    ),
    "Training": (
        Panel("Steps", "percentunit", ((share_done("train"), "{{what}}"),), "Done of all."),
        Panel("Loss", "short", ((f"max({ours.LOSS.series})", "loss"),), ours.LOSS.help),
        Panel("Gradient norm", "short", ((f"max({ours.GRAD_NORM.series})", "before clipping"),), ours.GRAD_NORM.help),
        Panel(
            "Learning rate", "sci", ((f"max({ours.LEARNING_RATE.series})", "learning rate"),), ours.LEARNING_RATE.help
        ),
        Panel(
            "Tokens trained on", "short", ((f"max({ours.TOKENS_PER_S.series})", "tokens/s"),), ours.TOKENS_PER_S.help
        ),
        Panel(
            "Model FLOPs utilisation",
            "percentunit",
            ((f"max({ours.MFU.series})", "MFU"),),
            ours.MFU.help,
            no_data=_NO_GPU,
        ),
        Panel("Padding", "percentunit", ((f"max({ours.PADDING_SHARE.series})", "share"),), ours.PADDING_SHARE.help),
        Panel("Checkpoints", "s", ((f"max({ours.CHECKPOINT_S.series})", "seconds to write"),), ours.CHECKPOINT_S.help),
    ),
    "Machines": (
        Panel(
            "CPU",
            "percent",
            (("avg by (ip) (ray_node_cpu_utilization)", "{{ip}}"),),
            "Of all cores of a node.",
        ),
        Panel(
            "Memory",
            "percentunit",
            (("max by (ip) (ray_node_mem_used / ray_node_mem_total)", "{{ip}}"),),
            "Ray ends workers above 95 %.",
        ),
        Panel(
            "Object store",
            "bytes",
            (("sum by (NodeAddress) (ray_object_store_used_memory)", "{{NodeAddress}}"),),
            "What Ray Data and tasks hold in shared memory.",
        ),
        Panel("Nodes", "short", (("sum(ray_cluster_active_nodes)", "alive"),), "Nodes of the cluster."),
        Panel(
            "GPU",
            "percent",
            (("avg by (ip, GpuIndex) (ray_node_gpus_utilization)", "{{ip}} {{GpuIndex}}"),),
            "Busy share of each GPU.",
            no_data=_NO_GPU,
        ),
        Panel(
            "GPU memory",
            "mbytes",
            (("sum by (ip, GpuIndex) (ray_node_gram_used)", "{{ip}} {{GpuIndex}}"),),
            "In use on each GPU.",
            no_data=_NO_GPU,
        ),
    ),
}


def overview() -> models.Dashboard:
    """The dashboard."""
    board = (
        dashboard.Dashboard("janus_ray: overview")
        .uid(UID)
        .tags(["janus_ray"])
        .timezone("browser")
        .refresh("10s")
        .time("now-30m", "now")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    number = 0
    for name, panels in ROWS.items():
        board.with_row(dashboard.Row(name))
        # Three or four in a line, whichever fills the lines; of the large numbers six.
        width = 6 if len(panels) % 3 else 8
        for panel in panels:
            number += 1
            board.with_panel(_built(panel).span(4 if panel.is_stat else width).id(number))
    return board.build()


def _built(panel: Panel) -> Any:
    shape: Any = _stat() if panel.is_stat else _lines()
    shape.title(panel.title).description(panel.help).datasource(_SOURCE).unit(panel.unit)
    for index, (expression, legend) in enumerate(panel.queries):
        query = prometheus.Dataquery().expr(expression).legend_format(legend or "__auto").ref_id(chr(ord("A") + index))
        shape.with_target(query.range())
    if panel.no_data:
        shape.no_value(panel.no_data)
    if panel.unit == "percentunit":
        shape.min(0).max(1)
    elif panel.unit not in ("sci", "short"):
        shape.min(0)
    return shape


def _stat() -> Any:
    last = common.ReduceDataOptions().calcs(["lastNotNull"])
    return stat.Panel().height(4).reduce_options(last).graph_mode(kinds.BigValueGraphMode.AREA).no_value("idle")


def _lines() -> Any:
    legend = (
        common.VizLegendOptions().display_mode(kinds.LegendDisplayMode.LIST).placement(kinds.LegendPlacement.BOTTOM)
    )
    legend.show_legend(True)
    return (
        timeseries.Panel().height(7).line_width(2).fill_opacity(8).show_points(kinds.VisibilityMode.AUTO).legend(legend)
    )


def table() -> str:
    """Our metrics as a table in Markdown."""
    head = "# Our metrics\n\n| in Prometheus | kind | unit | labels | |\n|---|---|---|---|---|\n"
    rows = [(f"`{each.series}`", each.kind, each.unit, ", ".join(each.labels), each.help) for each in ours.ALL]
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def texts() -> dict[str, str]:
    """The files' texts by name."""
    return {"overview.json": JSONEncoder(sort_keys=True, indent=2).encode(overview()) + "\n", "metrics.md": table()}


def main(arguments: list[str]) -> int:
    """Writes the files, or with --check says which are not what this code gives."""
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    stale = 0
    for name, text in texts().items():
        path = FOLDER / name
        if not arguments:
            path.write_text(text)
        elif not path.is_file() or path.read_text() != text:
            print(f"{path}: is not what the code gives; run python dashboards/generate.py", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
