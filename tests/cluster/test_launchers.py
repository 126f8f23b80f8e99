"""The plain commands that people know: mpirun and torchrun, on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import CLUE_DS, need
from ranks import read_log, tiny_config

from clue_ds import config as run_config

PATIENCE_S = 120
MODULE = ["-m", "clue_ds.pretrain.train", "--config", "run.yaml"]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


def write_config(corpus: Path, folder: Path) -> None:
    config = tiny_config(corpus, folder / "run", train={"steps": 10, "warmup_steps": 2})
    run_config.save(config, folder / "run.yaml")


COMMANDS = {
    "torchrun": [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node=2", *MODULE],
    "mpirun": ["mpirun", "-n", "2", sys.executable, *MODULE],
    "launch --mpi": [CLUE_DS, "launch", "--mpi", "2", "--", "pretrain", *MODULE[2:]],
    "mpirun launch": ["mpirun", "-n", "2", CLUE_DS, "launch", "--", "pretrain", *MODULE[2:]],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_two_ranks_train(name: str, corpus: Path, tmp_path: Path) -> None:
    if "mpi" in name:
        need("mpirun")
    write_config(corpus, tmp_path)
    job = subprocess.run(
        COMMANDS[name],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert job.returncode == 0, job.stderr
    assert "2 ranks on 1 host" in job.stdout
    assert [line["step"] for line in read_log(tmp_path / "run")] == list(range(1, 11))


def test_bind_cores_gives_each_rank_its_own(corpus: Path, tmp_path: Path) -> None:
    need("numactl")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    config = tiny_config(corpus, tmp_path / "run", train={"steps": 100_000, "warmup_steps": 2})
    run_config.save(config, tmp_path / "run.yaml")
    words = ["launch", "--local", "2", "--bind-cores", "--", "pretrain", *MODULE[2:]]
    job = subprocess.Popen([CLUE_DS, *words], cwd=tmp_path, env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not (tmp_path / "run" / "log.jsonl").is_file():
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        below = psutil.Process(job.pid).children(recursive=True)
        cores = {
            process.environ()["RANK"]: set(process.cpu_affinity())
            for process in below
            if "RANK" in process.environ() and "clue_ds.pretrain.train" in process.cmdline()
        }
    finally:
        job.terminate()
        job.wait(timeout=PATIENCE_S)
    assert sorted(cores) == ["0", "1"] and cores["0"] and cores["1"]
    assert not cores["0"] & cores["1"], cores
