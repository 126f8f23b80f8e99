"""`clue-ds bench gpu`: what to run first on a new GPU machine; one JSON file and one page.

Stages, each in a process of its own with a time limit, so that one that fails or hangs stops no
other: environment, kernel check, kernel bandwidths, what the device can do, training steps of tiny
and base with one switch after the other against transformers' BERT, and a short real pretraining.
The time is shared out by weight, and a stage that ends early leaves its rest to the later ones.
JSON and page are written anew after every stage, so that a run that is cut short leaves them too.

`--small` rehearses all stages at small sizes, on a machine without a GPU too: what is compiled is
traced and not made into machine code, kernels run in Triton's interpreter, and the page says that
it is a rehearsal.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from clue_ds import files
from clue_ds.benchmarks import gpu_page
from clue_ds.benchmarks.description import describe
from clue_ds.benchmarks.gpu_steps import BASE, TINY
from clue_ds.errors import UserError
from clue_ds.vocab_file import SPECIAL_TOKENS

RESULTS, PAGE, CONFIG = "gpu.json", "gpu.md", "pretrain.yaml"
GRACE_SECONDS = 20.0  # from the request to stop until a stage is killed
SECONDS = "{seconds}"  # in a command: when a stage starts nothing more
STATUS_STOPPED = 75  # of a run that saved and stopped on request
FIRST_HAN = 0x4E00
NUM_TOKENS = 8_021  # of the vocabulary, as in CLUE's
STEPS_PER_SENTENCE = (1, 2, 3, 5, 7, 11)


class Stage(NamedTuple):
    """A process of the benchmark. `asks_to_stop`: it ends by itself soon after the signal USR1."""

    name: str
    weight: float
    command: list[str]
    asks_to_stop: bool = False


def write_text(path: Path, num_chars: int) -> None:
    """Text that a model can learn: in a sentence each character follows from the one before.

    A sentence goes through the characters in steps of one of STEPS_PER_SENTENCE.
    """
    han, lines, number = NUM_TOKENS - len(SPECIAL_TOKENS), [], 0
    for start in range(0, num_chars, 40):
        step = STEPS_PER_SENTENCE[number % len(STEPS_PER_SENTENCE)]
        first = start * 2_654_435_761 % han  # scattered over all characters
        lines.append("".join(chr(FIRST_HAN + (first + i * step) % han) for i in range(40)))
        number += 1
        if number % 12 == 0:
            lines.append("")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_vocab(path: Path) -> None:
    han = (chr(FIRST_HAN + i) for i in range(NUM_TOKENS - len(SPECIAL_TOKENS)))
    path.write_text("\n".join([*SPECIAL_TOKENS, *han]) + "\n", encoding="utf-8")


def stages_of(folder: Path, corpus: Path | None, small: bool) -> list[Stage]:
    """All stages in their order; the commands of one may need what an earlier one wrote."""
    python, flags = [sys.executable, "-m"], ["--small"] if small else []
    clue_ds = [*python, "clue_ds.cli"]
    probe = [*python, "clue_ds.benchmarks.gpu_probe"]
    steps = [*python, "clue_ds.benchmarks.gpu_steps", "--output", str(folder / "steps.jsonl")]
    steps += [f"--seconds={SECONDS}", *flags]
    bandwidth = [*clue_ds, "bench", "kernels", "--csv", str(folder / "kernels.csv")]
    bandwidth += ["--op", "bias_dropout_add_layer_norm", "layer_norm", "masked_softmax"]
    bandwidth += ["--dropout", "0.1", "--mode", "fwd", "bwd"]
    if small:
        bandwidth += ["--device", "cpu", "--hidden", "32", "--rows", "64"]
    else:
        bandwidth += ["--hidden", "312", "768"]
    check = [*probe, "kernels", "--output", str(folder / "kernel_check.json"), *flags]
    found = [
        Stage("environment", 3, [*clue_ds, "doctor"]),
        Stage("kernel check", 10, check),
        Stage("steps of tiny", 27, [*steps, "--preset", TINY]),
        Stage("steps of base", 24, [*steps, "--preset", BASE]),
    ]
    if corpus is None:
        corpus = folder / "corpus"
        shard = [*clue_ds, "shard", str(folder / "text.txt"), "--vocab", str(folder / "vocab.txt")]
        shard += ["--output", str(corpus), "--words", "none", "--workers", "2", "--force"]
        found.append(Stage("corpus", 5, shard))
    pretrain = [*clue_ds, "pretrain", "--config", str(folder / CONFIG)]
    found += [
        Stage("pretraining", 12, [*pretrain, "--data.corpus", str(corpus)], asks_to_stop=True),
        Stage("kernel bandwidths", 12, bandwidth),
        Stage("device", 9, [*probe, "device", "--output", str(folder / "device.json"), *flags]),
    ]
    return found


def write_config(path: Path, run_dir: Path, small: bool) -> None:
    """The config of the short pretraining, without its corpus: tiny, with the fastest switches."""
    rows, length, steps = (8, 32, 6) if small else (1_024, 128, 100_000)
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "deepspeed": "zero1",
        "data": {"seq_length": length},
        "model": {
            "preset": TINY,
            "compile": not small,
            "kernels": "torch" if small else "triton",
        },
        "train": {
            "steps": steps, "global_batch_size": rows, "micro_batch_size": rows, "lr": 1e-3,
            "precision": "fp32" if small else "bf16", "warmup_steps": min(100, steps - 1),
        },
        "checkpoint": {"every": steps, "keep": 1},
        "log": {"every": 2 if small else 20, "tensorboard": False},
    }  # fmt: skip
    files.write_json(path, values)  # JSON is YAML


def run_stage(stage: Stage, limit: float, log: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run a stage for `limit` seconds at most; its output goes into `log`.

    All processes of the stage are ended with it.
    """
    began, seconds = time.monotonic(), f"{0.85 * limit:.0f}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [part.replace(SECONDS, seconds) for part in stage.command],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        try:
            result = _wait(process, stage, limit)
        finally:
            _kill(process)
    took = time.monotonic() - began
    return {"name": stage.name, "result": result, "seconds": took, "limit": limit}


