"""Weak scaling of training on CPU ranks: what do ranks cost each other, by ZeRO stage?

Each setting trains N ranks twice on the same machine at the same time of day: as one job, and as N
jobs of one rank that run side by side. Both share the cores in the same way and do the same work a
rank, so the difference is communication, and sharding where there is any. Steps at the beginning
don't count (they warm up); losses of the job are checked to be numbers that fall.

Rejected: one rank alone as the baseline (on few cores N ranks then seem to scale badly because they
share caches and memory), and a timer around collectives (it would count waiting for a late rank).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from clue_ds.benchmarks.environment import describe
from clue_ds.errors import UserError

WARMUP_LINES = 2  # of the log
STEPS_A_LINE = 5


def scaling(
    corpus: Path,
    output: Path | None = None,
    ranks: tuple[int, ...] = (1, 2, 4),
    stages: tuple[int, ...] = (0, 1, 2, 3),
    steps: int = 40,
    hidden_size: int = 256,
    micro_batch_size: int = 8,
) -> None:
    """Weak scaling on CPU ranks, with the share of a step that communication takes.

    Args:
        corpus: directory written by `clue-ds shard`
        output: JSON file for the figures
        ranks: numbers of ranks; the global batch grows with them
        stages: ZeRO stages
        steps: steps of each run
        hidden_size: of a network of 2 layers
        micro_batch_size: sequences of 64 tokens on one rank
    """
    if steps < STEPS_A_LINE * (WARMUP_LINES + 2):
        raise UserError(f"steps must be at least {STEPS_A_LINE * (WARMUP_LINES + 2)}")
    rows = []
    for num_ranks in ranks:
        for stage in stages:
            row = _compare(corpus, num_ranks, stage, steps, hidden_size, micro_batch_size)
            rows.append(row)
            print(
                f"{num_ranks} ranks, stage {stage}: {row['together_s'] * 1e3:.0f} ms a step, "
                f"{row['side_by_side_s'] * 1e3:.0f} ms without the others, "
                f"communication {row['communication_share']:.0%}",
                flush=True,
            )
    result = {**describe(), "hidden_size": hidden_size, "steps": steps, "rows": rows}
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _compare(
    corpus: Path, num_ranks: int, stage: int, steps: int, hidden_size: int, micro_batch_size: int
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "deepspeed": f"zero{stage}",
            "data": {"corpus": str(corpus), "seq_length": 64},
            "model": {
                "num_hidden_layers": 2,
                "hidden_size": hidden_size,
                "num_attention_heads": 4,
                "intermediate_size": 4 * hidden_size,
            },
            "train": {
                "steps": steps,
                "lr": 1e-3,
                "warmup_steps": 2,
                "micro_batch_size": micro_batch_size,
            },
            "log": {"every": STEPS_A_LINE, "tensorboard": False},
        }
        together = _start(values, Path(folder, "together"), num_ranks, micro_batch_size)
        _wait([together])
        alone = [
            _start(values, Path(folder, f"alone-{number}"), 1, micro_batch_size)
            for number in range(num_ranks)
        ]
        _wait(alone)
        together_s = _seconds_a_step(Path(folder, "together"))
        alone_s = statistics.median(
            _seconds_a_step(Path(folder, f"alone-{number}")) for number in range(num_ranks)
        )
    return {
        "num_ranks": num_ranks,
        "stage": stage,
        "together_s": together_s,
        "side_by_side_s": alone_s,
        "efficiency": alone_s / together_s,
        "communication_share": max(0.0, 1 - alone_s / together_s),
    }


def _start(
    values: dict[str, Any], run_dir: Path, num_ranks: int, micro_batch_size: int
) -> subprocess.Popen[bytes]:
    train = {**values["train"], "global_batch_size": num_ranks * micro_batch_size}
    run_dir.mkdir()
    # JSON is YAML.
    given = json.dumps({**values, "train": train, "run_dir": str(run_dir)})
    (run_dir / "given.yaml").write_text(given, encoding="utf-8")
    launch = [sys.executable, "-m", "clue_ds.cli", "launch", "--local", str(num_ranks), "--"]
    command = [*launch, "pretrain", "--config", str(run_dir / "given.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def _wait(jobs: list[subprocess.Popen[bytes]]) -> None:
    for job in jobs:
        if job.wait():
            raise RuntimeError(f"a run of the benchmark ended with {job.returncode}")


def _seconds_a_step(run_dir: Path) -> float:
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"], lines
    return statistics.median(line["seconds_per_step"] for line in lines[WARMUP_LINES:])
