"""A plugin for pytest: a project's own tests of deploy/ look at each folder of manifests in CASES. The last line of the
output has, in JSON, what failed in each."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

CASES = Path(os.environ["CASES"])
told = {case.name: "" for case in CASES.iterdir()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("case", sorted(told), indirect=True)


@pytest.fixture(autouse=True)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_deploy.KUBERNETES", CASES / request.param)


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed:
        told[report.nodeid.partition("[")[2].rstrip("]")] += report.longreprtext


def pytest_unconfigure(config: pytest.Config) -> None:
    print(f"\n{json.dumps(told)}")
