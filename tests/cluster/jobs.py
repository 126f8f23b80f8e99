"""Jobs of the real Slurm: handed in, watched, read."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

SBATCH = Path(__file__).resolve().parents[2] / "slurm"
PATIENCE_S = 120
TIME = "--time=10"


def submit(slurm: dict[str, str], folder: Path, *words: str | Path) -> str:
    command = ["sbatch", "--parsable", TIME, f"--chdir={folder}", *map(str, words)]
    result = subprocess.run(command, env=slurm, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def state(slurm: dict[str, str], job: str) -> str:
    command = ["scontrol", "-o", "show", "job", job]
    shown = subprocess.run(command, env=slurm, capture_output=True, text=True, check=True).stdout
    match = re.search(r"JobState=(\w+)", shown)
    assert match, shown
    return match[1]


def log_of(folder: Path, job: str) -> str:
    return "\n".join(path.read_text() for path in folder.glob(f"*{job}*.log"))


def wait_for_state(slurm: dict[str, str], job: str, folder: Path, *wanted: str) -> str:
    deadline = time.monotonic() + PATIENCE_S
    while (now := state(slurm, job)) not in wanted:
        assert time.monotonic() < deadline, (now, log_of(folder, job))
        assert now not in ("FAILED", "CANCELLED", "TIMEOUT"), (now, log_of(folder, job))
        time.sleep(0.3)
    return now
