"""Kubeflow's types and SkyPilot's own reader accept the files of containers/.

`make test-clients` runs it with MANIFESTS_PYTHON, an environment that has both.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

PYTHON = os.environ.get("MANIFESTS_PYTHON", "")
CONTAINERS = Path(__file__).resolve().parents[2] / "containers"
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="needs MANIFESTS_PYTHON; `make test-clients` sets it"
)

# The SDK's models know the names and types of all fields, and Kubernetes' client those of pods.
KUBEFLOW = """
import json, sys
import kubernetes.client as pods
import kubeflow.training as jobs
TYPES = {"str": str, "int": int, "bool": bool, "object": object}
def check(value, kind, where):
    if kind.startswith("list["):
        for number, one in enumerate(value):
            check(one, kind[5:-1], f"{where}[{number}]")
    elif kind.startswith("dict("):
        key, of = kind[5:-1].split(", ", 1)
        for name, one in value.items():
            quantity = where.endswith(("limits", "requests"))
            check(str(one) if quantity else one, of, f"{where}.{name}")
    elif kind in TYPES:
        assert isinstance(value, TYPES[kind]), f"{where} is no {kind}: {value!r}"
    else:
        model = getattr(jobs, kind, None) or getattr(pods, kind)
        names = {theirs: ours for ours, theirs in model.attribute_map.items()}
        for name, one in value.items():
            assert name in names, f"{where} has no field {name}"
            check(one, model.openapi_types[names[name]], f"{where}.{name}")
        model(**{names[name]: one for name, one in value.items()})  # ValueError for one that lacks
job = json.loads(sys.argv[1])
check(job, "KubeflowOrgV1PyTorchJob", "job")
"""
SKY = """
import sys
import sky
task = sky.Task.from_yaml(sys.argv[1])
(resources,) = task.resources
print(resources.accelerators, resources.use_spot, resources.job_recovery)
"""


def run(code: str, argument: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PYTHON, "-c", code, argument],
        env={**os.environ, "HOME": str(home)},
        capture_output=True,
        text=True,
    )


def test_kubeflow_knows_every_field_of_the_job(tmp_path: Path) -> None:
    job = yaml.safe_load((CONTAINERS / "pytorchjob.yaml").read_text("utf-8"))
    done = run(KUBEFLOW, json.dumps(job), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    job["spec"]["pytorchReplicaSpecs"]["Master"]["replica"] = 1
    assert "has no field replica" in run(KUBEFLOW, json.dumps(job), tmp_path).stderr


def test_sky_reads_the_task(tmp_path: Path) -> None:
    done = run(SKY, str(CONTAINERS / "sky.yaml"), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "H100" in done.stdout and "75" in done.stdout
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((CONTAINERS / "sky.yaml").read_text("utf-8").replace("use_spot", "use_sport"))
    assert "use_sport" in run(SKY, str(wrong), tmp_path).stderr
