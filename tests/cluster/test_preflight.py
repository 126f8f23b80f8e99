"""Before the first step, on two real hosts: what differs, who is missing, what has no room.

Each rank is started by hand on its host, so that it can be given something else than the other.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import CLUE_DS
from ranks import make_corpus, tiny_config

from clue_ds import config as run_config

PATIENCE_S = 120
PRETRAIN = ["clue_ds.pretrain.train", "--config", "run.yaml"]


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Path:
    health = {"start_seconds": 15, "beat_seconds": 10}
    values = tiny_config(corpus, tmp_path / "run", health=health)
    run_config.save(values, tmp_path / "run.yaml")
    return tmp_path / "run.yaml"


def start(
    hosts: Path, folder: Path, rank: int, *module: str | Path, **variables: str | Path
) -> subprocess.Popen[str]:
    """Rank 0 on h1, or rank 1 on h2."""
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "10.78.0.1",
        "MASTER_PORT": "20100",
        "CLUE_DS_HOSTS": "h1:1,h2:1",
        "OMP_NUM_THREADS": "1",
        **{name: str(value) for name, value in variables.items()},
    }
    return subprocess.Popen(
        [hosts / "on", f"h{rank + 1}", sys.executable, "-m", *module],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def another_numpy(folder: Path) -> Path:
    """A directory for PYTHONPATH in which the installed numpy has another version."""
    info = folder / "other" / "numpy-0.0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.0.1\n")
    return info.parent


def test_ranks_that_differ_are_listed_by_host(
    corpus: Path, hosts: Path, config: Path, tmp_path: Path
) -> None:
    other = make_corpus(tmp_path, "一二三四五六七。\n\n七六五四三二一。")
    rank_0 = start(hosts, tmp_path, 0, *PRETRAIN)
    changes = [f"--data.corpus={other}", "--train.lr=0.5"]
    path = another_numpy(tmp_path)
    rank_1 = start(hosts, tmp_path, 1, *PRETRAIN, *changes, PYTHONPATH=path)
    said, _ = rank_0.communicate(timeout=PATIENCE_S)
    rank_1.communicate(timeout=PATIENCE_S)
    assert (rank_0.returncode, rank_1.returncode) == (2, 2), said
    assert "ranks are not the same program on the same data" in said
    assert "numpy: 0.0.1 on h2; " in said
    assert "train.lr: 0.002 on h1; 0.5 on h2" in said
    assert "corpus: " in said
    assert "Traceback" not in said


def test_a_missing_rank_is_named_with_its_host(hosts: Path, config: Path, tmp_path: Path) -> None:
    job = start(hosts, tmp_path, 0, *PRETRAIN)
    said, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 2
    assert "1 of 2 ranks did not answer within 15 s: rank 1 on h2" in said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs"]
    if subprocess.run(["mount", *options, folder], capture_output=True).returncode:
        pytest.skip("this machine allows no mounts")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_too_small_for_a_checkpoint_is_said_before_the_first_step(
    corpus: Path, small_disk: Path
) -> None:
    run_config.save(tiny_config(corpus, small_disk / "run"), small_disk / "run.yaml")
    launch = [CLUE_DS, "launch", "--local", "2", "--", "pretrain", "--config", "run.yaml"]
    job = subprocess.run(launch, cwd=small_disk, capture_output=True, text=True, timeout=PATIENCE_S)
    assert job.returncode == 2, job.stderr
    assert job.stderr.count("a run needs room for 2.2 of them") == 1, job.stderr
    assert not (small_disk / "run" / "log.jsonl").exists()


LINE = re.compile(r"h1: ((ok|note|bad) .*)")  # pdsh names the host


def doctor(hosts: Path, folder: Path, *arguments: str) -> tuple[int, list[str], str]:
    """Exit status, lines of the checks, and all output of doctor on both hosts."""
    command = [CLUE_DS, "launch", "--hostfile", hosts / "hostfile", "--", "doctor", *arguments]
    job = subprocess.run(
        [hosts / "on", "h1", *command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
    )
    lines = [match[1] for match in map(LINE.fullmatch, job.stdout.splitlines()) if match]
    return job.returncode, lines, job.stdout


def test_doctor_has_a_line_a_check(hosts: Path, config: Path, tmp_path: Path) -> None:
    status, lines, output = doctor(hosts, tmp_path, "--config", str(config))
    assert status == 0, output
    assert len(lines) == 15 and not any(line.startswith("bad") for line in lines), output
    assert "finished an all-reduce: 2 ranks on 2 hosts (h1, h2)" in lines[-1]


def test_doctor_says_which_host_sees_another_corpus(
    hosts: Path, corpus: Path, config: Path, tmp_path: Path
) -> None:
    """h2 has a directory of its own mounted over the corpus, as if it were a copy that is older."""
    older = make_corpus(tmp_path, "一二三四五六七。\n\n七六五四三二一。")
    mount = ["mount", "--bind", older, corpus]
    subprocess.run([hosts / "on", "h2", *mount], check=True)
    try:
        status, lines, output = doctor(hosts, tmp_path, "--config", str(config))
    finally:
        subprocess.run([hosts / "on", "h2", "umount", corpus], check=True)
        shutil.rmtree(older)
    assert status == 1, output
    (bad,) = (line for line in lines if line.startswith("bad"))
    assert "corpus: " in bad and " on h1; " in bad and "Install the same environment" in bad
