"""What is shipped for a cluster: valid for Ray's own launcher, at the lock files' versions, asking for the token."""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
LAUNCHED = ["cluster.yaml", "deploy/gcp.yaml", "deploy/on_premise.yaml"]
ALL = [*LAUNCHED, "deploy/kuberay.yaml"]


def load(file: str) -> Any:
    return yaml.safe_load((REPOSITORY / file).read_text())


def locked(package: str, lock: str) -> str:
    text = (REPOSITORY / "requirements" / f"{lock}.txt").read_text()
    return re.findall(rf"^{re.escape(package)}==([0-9.]+)", text, re.MULTILINE)[0]


@pytest.mark.parametrize("file", LAUNCHED)
def test_the_launcher_takes_it_as_it_stands(file):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(load(file)))
    validate_config(prepared)
    # A key that Ray does not know must not pass for a setting.
    with pytest.raises(Exception, match="Additional properties are not allowed"):
        validate_config({**prepared, "min_wrokers": 1})
    for commands in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert prepared[commands] == [], f"{commands}: Ray's defaults would install another Ray"


def test_amazon_takes_every_kind_of_node():
    from botocore.loaders import Loader
    from botocore.model import ServiceModel
    from botocore.validate import ParamValidator

    shape = ServiceModel(Loader().load_service_model("ec2", "service-2")).operation_model("RunInstances").input_shape
    for name, kind in load("cluster.yaml")["available_node_types"].items():
        # What Ray puts into each launch; SubnetIds is a word of Ray's own.
        launch = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        launch.pop("SubnetIds")
        assert not ParamValidator().validate(launch, shape).has_errors(), name


@pytest.mark.parametrize("file", ALL)
def test_the_images_are_those_of_the_lock_files(file):
    text = (REPOSITORY / file).read_text()
    python = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["requires-python"]
    minor = re.match(r">=3\.(\d+)", python)[1]
    images = re.findall(r"REGISTRY/janus_ray:(\S+)", text)
    expected = {f"ray{locked('ray', lock)}-py3{minor}-{lock}" for lock in ("cpu", "gpu")}
    assert set(images) == expected
    assert not re.search(r"rayproject/|:latest|nightly", re.sub(r"#.*", "", text))


def test_the_dockerfile_takes_the_lock_the_python_and_the_installer_of_the_project():
    text = (REPOSITORY / "deploy" / "Dockerfile").read_text()
    makefile = (REPOSITORY / "Makefile").read_text()
    assert re.search(r"^FROM python:3\.11-", text, re.MULTILINE)
    assert re.search(r"uv==(\S+)", text)[1] == re.search(r"^UV_VERSION := (\S+)", makefile, re.MULTILINE)[1]
    assert set(re.findall(r"janus_ray:ray(\S+)-py311-", text)) == {locked("ray", "gpu")} == {locked("ray", "cpu")}
    for copied in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((REPOSITORY / name).exists() for name in copied.split()), copied
    ignored = (REPOSITORY / "deploy" / "Dockerfile.dockerignore").read_text()
    assert all(
        f"!{name}\n" in ignored for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in line.split()
    )


@pytest.mark.parametrize("file", LAUNCHED)
def test_the_head_does_no_work_and_every_process_asks_for_the_token(file):
    config = load(file)
    head = " ".join(config["head_start_ray_commands"])
    assert "--num-cpus=0" in head and "--dashboard-host=127.0.0.1" in head
    options = config["docker"]["run_options"]
    variables = dict(option.removeprefix("-e ").split("=", 1) for option in options if option.startswith("-e "))
    assert variables["RAY_AUTH_MODE"] == "token"
    assert config["file_mounts"] == {variables["RAY_AUTH_TOKEN_PATH"]: "~/.ray/auth_token"}
    from janus_ray.env import PROXY_DEFAULTS

    assert variables.items() >= PROXY_DEFAULTS.items()
    assert re.match(r"(s3|gs)://|/mnt/", variables["JANUS_STORAGE"])


@pytest.mark.parametrize("file", ["cluster.yaml", "deploy/gcp.yaml"])
def test_spot_nodes_come_first_and_have_a_twin_on_demand(file):
    config = load(file)
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert sum(kind.get("max_workers", 0) for kind in types.values()) == config["max_workers"]
    for pool in ("cpu", "gpu"):
        spot, demand = types[f"{pool}_spot"], types[pool]
        assert "spot" in str(spot["node_config"]).lower() or "preemptible" in str(spot["node_config"])
        assert "'spot'" not in str(demand["node_config"]) and "preemptible" not in str(demand["node_config"])
        # One shape: what asked for the one can have the other.
        assert spot["resources"] == demand["resources"]
        assert spot["priority"] > demand["priority"]
        assert spot["min_workers"] == 0
    assert types["gpu"]["resources"]["GPU"] == 4 and types["gpu"]["min_workers"] == 0
    assert config["provider"]["use_internal_ips"] is True
    assert "RAY_enable_autoscaler_v2=1" in " ".join(config["head_start_ray_commands"])


def test_kubernetes_gets_the_same_cluster():
    spec = load("deploy/kuberay.yaml")["spec"]
    assert spec["rayVersion"] == locked("ray", "gpu")
    assert spec["authOptions"] == {"mode": "token"} and spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    pools = [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    for pod in pools:
        names = {variable["name"] for variable in pod["containers"][0]["env"]}
        assert {"JANUS_STORAGE", "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"} <= names
        assert pod["serviceAccountName"] == "janus"
    assert [pod["containers"][0]["image"].rpartition("-")[2] for pod in pools] == ["cpu", "cpu", "gpu", "gpu"]


def test_placeholders_are_the_only_thing_to_fill_in():
    placeholders = {"REGISTRY", "BUCKET", "AMI", "SUBNET", "SECURITY-GROUP", "ACCOUNT", "PROJECT", "MARKET-LABEL"}
    for file in ALL:
        text = re.sub(r"#.*", "", (REPOSITORY / file).read_text())
        found = set(re.findall(r"(?<![\w$-])[A-Z][A-Z-]{2,}(?![\w=-])", text))
        assert found - placeholders <= {"CPU", "GPU", "PERSISTENT", "TERMINATE"}, file
