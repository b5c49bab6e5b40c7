"""What deploy/ starts at once is what the plan counts."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from pooling import sizing
from pooling.settings import Jobs

pytestmark = pytest.mark.sqlite  # no database in it: once is enough

KUBERNETES = Path(__file__).parent.parent / "deploy" / "kubernetes"
MIB = {"Mi": 1, "Gi": 1024}


def manifest(name: str) -> Any:
    return yaml.safe_load((KUBERNETES / f"{name}.yaml").read_text())


def numbers() -> dict[str, str]:
    (config,) = manifest("kustomization")["configMapGenerator"]
    return dict(literal.split("=", 1) for literal in config["literals"])


def pod(name: str) -> Any:
    return manifest(name)["spec"]["template"]["spec"]


def container(name: str) -> Any:
    return pod(name)["containers"][0]


def alive_at_once(pods: int, strategy: dict[str, Any]) -> tuple[int, str]:
    """The most pods of a rolling deploy, and why: pods that surge or are still ending come on top of the replicas."""
    if strategy["type"] == "Recreate":
        return pods, f"maxReplicas {pods}"
    surge, unavailable = strategy["rollingUpdate"]["maxSurge"], strategy["rollingUpdate"]["maxUnavailable"]
    ending = max(surge, unavailable)
    return min(pods + surge + ending, 2 * pods), f"maxReplicas {pods} + maxSurge {surge} + {ending} still ending"


def test_the_autoscaler_stays_within_the_plan() -> None:
    """The most pods that are ever alive are APP_INSTANCES, and with the limits of a pod and the jobs they fit."""
    pods, why = alive_at_once(manifest("hpa")["spec"]["maxReplicas"], manifest("deployment")["spec"]["strategy"])
    instances = int(numbers()["APP_INSTANCES"])
    assert pods <= instances, f"{why} = {pods} pods at once, and APP_INSTANCES={instances} in kustomization.yaml"
    limits = container("deployment")["resources"]["limits"]
    size = re.fullmatch(r"(\d+)(Mi|Gi)", limits["memory"])
    assert size, "write memory as a whole number of Mi or Gi"
    sizing.plan(  # raises an error with the whole sum
        cpus=float(limits["cpu"]) if not limits["cpu"].endswith("m") else int(limits["cpu"][:-1]) / 1000,
        memory_mib=int(size[1]) * MIB[size[2]],
        max_connections=int(numbers()["DB_MAX_CONNECTIONS"]),
        instances=instances,
        jobs=TypeAdapter(Jobs).validate_python(numbers()["APP_JOBS"]),
    )


def test_an_ending_pod_is_gone_before_the_next_is_replaced() -> None:
    """Or more pods than one would be ending at once; and a pod has the time for its requests."""
    grace = pod("deployment")["terminationGracePeriodSeconds"]
    assert manifest("deployment")["spec"]["minReadySeconds"] >= grace
    assert manifest("hpa")["spec"]["behavior"]["scaleUp"]["stabilizationWindowSeconds"] >= grace
    assert grace > container("deployment")["lifecycle"]["preStop"]["sleep"]["seconds"] + 30  # WEB_GRACEFUL_TIMEOUT


def test_the_limit_comes_from_the_plan_of_a_pod() -> None:
    """The job that sets the role's limit plans with the numbers and the machine of a pod that serves."""
    assert container("migrate")["resources"] == container("deployment")["resources"]
    assert container("migrate")["envFrom"] == container("deployment")["envFrom"]
