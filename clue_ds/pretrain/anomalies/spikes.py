"""A loss far above those before it: a warning, the end of the run, or a rollback past its batches.

A spike is a step whose loss is train.spike_zscore standard deviations above the mean of the
train.spike_window losses before it. The losses are looked at whenever a log line is made, which is
before every save; the meter has summed them over the ranks by then, so this costs no communication,
and all ranks see the same numbers and decide the same. After a rollback the run repeats the steps
from a checkpoint up to train.rollback_steps before the spike on the same batches, and from there on
uses the batches that come after the ones to skip.

Guarantees: what a run does is a function of its settings, its losses and its skips, and a
checkpoint holds both in FILE. So a run that dies, at any moment of a rollback too, does the same
when it is started again, and which checkpoints happen to exist changes nothing: all up to the first
batch that is skipped are of the same trajectory, and later ones are deleted. The batch of a step is
a function of the step and the skips (data/stream/loader.py). What is skipped is never trained on
again, and at most train.max_rollbacks times in a run.

The threshold is measured: in 4,900 steps of four healthy runs (batches of 4, 8, 16 and 32 rows,
peak learning rates of 5e-4 to 3e-3, warm-up over 20 to 150 steps) the largest z-score was 3.7. The
first window of a run is not looked at.

Rejected: a file in the run directory that records rollbacks (it could disagree with a checkpoint,
and without it a restart finds the same spike again); loading the newest checkpoint whatever its
step (a run that was interrupted has others, and would end differently); a look at every step as it
ends (the host would wait for one more sum over the ranks).
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from clue_ds import dist
from clue_ds.checkpoint import manifest as manifests
from clue_ds.checkpoint.manifest import Choice
from clue_ds.config import RunConfig
from clue_ds.data.stream.loader import Skip, batch_number
from clue_ds.errors import UserError
from clue_ds.settings.phases import Part, parts

# In a checkpoint; earlier versions wrote none.
FILE = "losses.json"
# Smaller deviations count as this share of the mean, and as this many nats: a run that knows its
# text by heart has next to none.
LEAST_SHARE, LEAST_NATS = 0.01, 0.01


@dataclass(frozen=True)
class Spike:
    """The loss of `step` (from 1), with mean and standard deviation of the losses before it."""

    step: int
    loss: float
    mean: float
    deviation: float

    @property
    def zscore(self) -> float:
        return (self.loss - self.mean) / self.deviation


class Spikes:
    """What a run does about spikes. `skips`: the batches that it has skipped so far."""

    def __init__(
        self, config: RunConfig, state: str | None = None, skips: tuple[Skip, ...] = ()
    ) -> None:
        """`state`: what `state` returned when the checkpoint was saved from which the run goes on;
        `skips`: those of a run that goes back to it; they begin with those of the checkpoint."""
        self._config, self._train = config, config.train
        self._losses: deque[float] = deque(maxlen=config.train.spike_window)
        self.skips = skips
        self._warned_at = -math.inf
        self._part = parts(config.model_dump())[0]
        if state is not None:
            values = json.loads(state)
            self._losses.extend(values["losses"])
            self.skips = skips or tuple(Skip(*each) for each in values["skips"])

    def begin(self, part: Part) -> None:
        """Go on with the phase that begins; its losses are not compared to those before it."""
        self._part = part
        self._losses.clear()

    def resume(self, part: Part, step: int) -> None:
        """Go on with `part` after `step` updates."""
        self._part = part
        if step == part.begin:
            self._losses.clear()

    def state(self) -> str:
        """The text of FILE: the last losses and the skips."""
        return json.dumps({"losses": list(self._losses), "skips": self.skips}) + "\n"

    @property
    def num_skipped(self) -> int:
        """Number of batches that the run has skipped."""
        return sum(skip.num_batches for skip in self.skips)

    def look(self, step_losses: list[tuple[int, float]]) -> Spike | None:
        """The first spike among the next losses of the run, which count as seen from now on."""
        found = None
        for step, loss in step_losses:
            spike = self._compare(step, loss)
            self._losses.append(loss)
            found = found or spike
        return found

    def _compare(self, step: int, loss: float) -> Spike | None:
        if len(self._losses) < self._train.spike_window:
            return None
        mean = statistics.fmean(self._losses)
        least = max(LEAST_SHARE * mean, LEAST_NATS)
        spike = Spike(step, loss, mean, max(statistics.pstdev(self._losses), least))
        return spike if spike.zscore > self._train.spike_zscore else None

    def decide(self, spike: Spike) -> Skip | None:
        """What to skip in a rollback, or None when the run goes on; then `warning` says so.

        UserError when the run must not go on.
        """
        policy = self._train.on_spike
        if policy == "stop":
            raise UserError(
                f"{self._describe(spike)}. Nothing was saved after the newest checkpoint before it."
                " Look at these samples; the same command with --train.on_spike rollback goes on "
                "without them, with --train.on_spike warn it goes on as if nothing had happened"
            )
        if policy == "warn" or self._regular_checkpoint(self._first_skipped(spike)) == 0:
            return None
        if len(self.skips) >= self._train.max_rollbacks:
            raise UserError(
                f"{self._describe(spike)}, after {len(self.skips)} rollbacks "
                f"(train.max_rollbacks {self._train.max_rollbacks}) that skipped "
                f"{self.num_skipped} batches. It is not the data alone: start again in a new "
                "run_dir with a smaller train.lr or more train.warmup_steps, or go on with "
                "--train.on_spike warn"
            )
        begin = self._first_skipped(spike)
        return Skip(begin, spike.step - 1 - begin + self._train.rollback_batches)

    def _first_skipped(self, spike: Spike) -> int:
        """The step (from 0) at which other batches begin; never before those of the last time."""
        last = self.skips[-1].step if self.skips else 0
        return max(spike.step - 1 - self._train.rollback_steps, last)

    def _regular_checkpoint(self, step: int) -> int:
        """The last step up to `step` at which every run with these settings saves; 0: none yet."""
        return step - step % self._config.checkpoint.every

    def warning(self, spike: Spike) -> str | None:
        """The line for the user; None if the last one was less than a window ago."""
        if spike.step - self._warned_at < self._train.spike_window:
            return None
        self._warned_at = spike.step
        why = ""
        if self._train.on_spike == "rollback":
            why = "; there is no checkpoint yet to go back to"
        return f"warning: {self._describe(spike)}{why}; the run goes on"

    def past(self, spike: Spike, skip: Skip) -> str:
        """The line for the user about a rollback."""
        first = batch_number(skip.step, self.skips)
        return (
            f"{self._describe(spike)}; rollback {len(self.skips) + 1} of "
            f"{self._train.max_rollbacks}: the steps from {skip.step + 1} on are trained again, "
            f"without {skip.num_batches} batches "
            f"({self._samples(first, skip.num_batches)})"
        )

    def _describe(self, spike: Spike) -> str:
        number = self._part.batch(batch_number(spike.step - 1, self.skips))
        return (
            f"the loss of step {spike.step} ({self._samples(number, 1)}) is {spike.loss:.4f}, "
            f"{spike.zscore:.1f} standard deviations above the mean {spike.mean:.4f} of the "
            f"{self._train.spike_window} steps before it"
        )

    def _samples(self, first: int, number: int) -> str:
        size = self._part.settings["train.global_batch_size"]
        of = f" of phase {self._part.number + 1}" if self._part.number else ""
        return f"samples {first * size:,} to {(first + number) * size - 1:,} of the stream{of}"


def check_retention(config: RunConfig) -> None:
    """UserError when too few checkpoints are kept for a rollback that the config asks for."""
    if config.train.on_spike != "rollback":
        return
    every, keep = config.checkpoint.every, config.checkpoint.keep
    # Found at the next log line, it may lie a whole interval behind the steps to go back.
    needed = -(-(config.train.rollback_steps + min(config.log.every, every)) // every) + 1
    if keep < needed:
        raise UserError(
            f"train.on_spike rollback goes back train.rollback_steps {config.train.rollback_steps} "
            f"before a spike, and checkpoint.keep {keep} with checkpoint.every {every} keeps none "
            f"that is as old; set checkpoint.keep to {needed}, or lower train.rollback_steps"
        )


def read(choice: Choice | None) -> str | None:
    """What the chosen checkpoint says about losses and skips; its hash was compared before."""
    if choice is None or FILE not in choice.manifest.files:
        return None
    return (choice.directory / FILE).read_text(encoding="utf-8")


def go_back(run_dir: str | Path, skip: Skip) -> Choice:
    """The newest intact checkpoint up to the first step that is to have other batches.

    Those after it are of a trajectory that is given up, and are deleted, the newest first: a
    process that dies here resumes from one that is left, and finds the same spike again. Every rank
    must call it. UserError when there is none.
    """
    choice, error = None, None
    if dist.rank() == 0:
        folder = Path(run_dir) / manifests.FOLDER
        reasons = []
        for directory in manifests.published(folder):
            if manifests.step_of(directory) > skip.step:
                _delete(directory)
                continue
            try:
                choice = Choice(directory, manifests.verify(directory), {})
                break
            except manifests.Damaged as damage:
                reasons.append(f"; {directory.name}: {damage}")
            except UserError as refusal:
                reasons.append(f"; {refusal}")
        if choice is None:
            error = (
                f"a rollback needs a checkpoint of step {skip.step} or before, and {folder} has "
                f"none{''.join(reasons)}. Raise checkpoint.keep, or start the same command with "
                "--train.on_spike warn"
            )
    dist.agree(error)
    choice = dist.broadcast(choice)
    assert choice is not None
    return choice


def _delete(directory: Path) -> None:
    # Renamed first, because a half-deleted directory must not look published; the next start of
    # the run removes what is left of it.
    doomed = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    shutil.rmtree(directory.rename(doomed), ignore_errors=True)
