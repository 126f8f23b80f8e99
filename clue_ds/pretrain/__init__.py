"""Pretraining. For Python, the package itself is the call:

    import clue_ds

    result = clue_ds.pretrain("run.yaml")                   # or a dict, or a RunConfig
    result = clue_ds.pretrain(config, on_log=lambda line: print(line["step"], line["loss"]))

It does what `clue-ds pretrain` does in one process: the same files, and a run directory that holds
a checkpoint is continued. It can be called again and again, also after an error. Several ranks are
for `clue-ds launch`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clue_ds.config import RunConfig
    from clue_ds.pretrain.train import Run

OnLog = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Result:
    """A run that has ended. `lines`: of its log.jsonl, earlier starts included.

    `step`: updates made so far. `stopped`: it was asked to stop (Ctrl-C, or a notebook's stop
    button), saved, and can be continued. `checkpoint`: the newest one.
    """

    run_dir: Path
    step: int
    stopped: bool
    lines: list[dict[str, Any]]
    checkpoint: Path

    @property
    def loss(self) -> float:
        """The training loss of the last log line."""
        return float(self.lines[-1]["loss"])

    @property
    def held_out_loss(self) -> float | None:
        """The last loss on held-out text; None where there is none."""
        found = (line["held_out_loss"] for line in reversed(self.lines) if "held_out_loss" in line)
        return next(found, None)


def run(
    config: RunConfig | Mapping[str, Any] | str | Path, *, on_log: OnLog | None = None
) -> Result:
    """Pretrain in this process, or continue the run in `run_dir`; returns when it has ended.

    `config`: the settings of a run, nested as in its YAML file, or the path of that file. `on_log`
    is called with every log line; what it raises ends the run, which is saved up to its newest
    checkpoint. UserError for a mistake in the settings or the data, and when training diverges.
    """
    from clue_ds import config as run_config
    from clue_ds import dist
    from clue_ds.errors import UserError

    if isinstance(config, Mapping):
        config = run_config.validate(dict(config), "config")
    elif not isinstance(config, run_config.RunConfig):
        config = run_config.load(config)
    if dist.world_size() > 1:
        raise UserError(
            "clue_ds.pretrain is for one process; train on several ranks with: clue-ds launch -- "
            "pretrain --config run.yaml"
        )
    with _running(config) as started:
        from clue_ds.pretrain import train

        started.writers.on_line = on_log
        with started.writers, started.saver:
            step = train.train(started)
        train.report_end(started, step)
    return _result(config, step)


@contextlib.contextmanager
def _running(config: RunConfig) -> Iterator[Run]:
    """The run, whose threads, files, lock, signals and variables are given back in the end."""
    from clue_ds.job import rendezvous, run_lock, signals, watchdog
    from clue_ds.pretrain import train

    started: Run | None = None
    with rendezvous.environment_restored():
        try:
            started = train.build(config)
            yield started
        finally:
            if started is not None:
                started.loader.close()
                started.writers.close()
                started.engine.close(leaves=False)
            watch = watchdog.current()
            if isinstance(watch, watchdog.Watchdog):
                watch.close()
            signals.restore()
            run_lock.withdraw(config.run_dir)


def _result(config: RunConfig, step: int) -> Result:
    from clue_ds.checkpoint import manifest
    from clue_ds.metrics import LOG, parse_line

    run_dir = Path(config.run_dir)
    lines = map(parse_line, (run_dir / LOG).read_bytes().splitlines())
    return Result(
        run_dir=run_dir,
        step=step,
        stopped=step < config.train.steps,
        lines=[line for line in lines if line is not None],
        checkpoint=manifest.published(run_dir / manifest.FOLDER)[0],
    )


class _Pretrain(ModuleType):
    """The package, which can be called: clue_ds.pretrain(config)."""

    def __call__(
        self, config: RunConfig | Mapping[str, Any] | str | Path, *, on_log: OnLog | None = None
    ) -> Result:
        return run(config, on_log=on_log)


_Pretrain.__call__.__doc__ = run.__doc__
sys.modules[__name__].__class__ = _Pretrain


def main(argv: list[str]) -> None:
    """Pretrain an encoder on a corpus (`clue-ds pretrain --help` lists every setting)."""
    if {"-h", "--help"} & set(argv):
        from clue_ds import command_line

        command_line.parse(argv, prog="clue-ds pretrain")  # prints the help without importing torch
    from clue_ds.pretrain import train

    train.main(argv)
