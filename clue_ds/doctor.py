"""`clue-ds doctor`: checks what a run needs on this machine or on all hosts of a job.

    clue-ds doctor                                        this machine
    clue-ds doctor --config run.yaml                      also what this run needs: corpus, disk
    clue-ds launch --hostfile hosts -- doctor             every host: connect, compare, all-reduce
    srun --nodes=2 clue-ds launch -- doctor               the same under Slurm

It prints one line per check. Guarantees: each line that is not `ok` ends with the fix; the exit
status is 0 only if no line is `bad`. The checks between ranks are those that every pretraining run
makes before its first step.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from clue_ds import config as run_config
from clue_ds import dist, files, presets
from clue_ds.checkpoint import manifest, retention
from clue_ds.config import RunConfig
from clue_ds.errors import UserError, run_module
from clue_ds.job import preflight, watchdog
from clue_ds.presets import ModelConfig
from clue_ds.pretrain import auto, ds_json
from clue_ds.pretrain.auto import memory
from clue_ds.settings.arguments import refuse_repeated

MIN_TORCH = (2, 10)
# A run whose sizes are the defaults; nothing is read from these paths.
NO_RUN = {"run_dir": ".", "data": {"corpus": "."}}
MIN_OPEN_FILES = 1_024
MIN_DISK_BYTES = 10 << 30
PROGRAMS = {
    "ssh": "launch --hostfile: apt install openssh-client",
    "pdsh": "launch --hostfile: apt install pdsh",
    "srun": "launch --slurm: log in to a Slurm cluster",
    "mpirun": "launch --mpi: apt install openmpi-bin",
    "numactl": "--bind-cores: apt install numactl",
}


class Check(NamedTuple):
    """`level` is ok, note (a problem only for some uses) or bad; `fix` belongs to the last two."""

    level: str
    what: str
    fix: str = ""

    def line(self) -> str:
        return f"{self.level:<5} {self.what}" + (f"; {self.fix}" if self.fix else "")


def _versions() -> Check:
    found = preflight.versions()
    text = f"python {sys.version.split()[0]}, " + ", ".join(f"{n} {v}" for n, v in found.items())
    if tuple(map(int, found["torch"].split("+")[0].split(".")[:2])) < MIN_TORCH:
        return Check("bad", text, "pip install 'torch >= 2.10'")
    return Check("ok", text)


def _devices() -> Check:
    import torch

    kind, number = dist.device().type, torch.accelerator.device_count()
    if kind != "cpu":
        names = [dist.device_name(torch.device(kind, n)) for n in range(number)]
        noun = "GPUs" if kind == "cuda" else f"{kind} devices"
        return Check("ok", f"{number} {noun}: {', '.join(dict.fromkeys(names))}")
    if any(Path("/dev").glob("nvidia[0-9]*")):
        fix = (
            f"this torch needs CUDA {torch.version.cuda}; install one for your driver (nvidia-smi)"
        )
        return Check("bad", "there are NVIDIA devices, but torch can't use them", fix)
    cores = len(os.sched_getaffinity(0))
    return Check("note", f"no GPU, {cores} cores", "training will run on the CPU")


def _shared_memory() -> Check:
    import torch

    free = shutil.disk_usage(preflight.SHM).free if preflight.SHM.is_dir() else 0
    text = f"/dev/shm has {free >> 20} MiB free"
    needed = preflight.SHM_BYTES_PER_RANK * max(1, torch.accelerator.device_count())
    if free >= needed:
        return Check("ok", text)
    level = "bad" if torch.accelerator.device_count() > 1 else "note"
    return Check(level, text, "NCCL needs more: start the container with --shm-size=1g")


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    text = f"{Path.cwd()} has {files.size_text(free)} free"
    if free >= MIN_DISK_BYTES:
        return Check("ok", text)
    return Check("note", text, "`clue-ds plan` prints how much a run needs")


def _open_files() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"a process may open {soft} files"
    fix = f"run: ulimit -n {MIN_OPEN_FILES}"
    return Check("ok", text) if soft >= MIN_OPEN_FILES else Check("note", text, fix)


def _programs() -> list[Check]:
    return [
        Check("ok", f"{name} is installed")
        if shutil.which(name)
        else Check("note", f"{name} is not installed", f"only needed for {why}")
        for name, why in PROGRAMS.items()
    ]


MACHINE: tuple[Callable[[], Check], ...] = (
    _versions,
    _devices,
    _shared_memory,
    _disk,
    _open_files,
)


def _kernels(config: RunConfig | None) -> list[Check]:
    """What `model.kernels: auto` takes on this device, a line for each operation.

    At the sizes and in the precision of the run; without one, at those that are the defaults.
    """
    from clue_ds.pretrain.auto import kernels

    config = auto.on_this_machine(config or RunConfig.model_validate(NO_RUN))
    model = config.model.resolve(presets.get(config.model.preset).vocab_size)
    try:
        found = kernels.describe(config, model, dist.device())
    except UserError as error:
        return [Check("bad", str(error))]
    if found is None:
        reason = "kernels need a GPU and the package triton"
        return [Check("ok", f"model.kernels auto takes torch here: {reason}")]
    fix = "model.kernels auto takes torch for it; please report this line"
    return [
        Check("note", f"kernel {line}: {reason}", fix) if reason else Check("ok", f"kernel {line}")
        for line, reason in found
    ]


def _about_run(settings: list[str]) -> tuple[RunConfig | None, str, list[Check]]:
    """A run's config (None if it is invalid), its corpus' fingerprint, and the checks of both.

    `settings`: as on the command line of `clue-ds pretrain`.
    """
    from clue_ds.pretrain import batches, setup, train

    try:
        config = train.parse(settings, "clue-ds doctor")
    except UserError as error:
        return None, "", [Check("bad", str(error))]
    try:
        corpus = batches.open_data(config)
        for number in range(len(config.phases)):
            batches.open_data(config.in_phase(number))
        model = config.model.resolve(corpus.vocab_size)
        setup.check(config, model, ds_json.read(config.deepspeed))
    except UserError as error:
        return config, "", [Check("bad", str(error))]
    checks = [
        Check("ok", f"the settings of the run {config.run_dir} are valid"),
        Check("ok", f"corpus {config.data.corpus}: {corpus.num_tokens:,} tokens"),
        _room_for_checkpoints(config, model),
    ]
    return config, corpus.fingerprint, checks


def _room_for_checkpoints(config: RunConfig, model: ModelConfig) -> Check:
    """Whether the disk has space for the checkpoints that don't exist yet."""
    stage = ds_json.zero_stage(ds_json.read(config.deepspeed))
    num_parameters = memory.count_parameters(model)
    precision = auto.on_this_machine(config).train.precision
    size = memory.checkpoint_bytes(num_parameters, precision, stage)
    run_dir = Path(config.run_dir)
    num_existing = len(manifest.published(run_dir / manifest.FOLDER))
    number = max(1, retention.most_on_disk(config) - num_existing)
    parent = next(p for p in (run_dir.absolute(), *run_dir.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(parent).free
    text = (
        f"run_dir {run_dir}: {files.size_text(free)} free; {number} more checkpoints take "
        f"{files.size_text(number * size)}"
    )
    if not os.access(parent, os.W_OK):
        return Check(
            "bad", f"run_dir {run_dir}: you may not write to {parent}", "set another run_dir"
        )
    if free < number * size:
        return Check("bad", text, "free some space, lower checkpoint.keep, or set another run_dir")
    return Check("ok", text)


def _between_ranks(
    config: RunConfig | None, fingerprint: str, of_rank: Sequence[Check]
) -> list[Check]:
    """Rendezvous, comparison and all-reduce, as before the first step of a run.

    `of_rank` are the checks that this rank made on its own.
    """
    from clue_ds.pretrain.engine import start

    health = run_config.DEFAULT_HEALTH if config is None else config.health
    try:
        watch = watchdog.start(health, "clue-ds doctor", can_stop=False)
        device = start()
        text = preflight.check(watch, config, fingerprint, device)
    except UserError as error:
        return [Check("bad", str(error))]
    lines = dist.all_gather([check.line() for check in of_rank if check.level == "bad"])
    watch.close()
    return [
        Check("ok", f"all ranks answered, have the same setup and finished an all-reduce: {text}"),
        *(Check("bad", f"rank {r}: {line}") for r, bad in enumerate(lines) for line in bad if r),
    ]


def main(argv: list[str]) -> None:
    """Check this machine, or all hosts of a job, and print how to fix what is wrong."""
    parser = argparse.ArgumentParser(
        prog="clue-ds doctor",
        description=main.__doc__,
        epilog="every setting of a run can be given as well: --data.corpus corpus (`clue-ds "
        "pretrain --help` lists them). On several hosts: clue-ds launch --hostfile F -- doctor",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of a run, whose settings, corpus and disk space are checked too",
    )
    refuse_repeated(argv)
    arguments, settings = parser.parse_known_args(argv)
    if arguments.config is not None:
        settings += ["--config", arguments.config]
    with watchdog.reporting(), dist.report_errors_once():
        config: RunConfig | None = None
        fingerprint, found = "", [check() for check in MACHINE]
        if settings:
            config, fingerprint, of_run = _about_run(settings)
            found += of_run
        on_rank_0 = [*_programs(), *_kernels(config)] if dist.rank() == 0 else []
        checks = [*found, *on_rank_0]
        checks += _between_ranks(config, fingerprint, found)
        if dist.rank() == 0:
            print("\n".join(check.line() for check in checks), flush=True)
        bad = dist.rank() == 0 and any(check.level == "bad" for check in checks)
    if bad:
        raise SystemExit(1)
    dist.report_end(stopped=False)


if __name__ == "__main__":
    sys.exit(run_module("clue-ds doctor", main))
