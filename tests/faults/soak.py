"""`make soak`: a long run that is killed and damaged again and again, beside an undisturbed twin.

Two ranks train a small model and save every 20 steps. In every 1,000 steps, 20 SIGKILLs end both
ranks and three faults of FAULTS happen, at moments drawn from a seed; after each, the same command
is started again. The twin runs first, with one process per rank from beginning to end, and shows
whether memory or descriptors grow. At the end, weights, moments and random generators of both are
compared bit for bit, and docs/soak.md and its Chinese twin are written from the report.

    make soak                                                  about an hour on 2 idle cores
    make soak ARGS="--hidden-size 32 --seq-length 16 --batch-size 8"     all of it in minutes

Ranks are forked from a process that has imported everything (tests/zygote.py); the report also says
how long importing takes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent)]

import soak_page  # noqa: E402
from killer import differences, environments, state  # noqa: E402
from ranks import make_corpus, tiny_config  # noqa: E402
from soak_page import EVERY, FAULTS, FAULTS_PER_1000, KILLS_PER_1000, RANKS  # noqa: E402
from zygote import Zygote  # noqa: E402

from clue_ds import config as run_config  # noqa: E402
from clue_ds.checkpoint import manifest  # noqa: E402

GOES_ON = "pause"

RANK = """
import errno, json, os, signal, sys, threading, time
from clue_ds import dist
from clue_ds.checkpoint import manifest
from clue_ds.pretrain import train
from clue_ds.pretrain.engine import Engine

events, stats = json.loads(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND)
page, rank, done = os.sysconf("SC_PAGE_SIZE"), dist.rank(), [0]

def say(*fields):
    if rank == 0:
        os.write(stats, (json.dumps(fields) + "\\n").encode())

def die(seconds):
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)

