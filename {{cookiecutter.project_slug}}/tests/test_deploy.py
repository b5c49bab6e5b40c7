"""The plan counts all that deploy/ starts at once."""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.config import Settings

pytestmark = pytest.mark.sqlite  # no database in it: once is enough

KUBERNETES = Path(__file__).parent.parent / "deploy" / "kubernetes"
BYTES = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "k": 10**3, "M": 10**6, "G": 10**9, "": 1}


def manifests(kind: str) -> Iterator[Any]:
    for file in sorted(KUBERNETES.glob("*.yaml")):
        yield from (found for found in yaml.safe_load_all(file.read_text()) if found and found["kind"] == kind)


def manifest(kind: str, name: str = "web") -> Any:
    """Return a manifest, or None."""
    return next((found for found in manifests(kind) if found["metadata"]["name"] == name), None)


def container(kind: str, name: str = "web") -> Any:
    return manifest(kind, name)["spec"]["template"]["spec"]["containers"][0]


def pods(deployment: Any, most: int) -> tuple[int, str]:
    """Return the most pods of a rolling deploy, and why: surging and ending pods come on top of the replicas."""
    strategy = deployment["spec"].get("strategy", {})
    if strategy.get("type") == "Recreate":
        return most, f"{most} pods"
    rolling = {"maxSurge": "25%", "maxUnavailable": "25%"} | strategy.get("rollingUpdate", {})  # Kubernetes' defaults
    surge, unavailable = (
        int(given) if given[-1:] != "%" else rounded(most * int(given[:-1]) / 100)
        for given, rounded in ((str(rolling["maxSurge"]), math.ceil), (str(rolling["maxUnavailable"]), math.floor))
    )
    ending = max(surge, unavailable)
    return min(most + surge + ending, 2 * most), f"{most} pods + maxSurge {surge} + {ending} still ending"


@pytest.fixture
def settings(production: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Those of a pod."""
    for name in [name for name in os.environ if name.startswith(("APP_", "DB_", "WEB_"))]:
        monkeypatch.delenv(name)
    (config,) = next(manifests("Kustomization"))["configMapGenerator"]
    literals = dict(literal.split("=", 1) for literal in config["literals"])
    given = {entry["name"]: entry["value"] for entry in container("Deployment").get("env", []) if "value" in entry}
    for name, value in (literals | given).items():
        monkeypatch.setenv(name, value)
    return Settings.load()


def test_the_autoscaler_stays_within_the_plan(settings: Settings) -> None:
    """The most pods that are ever alive are APP_INSTANCES, and with the limits of a pod and the jobs they fit."""
    deployment, scaler = manifest("Deployment"), manifest("HorizontalPodAutoscaler")
    replicas = deployment["spec"].get("replicas")
    assert replicas is None or not scaler, f"replicas: {replicas} would undo at each release what the autoscaler did"
    alive, why = pods(deployment, scaler["spec"]["maxReplicas"] if scaler else replicas or 1)
    instances = settings.app_instances
    assert alive <= instances, f"{why} = {alive} at once, and APP_INSTANCES={instances} in kustomization.yaml"
    limits = container("Deployment")["resources"]["limits"]
    size = re.fullmatch(r"(\d+)([KMG]i|[kMG]|)", str(limits["memory"]))
    assert size, f"memory: {limits['memory']}: write it as a whole number of Mi or Gi"
    cpus = str(limits["cpu"])
    settings.plan_if(  # raises an error with the whole sum
        cpus=int(cpus[:-1]) / 1000 if cpus.endswith("m") else float(cpus),
        memory_mib=int(size[1]) * BYTES[size[2]] // BYTES["Mi"],
    )


def test_each_other_deployment_is_a_job(settings: Settings) -> None:
    """It has the name of its job in APP_JOBS, and no more pods than that has copies."""
    for deployment in manifests("Deployment"):
        name = deployment["metadata"]["name"]
        if name != "web":
            assert name in settings.app_jobs, f"the Deployment {name} is not in APP_JOBS"
            alive, why = pods(deployment, deployment["spec"].get("replicas", 1))
            copies = settings.app_jobs[name].copies
            assert alive <= copies, f"{name}: {why} = {alive} at once, and APP_JOBS has {copies} copies"


def test_an_ending_pod_is_gone_before_the_next_is_replaced(settings: Settings) -> None:
    """Or more pods than one would be ending at once; and a pod has the time for its requests."""
    spec, scaler = manifest("Deployment")["spec"], manifest("HorizontalPodAutoscaler")
    grace = spec["template"]["spec"].get("terminationGracePeriodSeconds", 30)
    leaving = container("Deployment").get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    assert grace > leaving + settings.web_graceful_timeout
    assert spec.get("minReadySeconds", 0) >= grace or spec["strategy"]["type"] == "Recreate"
    assert not scaler or scaler["spec"]["behavior"]["scaleUp"]["stabilizationWindowSeconds"] >= grace


def test_the_limit_comes_from_the_plan_of_a_pod() -> None:
    """The job that sets the role's limit plans with the numbers and the machine of a pod that serves."""
    limit = container("Job", "migrate")
    assert limit["resources"] == container("Deployment")["resources"]
    assert limit["envFrom"] == container("Deployment")["envFrom"]
