"""The manifests of containers/: valid for Kubernetes, and what they say of clue-ds is true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from clue_ds.launcher import contract, launch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def job() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "containers" / "job.yaml").read_text("utf-8"))


@pytest.mark.parametrize("version", ["1.31.0", "1.37.0"])
def test_job_is_valid(job: dict[str, Any], version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is missing")
    validator.validate(job, version, strict=True)


def test_command_of_the_job_is_one_of_ours(job: dict[str, Any]) -> None:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    name, verb, *arguments = container["command"]
    assert (name, verb) == ("clue-ds", "launch")
    options = launch._parse(arguments)  # a mistake in an option ends it
    assert options.local == container["resources"]["limits"]["nvidia.com/gpu"]
    assert options.verb[0] == "pretrain"


def test_statuses_of_the_job_are_those_of_the_launcher(job: dict[str, Any]) -> None:
    rules = job["spec"]["podFailurePolicy"]["rules"]
    by_status = {
        tuple(rule["onExitCodes"]["values"]): rule["action"]
        for rule in rules
        if "onExitCodes" in rule
    }
    assert by_status == {
        (contract.STATUS_USER_ERROR, contract.STATUS_NO_PROGRESS): "FailJob",
        (contract.STATUS_STOPPED,): "Ignore",
    }