def fails(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

def happen(kind, seconds):
    if kind == "full disk":
        manifest.publish = fails
    elif kind == "pause":
        if rank == 1 and os.fork() == 0:
            os.kill(os.getppid(), signal.SIGSTOP)
            time.sleep(1.0)
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
    elif kind != "one rank" or rank == 1:
        threading.Thread(target=die, args=(seconds,), daemon=True).start()

train_loop, saver, step = train.train, train.saving.Saver, Engine.step

def begin(run):
    done[0] = run.start_step
    say("begin", time.monotonic(), done[0])
    return train_loop(run)

def after_step(self, lr):
    norm = step(self, lr)
    done[0] += 1
    memory = descriptors = 0
    if done[0] % 10 == 0:
        memory = int(open("/proc/self/statm").read().split()[1]) * page
        descriptors = len(os.listdir("/proc/self/fd"))
    say("step", time.monotonic(), done[0], memory, descriptors)
    while events and done[0] >= events[0]["step"]:
        event = events.pop(0)
        happen(event["kind"], event["seconds"])
    return norm

def note(writers, text):
    if text.startswith("warning: "):
        say("warning", text)

inside = [0]

def timed(name):
    original = getattr(saver, name)

    def call(*arguments, **named):
        began = time.monotonic()
        inside[0] += 1
        try:
            original(*arguments, **named)
        finally:
            inside[0] -= 1
        if not inside[0]:  # a save waits for the one before it
            say(name, time.monotonic() - began)

    setattr(saver, name, call)

timed("save")
timed("wait")
train.Writers.note = note
train.train, Engine.step = begin, after_step
train.main(sys.argv[3:])
"""


class Run:
    """A run directory, and what its starts measured."""

    def __init__(self, folder: Path, name: str, options: argparse.Namespace, corpus: Path) -> None:
        self.folder, self.name = folder, name
        self.directory, self.config = folder / name, folder / f"{name}.yaml"
        config = tiny_config(
            corpus,
            self.directory,
            deepspeed="zero1",
            data={"seq_length": options.seq_length},
            model={
                "hidden_size": options.hidden_size,
                "intermediate_size": 4 * options.hidden_size,
                "max_position_embeddings": options.seq_length,
            },
            train={
                "steps": options.steps,
                "warmup_steps": options.steps // 20,
                "global_batch_size": options.batch_size,
                "micro_batch_size": options.batch_size // RANKS,
            },
            checkpoint={"every": EVERY, "keep": 3},
            log={"every": 10},
        )
        run_config.save(config, self.config)
        self.ends: Counter[str] = Counter()
        self.wall = self.starting = self.ending = self.saving = 0.0
        self.num_saves = 0
        self.warnings: list[str] = []  # of slow ranks and loss spikes; there are none to find
        # (step, seconds, bytes of memory or 0, descriptors or 0); steps that were repeated twice.
        self.steps: list[tuple[int, float, int, int]] = []

    def start(self, zygote: Zygote, events: list[dict[str, Any]]) -> list[int]:
        """One start, which the last event ends, or else the end of the run; statuses."""
        stats = self.folder / "stats.jsonl"
        stats.write_text("")
        logs = [self.folder / f"{self.name}-{rank}.err" for rank in range(RANKS)]
        arguments = [json.dumps(events), str(stats), "--config", str(self.config)]
        began = time.monotonic()
        statuses = zygote.run(RANK, arguments, environments(RANKS), logs)
        ended = time.monotonic()
        self.wall += ended - began
        self.ends[str(statuses)] += 1
        lines = [json.loads(line) for line in stats.read_text().splitlines()]
        last = ended
        for kind, *values in lines:
            if kind == "begin":
                self.starting += values[0] - began
                last = values[0]
            elif kind == "warning":
                self.warnings += values
            elif kind in ("save", "wait"):
                self.saving += values[0]
                self.num_saves += kind == "save"
                last += values[0]
            else:
                now, step, memory, descriptors = values
                self.steps.append((step, now - last, memory, descriptors))
                last = now
        self.ending += ended - last
        return statuses


def draw_events(steps: int, seed: int) -> list[dict[str, Any]]:
    """All that happens to the run, in the order of steps."""
    draw = random.Random(seed)
    kinds = ["kill"] * (steps * KILLS_PER_1000 // 1000)
    kinds += [list(FAULTS)[n % len(FAULTS)] for n in range(steps * FAULTS_PER_1000 // 1000)]
    events = [
        {"kind": kind, "step": draw.randrange(1, steps - 3 * EVERY), "seconds": draw.random() / 10}
        for kind in kinds
    ]
    return sorted(events, key=lambda event: event["step"])


def disturb(run: Run, zygote: Zygote, events: list[dict[str, Any]], draw: random.Random) -> None:
    """Start the run again and again until it is done."""
    waiting: list[dict[str, Any]] = []
    for number, event in enumerate(events, start=1):
        waiting.append(event)
        if event["kind"] == GOES_ON:
            continue
        statuses = run.start(zygote, waiting)
        waiting = []
        said = (run.folder / f"{run.name}-0.err").read_text()
        assert statuses != [0] * RANKS, f"the run ended before {event}"
        assert "Traceback" not in said, said
        if event["kind"] == "torn log":
            with (run.directory / "log.jsonl").open("ab") as log:
                log.write(b'{"step": 1, "lo')
        if event["kind"] == "flipped bit":
            flip_a_bit(run.directory, draw)
        print(f"{number} of {len(events)}: {event['kind']} at step {event['step']}", flush=True)
    statuses = run.start(zygote, waiting)
    assert statuses == [0] * RANKS, (run.folder / f"{run.name}-0.err").read_text()


def flip_a_bit(run_dir: Path, draw: random.Random) -> None:
    """Damage the newest checkpoint, if there is another one."""
    newest, *others = manifest.published(run_dir / manifest.FOLDER)
    if others:
        path = draw.choice([p for p in sorted(newest.rglob("*")) if p.stat().st_size > 0])
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(content))


def growth(twin: Run) -> dict[str, Any]:
    """Memory and descriptors of the twin's rank 0, from a tenth of the run to its end."""
    samples = [(step, memory, files) for step, _, memory, files in twin.steps if memory]
    first = [s for s in samples if s[0] >= twin.steps[-1][0] // 10]
    size = max(1, len(first) // 10)
    begin, end = (statistics.median(s[1] for s in part) for part in (first[:size], first[-size:]))
    return {
        "memory_mib_after_a_tenth": round(begin / 2**20, 1),
        "memory_mib_at_the_end": round(end / 2**20, 1),
        "memory_growth_percent": round(100 * (end / begin - 1), 2),
        "descriptors_after_a_tenth": statistics.median(s[2] for s in first[:size]),
        "descriptors_at_the_end": statistics.median(s[2] for s in first[-size:]),
    }


def times(run: Run, steps: int) -> dict[str, Any]:
    """Where the time of a run went, in seconds; the first pass over each step is the useful one."""
    seen: dict[int, float] = {}
    repeated = 0.0
    for step, seconds, _, _ in run.steps:
        if step in seen:
            repeated += seconds
        else:
            seen[step] = seconds
    assert len(seen) == steps, (len(seen), steps)
    useful = sum(seen.values())
    return {
        "wall_s": round(run.wall, 1),
        "useful_steps_s": round(useful, 1),
        "repeated_steps": len(run.steps) - steps,
        "repeated_steps_s": round(repeated, 1),
        "saves": run.num_saves,
        "saves_s": round(run.saving, 1),
        "starts": sum(run.ends.values()),
        "starts_s": round(run.starting, 1),
        "ends_s": round(run.ending, 1),
        "goodput_percent": round(100 * useful / run.wall, 1),
        "goodput_without_kills_percent": round(
            100 * useful / (run.wall - repeated - run.starting - run.ending), 1
        ),
    }


def seconds_to_import() -> float:
    """What a start costs that is not forked, beside what a forked one costs."""
    began = time.monotonic()
    code = (
        "from clue_ds.pretrain import train; from clue_ds.checkpoint import deepspeed_import as d"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", f"{code}; d.import_deepspeed()"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return round(time.monotonic() - began, 1)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both runs, and the report about them."""
    text = (ROOT / "docs" / "examples" / "sample.txt").read_text(encoding="utf-8")
    corpus = make_corpus(folder, text, num_documents=2_000)
    zygote = Zygote()
    try:
        twin = Run(folder, "twin", options, corpus)
        assert twin.start(zygote, []) == [0] * RANKS, (folder / "twin-0.err").read_text()
        print(f"the twin took {twin.wall:.0f} s", flush=True)
        run = Run(folder, "run", options, corpus)
        events = draw_events(options.steps, options.seed)
        disturb(run, zygote, events, random.Random(options.seed))
    finally:
        zygote.close()
    different = differences(state(run.directory), state(twin.directory))
    settings = ("steps", "seed", "hidden_size", "seq_length", "batch_size")
    chosen = " ".join(f"--{name.replace('_', '-')} {getattr(options, name)}" for name in settings)
    command = f'make soak ARGS="{chosen}"'
    return {
        "command": command,
        "environment": {
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "busy": os.getloadavg()[0] > RANKS + 1,
        },
        "settings": {name: getattr(options, name) for name in settings},
        "ranks": RANKS,
        "events": dict(Counter(event["kind"] for event in events)),
        "statuses": dict(run.ends),
        "tensors_compared": len(state(twin.directory)),
        "tensors_that_differ": different,
        "undisturbed": times(twin, options.steps),
        "disturbed": times(run, options.steps),
        "growth": growth(twin),
        "warnings_of_the_undisturbed": twin.warnings,
        "seconds_to_import": seconds_to_import(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--seq-length", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32, help="rows per step, both ranks")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/soak.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/soak.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="clue-ds-soak-") as folder:
        report = measure(options, Path(folder))
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    soak_page.write(report, options.page)
    print(json.dumps(report, indent=1))
    if report["tensors_that_differ"]:
        sys.exit("the disturbed run ended with other weights, moments or generators")


if __name__ == "__main__":
    main()
