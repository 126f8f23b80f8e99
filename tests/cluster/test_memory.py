"""Out of memory for real: the kernel kills a rank, and the job says so and ends."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import CLUE_DS
from ranks import tiny_config

from clue_ds import config as run_config

PATIENCE_S = 300
# Enough for two ranks that have imported torch and DeepSpeed, and not for their model.
LIMIT_BYTES = 2 << 30
# 150 M parameters: 2.4 GB of state on each rank.
BIG = {"hidden_size": 1024, "num_hidden_layers": 12, "intermediate_size": 4096}


def is_v2(cgroup: Path) -> bool:
    return (cgroup / "memory.max").exists()


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A control group with a limit of memory: of the first version, or of the second."""
    first, second = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    name = "memory.limit_in_bytes" if first.is_dir() else "memory.max"
    try:
        folder = Path(tempfile.mkdtemp(prefix="clue-", dir=first if first.is_dir() else second))
        (folder / name).write_text(str(LIMIT_BYTES))
    except OSError as error:
        pytest.skip(f"this machine allows no control groups: {error}")
    yield folder
    folder.rmdir()


def test_a_rank_that_the_kernel_kills_for_memory_ends_the_job(
    corpus: Path, cgroup: Path, tmp_path: Path
) -> None:
    config = tiny_config(corpus, tmp_path / "run", model=BIG)
    run_config.save(config, tmp_path / "run.yaml")
    inside = ["sh", "-c", f'echo $$ > {cgroup}/cgroup.procs; exec "$@"', "sh"]
    launch = [CLUE_DS, "launch", "--local", "2", "--", "pretrain", "--config", "run.yaml"]
    job = subprocess.run(
        [*inside, *launch],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert job.returncode == 71, job.stderr
    # By the other rank, with its name, unless the kernel killed both.
    died = r"killed( or interrupted,)? or has crashed \((SIGKILL; )?out of memory\?"
    assert re.search(died, job.stderr)
    # It was the kernel, and not something else that went wrong.
    counts = (cgroup / ("memory.oom_control", "memory.events")[is_v2(cgroup)]).read_text()
    assert int(counts.split("oom_kill ")[1].split()[0]) >= 1, counts
    assert not (cgroup / "cgroup.procs").read_text().strip(), "processes are left"
