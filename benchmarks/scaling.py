"""Weak scaling of training on CPU ranks: the cost of communication, by ZeRO stage.

Each setting trains N ranks twice, one after the other: as one job of N ranks, and as N jobs of one
rank that run at the same time. Both share the cores in the same way and do the same work per rank,
so the extra time of the one job is communication, and sharding if there is any. Processor time
separates its two parts: copying and adding is work, and the rest is waiting for other ranks. Every
rank computes with one thread. The first steps are a warm-up and don't count; losses must fall.

Rejected: one rank alone as the baseline (on few cores N ranks then seem to scale badly because they
share caches and memory), and a timer around collectives (it can't tell sending from waiting).
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from clue_ds.benchmarks.description import write_results
from clue_ds.errors import UserError

STEPS_PER_LINE = 5
WARMUP_LINES = 3  # lines of the log that don't count: those of steps 1, 5 and 10


def scaling(
    corpus: Path,
    output: Path | None = None,
    ranks: tuple[int, ...] = (1, 2, 4),
    stages: tuple[int, ...] = (0, 1, 2, 3),
    steps: int = 40,
    hidden_size: int = 256,
    micro_batch_size: int = 8,
) -> None:
    """Measure weak scaling on CPU ranks, and the share of a step that communication takes.

    Args:
        corpus: directory written by `clue-ds shard`
        output: JSON file for the figures
        ranks: numbers of ranks to measure; the global batch grows with them
        stages: ZeRO stages to measure
        steps: steps of each run
        hidden_size: hidden size of a network of 2 layers
        micro_batch_size: sequences of 64 tokens on one rank
    """
    fewest = STEPS_PER_LINE * (WARMUP_LINES + 1)
    if steps < fewest:
        raise UserError(f"--steps {steps} must be at least {fewest}: the first 10 don't count")
    num_cores = len(os.sched_getaffinity(0))
    if max(ranks) > num_cores:
        print(
            f"{num_cores} cores for {max(ranks)} ranks: some share a core, so the shares are "
            "meaningful but the times are not"
        )
    print(
        "| ranks | stage | ms per step | ms without communication | communication | of it waiting |"
    )
    print("|---|---|---|---|---|---|")
    rows = []
    for num_ranks in ranks:
        for stage in stages:
            row = _compare(corpus, num_ranks, stage, steps, hidden_size, micro_batch_size)
            rows.append(row)
            print(
                f"| {num_ranks} | {stage} | {1e3 * row['together_s']:.0f} | "
                f"{1e3 * row['side_by_side_s']:.0f} | {row['communication_share']:.0%} | "
                f"{row['waiting_share']:.0%} |",
                flush=True,
            )
    if output is not None:
        shape = {"hidden_size": hidden_size, "micro_batch_size": micro_batch_size, "steps": steps}
        write_results(output, {"benchmark": "scaling", **shape, "rows": rows})


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
            "log": {"every": STEPS_PER_LINE, "tensorboard": False},
        }
        (together,) = _train(values, [Path(folder, "together")], num_ranks, micro_batch_size)
        alone = [together]
        if num_ranks > 1:
            paths = [Path(folder, f"alone-{number}") for number in range(num_ranks)]
            alone = _train(values, paths, 1, micro_batch_size)
    wall, cpu = together
    wall_alone, cpu_alone = (statistics.median(column) for column in zip(*alone, strict=True))
    # Processor time that a rank would have had if it had never waited.
    available = wall * min(1.0, len(os.sched_getaffinity(0)) / num_ranks)
    share = max(0.0, 1 - wall_alone / wall)
    return {
        "num_ranks": num_ranks,
        "stage": stage,
        "together_s": wall,
        "side_by_side_s": wall_alone,
        "cpu_together_s": cpu,
        "cpu_side_by_side_s": cpu_alone,
        "efficiency": wall_alone / wall,
        "communication_share": share,
        "waiting_share": min(share, max(0.0, share - (cpu - cpu_alone) / available)),
    }


def _train(
    values: dict[str, Any], run_dirs: list[Path], num_ranks: int, micro_batch_size: int
) -> list[tuple[float, float]]:
    """Train a run in each directory, all at the same time; wall and processor seconds per step."""
    ranks = []
    for run_dir in run_dirs:
        run_dir.mkdir()
        train = {**values["train"], "global_batch_size": num_ranks * micro_batch_size}
        # JSON is a subset of YAML.
        given = json.dumps({**values, "train": train, "run_dir": str(run_dir)})
        (run_dir / "given.yaml").write_text(given, encoding="utf-8")
        ranks += _start(run_dir / "given.yaml", num_ranks)
    try:
        for rank in ranks:
            if rank.wait():
                raise RuntimeError(f"a rank of the benchmark ended with status {rank.returncode}")
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [_seconds_per_step(run_dir) for run_dir in run_dirs]


def _start(config: Path, num_ranks: int) -> list[subprocess.Popen[bytes]]:
    """Start the ranks of one job, each with one thread, without a launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "clue_ds.pretrain.train", "--config", str(config)]
    common = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(num_ranks)
    ]


def _seconds_per_step(run_dir: Path) -> tuple[float, float]:
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    first, last = (line["loss"] for line in (lines[0], lines[-1]))
    if not last < first:
        raise UserError(
            f"the loss did not fall in {lines[-1]['step']} steps (from {first:.2f} to {last:.2f}), "
            "so this is not training; give more --steps, or a corpus of more text"
        )
    counted = lines[WARMUP_LINES:]
    names = ("seconds_per_step", "cpu_seconds_per_step")
    wall, cpu = (statistics.median(line[name] for line in counted) for name in names)
    return wall, cpu
