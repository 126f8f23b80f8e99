"""What a phase of a run may change, and which settings hold at which step.

Guarantees: everything here is a function of the config alone, so every reader of a config (the run,
the plan, the check of a manifest, the model card) divides a run in the same way. The types and
ranges of the values are checked where they are owned: config.py builds the sections that hold in a
phase out of those of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field

from clue_ds.data.sampling import RowKind, num_lanes
from clue_ds.settings import paths
from clue_ds.settings.batch_sizes import MicroBatch
from clue_ds.settings.sections import Section


class PhaseData(Section):
    """What a phase may change of `data`; null keeps what the top level says."""

    seq_length: int | None = Field(None, description="replaces data.seq_length")
    samples: RowKind | None = Field(None, description="replaces data.samples")
    max_ngram: int | None = Field(None, description="replaces data.max_ngram")
    mask_prob: float | None = Field(None, description="replaces data.mask_prob")
    predictions_per_sequence: int | None = Field(
        None, description="replaces data.predictions_per_sequence"
    )
    mixture: dict[Annotated[str, AfterValidator(paths.expand)], float] | None = Field(
        None, description="replaces data.mixture; {} leaves data.corpus alone"
    )


class PhaseTrain(Section):
    """What a phase may change of `train`; null keeps what the top level says."""

    global_batch_size: int | None = Field(None, description="replaces train.global_batch_size")
    micro_batch_size: MicroBatch | None = Field(None, description="replaces train.micro_batch_size")


class Phase(Section):
    """A part of a run with settings of its own; all others are those of the top level."""

    until: int | None = Field(
        None,
        ge=1,
        description="last step of the phase; the last phase has none and ends at train.steps",
    )
    data: PhaseData = PhaseData()
    train: PhaseTrain = PhaseTrain()

    def changes(self) -> dict[str, dict[str, Any]]:
        """Section -> key -> the value that replaces that of the top level."""
        return self.model_dump(include={"data", "train"}, exclude_none=True)


# Every setting that a phase may have for itself.
KEYS = (
    *(f"data.{name}" for name in PhaseData.model_fields),
    *(f"train.{name}" for name in PhaseTrain.model_fields),
)


def check_order(phases: Sequence[Phase], steps: int) -> None:
    """ValueError unless each phase but the last ends after the one before it and before `steps`."""
    begin = 0
    for number, phase in enumerate(phases[:-1]):
        key = f"phases.{number}.until"
        if phase.until is None:
            raise ValueError(f"missing key {key}; only the last phase goes on until train.steps")
        if phase.until <= begin:
            raise ValueError(f"{key} {phase.until} is not after {begin}, where its phase begins")
        if phase.until >= steps:
            raise ValueError(
                f"{key} {phase.until} leaves no step of train.steps {steps} for the phases after it"
            )
        begin = phase.until
    if phases and phases[-1].until is not None:
        raise ValueError(
            f"phases.{len(phases) - 1}.until: the last phase ends at train.steps; remove the key"
        )


class Part(NamedTuple):
    """The steps begin .. end - 1 (from 0) of a run, which have the same settings.

    `first_batch`: the batch of its sample stream on which the first of them is trained. `order`:
    parts with the same number have the same stream but for its masks.
    """

    number: int
    begin: int
    end: int
    settings: dict[str, Any]  # by KEYS
    first_batch: int
    order: int

    def batch(self, step: int) -> int:
        """The batch of the part's sample stream on which `step` (from 0) is trained."""
        return self.first_batch + step - self.begin


def parts(config: Mapping[str, Any]) -> list[Part]:
    """The parts of the run with this config, as a checked RunConfig's model_dump gives it.

    A part goes on where the last one with the same samples in the same order has stopped, with the
    next whole batch of its own size. Where there is none it begins at the start of an order.
    """
    found: list[Part] = []
    position: dict[tuple[Any, ...], int] = {}
    orders: dict[tuple[Any, ...], int] = {}
    steps = config["train"].get("steps", 0)
    begin = 0
    for number, phase in enumerate(config.get("phases") or [{}]):
        settings = {key: _value(config, phase, key) for key in KEYS}
        size = settings["train.global_batch_size"]
        same = (
            settings["data.seq_length"],
            settings["data.samples"],
            num_lanes(size),
            # In their order, by which each corpus has its key.
            tuple((settings["data.mixture"] or {}).items()),
        )
        order = orders.setdefault(same, len(orders))
        end = phase.get("until") or steps
        part = Part(number, begin, end, settings, -(-position.get(same, 0) // size), order)
        position[same] = part.batch(end) * size
        found.append(part)
        begin = end
    return found


def _value(config: Mapping[str, Any], phase: Mapping[str, Any], key: str) -> Any:
    section, name = key.split(".")
    own = (phase.get(section) or {}).get(name)
    return (config.get(section) or {}).get(name) if own is None else own


def at(found: Sequence[Part], step: int) -> Part:
    """The part that has `step` (from 0); the last one where the run is over."""
    return next((part for part in found if step < part.end), found[-1])


def before(found: Sequence[Part], step: int) -> Iterator[tuple[Part, int]]:
    """The parts that have begun when `step` updates have been made, with their steps up to then."""
    for part in found:
        if part.begin < step:
            # A run that was extended after its end has no later part.
            yield part, (step if part is found[-1] else min(step, part.end)) - part.begin


def num_samples(config: Mapping[str, Any], step: int) -> int:
    """Sequences on which a run with this config has been trained after `step` updates."""
    done = before(parts(config), step)
    return sum(number * part.settings["train.global_batch_size"] for part, number in done)


def shown(config: Mapping[str, Any], key: str) -> str:
    """The values that a setting has in a run, in order: `128`, or `128, then 512`."""
    values = [str(part.settings[key]) for part in parts(config)]
    return ", then ".join(v for i, v in enumerate(values) if i == 0 or v != values[i - 1])