def _wait(process: subprocess.Popen[bytes], stage: Stage, limit: float) -> str:
    grace = min(GRACE_SECONDS, limit / 2) if stage.asks_to_stop else 0.0
    try:
        status = process.wait(timeout=limit - grace)
    except subprocess.TimeoutExpired:
        if not stage.asks_to_stop:
            return "out of time"
        process.send_signal(signal.SIGUSR1)
        try:
            status = process.wait(timeout=grace)
        except subprocess.TimeoutExpired:
            return "out of time"
        if status == STATUS_STOPPED:
            return "ok: saved and stopped on request"
    return "ok" if status == 0 else f"failed with status {status}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a stage: it leads a session of its own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def stage_environment(small: bool) -> dict[str, str]:
    """The variables of every stage. One process needs no network, and may have none."""
    more = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        more[name] = os.environ.get(name, "lo")
    if small and not torch.cuda.is_available():
        more["TRITON_INTERPRET"] = "1"
    return {**os.environ, **more}


def run_all(
    stages: list[Stage], seconds: float, folder: Path, small: bool, console: Console
) -> dict[str, Any]:
    """Run the stages, each within its share of what is left of `seconds`; returns the figures."""
    began, done = time.monotonic(), []
    environment, facts = stage_environment(small), describe()
    for number, stage in enumerate(stages):
        left = max(1.0, seconds - (time.monotonic() - began))
        share = stage.weight / sum(later.weight for later in stages[number:])
        log = folder / "logs" / f"{stage.name.replace(' ', '_')}.log"
        line = run_stage(stage, left * share, log, environment)
        done.append(line)
        console.print(f"{stage.name:<20}{line['seconds']:>7.1f} s  {line['result']}")
        result = {"environment": facts, **gpu_page.collect(folder, done, small)}
        files.write_json(folder / RESULTS, result)
        files.write_text(folder / PAGE, gpu_page.page(result, facts))
    return result


def gpu(
    minutes: float = 10.0,
    output: Path = Path("gpu-bench"),
    corpus: Path | None = None,
    small: bool = False,
    only: tuple[str, ...] = (),
) -> None:
    """Measure a new GPU machine in ten minutes: kernels, training steps, a short pretraining.

    Args:
        minutes: time for all stages; each gets its share, and one that is cut off stops no other.
        output: folder for gpu.json, gpu.md and the logs of the stages; it is replaced.
        corpus: corpus of the short pretraining; by default one is made of text with a simple rule.
        small: rehearse every stage at small sizes, which needs no GPU.
        only: names of the stages to run; by default all.
    """
    if not small and not torch.cuda.is_available():
        raise UserError(
            "this measures a CUDA GPU, and torch finds none here; `--small` rehearses every stage "
            "at small sizes without one"
        )
    if output.exists() and not (output / "logs").is_dir():
        raise UserError(f"{output} exists and was not written by this benchmark; set --output")
    if minutes <= 0:
        raise UserError(f"--minutes must be more than 0, not {minutes:g}")
    folder = output.absolute()
    stages = stages_of(folder, None if corpus is None else corpus.absolute(), small)
    if unknown := set(only) - {stage.name for stage in stages}:
        names = ", ".join(stage.name for stage in stages)
        raise UserError(f"there is no stage {sorted(unknown)[0]!r}; stages: {names}")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "logs").mkdir(parents=True)
    write_config(folder / CONFIG, folder / "run", small)
    if corpus is None:
        write_vocab(folder / "vocab.txt")
        write_text(folder / "text.txt", 20_000 if small else 4_000_000)
    console = Console()
    if small:
        console.print("rehearsal at small sizes: no figure says anything about a GPU")
    chosen = [stage for stage in stages if not only or stage.name in only]
    run_all(chosen, 60 * minutes, folder, small, console)
    console.print(f"written: {output / PAGE} (to read), {output / RESULTS} (all figures)")
