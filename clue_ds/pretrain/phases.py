"""The phases of a run: what each trains on, and the change from one to the next.

Guarantees: everything that can be wrong with any phase is an error at the start of the run; the
batch of a step is a function of the config and the step, so a run resumes at any step, also at the
first one of a phase; the optimizer's state and the learning-rate schedule go on.

A phase trains on the stream of its settings. One with the seq_length, samples, mixture and number
of lanes (settings/phases.py) of an earlier phase goes on in the order of that one, so a token is
still seen once an epoch; what the earlier phase left of a batch of the new size is left out. A
phase without such a predecessor has an order of its own from its start, under a seed of its own: no
sample comes twice with the same masks.

Rejected: going on in each corpus where a phase with another mixture stopped (lanes stop at
different places of a cycle, order.py, so up to 1000 samples of each lane would be left out, which
is more than a small run has); phases together with train.on_spike rollback (the batches to skip
would be counted in two streams), and with checkpoint.keep_best (held-out losses of two lengths or
mask rates can't be compared).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clue_ds import dist
from clue_ds.config import RunConfig
from clue_ds.data import Corpus, SampleStream
from clue_ds.data.counter_rng import derive
from clue_ds.data.flat import FlatStream
from clue_ds.data.stream.labelled_pairs import LabelledPairs
from clue_ds.data.stream.loader import Skip, batch_number
from clue_ds.data.stream.mixture import Mixture, corpora_of, names_of
from clue_ds.errors import UserError
from clue_ds.presets import ModelConfig
from clue_ds.pretrain import batches, ds_json
from clue_ds.pretrain.engine import Engine
from clue_ds.pretrain.evaluate import Evaluator
from clue_ds.settings.phases import Part, parts

_FIRST_SEED = 1 << 32  # counters below belong to a stream's own keys


@dataclass(frozen=True)
class RunPhase:
    """One phase of a run. `config`: the settings that hold in it. `of`: the number of phases.

    A run without phases has one.
    """

    part: Part
    of: int
    config: RunConfig
    stream: SampleStream
    evaluator: Evaluator | None

    def batch_number(self, step: int, skips: Sequence[Skip] = ()) -> int:
        """The batch of `stream` on which `step` (from 0) is trained; skips: in one phase only."""
        return self.part.batch(batch_number(step, skips))

    @property
    def name(self) -> str:
        """What its samples are of, for messages."""
        return f"the stream of phase {self.part.number + 1}" if self.of > 1 else "the run"

    def figures(self) -> dict[str, int]:
        """The log entry `phase`, from 1; none in a run without phases."""
        return {"phase": self.part.number + 1} if self.of > 1 else {}

    def describe(self) -> list[str]:
        """A note for the user: which phase it is, its steps, and what it has for itself."""
        if self.of == 1:
            return []
        settings = self.part.settings.items()
        # Without a mixture nobody asks for its shares.
        values = ", ".join(f"{key} {value}" for key, value in settings if value != {})
        return [
            f"phase {self.part.number + 1} of {self.of}, steps {self.part.begin + 1:,} to "
            f"{self.part.end:,}: {values}"
        ]


def check(config: RunConfig, model: ModelConfig, ds_values: dict[str, Any]) -> None:
    """UserError for lengths and batch sizes that don't fit, in any phase."""
    found = parts(config.model_dump())
    for part in found:
        where = "" if len(found) == 1 else f"phases.{part.number}: "
        own = config.in_phase(part.number)
        if own.data.seq_length > model.max_position_embeddings:
            raise UserError(
                f"{where}data.seq_length {own.data.seq_length} exceeds the model's positions; set "
                f"it to {model.max_position_embeddings} or less, or raise "
                "model.max_position_embeddings"
            )
        try:
            # Raises when batch sizes don't divide, or numbers in the JSON disagree with the config.
            ds_json.fill(ds_values, config.deepspeed, own.train, dist.world_size())
        except UserError as refusal:
            raise UserError(f"{where}{refusal}") from None
    if config.train.objective == "pair" and any(phase.data.mixture for phase in config.phases):
        raise UserError(
            "phases can't have a data.mixture with train.objective pair, which reads data.pairs; "
            "remove it"
        )
    if len(found) == 1:
        return
    if config.train.on_spike == "rollback":
        raise UserError(
            "train.on_spike rollback can't be used with phases, because the batches to skip may "
            "belong to two of them; set train.on_spike to stop or warn"
        )
    if config.checkpoint.keep_best:
        raise UserError(
            "checkpoint.keep_best can't be used with phases, because the held-out losses of two "
            "phases can't be compared; remove it, and use checkpoint.keep_every"
        )


def check_skips(phases: Sequence[RunPhase], skips: Sequence[Skip]) -> None:
    """UserError for a run that was given phases after a rollback."""
    if len(phases) > 1 and skips:
        raise UserError(
            "this run has skipped batches in a rollback, so it can't go on in phases; remove "
            "phases, or start a new run_dir from its weights (model.init)"
        )


def seed_of_order(seed: int, order: int) -> int:
    """The seed of the stream of phases with this Part.order."""
    if order == 0:
        return seed
    return int(derive(np.uint64(seed % (1 << 64)), np.uint64(_FIRST_SEED + order)))


def open_phases(config: RunConfig, corpus: Corpus | Mixture | LabelledPairs) -> list[RunPhase]:
    """All phases of a run, with their streams and evaluators.

    `corpus`: what phases without a mixture of their own train on.
    """
    found = []
    all_parts = parts(config.model_dump())
    opened = {_mixture(config): corpus}
    for part in all_parts:
        own = config.in_phase(part.number)
        if _mixture(own) not in opened:
            opened[_mixture(own)] = batches.open_data(own)
        its_own = opened[_mixture(own)]
        stream = batches.make_stream(own, its_own, seed_of_order(config.seed, part.order))
        evaluator = batches.make_evaluator(own, its_own)
        found.append(RunPhase(part, len(all_parts), own, stream, evaluator))
    return found


def _mixture(config: RunConfig) -> tuple[tuple[str, float], ...]:
    return tuple(config.data.mixture.items())


def fingerprints(phases: Sequence[RunPhase]) -> tuple[tuple[int, str], ...]:
    """(begin, fingerprint) of each corpus or mixture that the run reads, in order.

    `begin`: how many steps have been made on others.
    """
    found: list[tuple[int, str]] = []
    for phase in phases:
        fingerprint = phase.stream.corpus.fingerprint
        if not found or found[-1][1] != fingerprint:
            found.append((phase.part.begin, fingerprint))
    return tuple(found)


def with_settings(phases: Sequence[RunPhase], config: RunConfig) -> list[RunPhase]:
    """The phases with the settings of `config`, which differs in how steps are computed only."""
    own = parts(config.model_dump())
    changed = [
        dataclasses.replace(phase, part=part, config=config.in_phase(part.number))
        for phase, part in zip(phases, own, strict=True)
    ]
    for phase in changed:
        streams = [phase.stream] + ([phase.evaluator.stream] if phase.evaluator else [])
        for stream in streams:
            if isinstance(stream, FlatStream):
                stream.micro_batch_size = phase.config.train.micro_batch()
                stream.is_static = batches.is_static(phase.config)
    return changed


def at(phases: Sequence[RunPhase], step: int) -> RunPhase:
    """The phase that has `step` (from 0); the last one where the run is over."""
    return next((phase for phase in phases if step < phase.part.end), phases[-1])


def mixture_samples(phases: Sequence[RunPhase], step: int, skips: Sequence[Skip]) -> dict[str, int]:
    """Log entries: samples of each corpus of a mixture that were trained on in `step` steps; none
    without a mixture."""
    directories = [_directories(phase) for phase in phases]
    places = {place: 0 for of_phase in directories for place in of_phase}
    if len(places) < 2:
        return {}
    begin = 0
    ends = {phase.part.end for phase in phases[:-1]} | {skip.step for skip in skips}
    for end in sorted({end for end in ends if end < step} | {step}):
        phase = at(phases, begin)
        first = phase.batch_number(begin, skips)
        before = phase.stream.samples_by_part(first)
        after = phase.stream.samples_by_part(first + end - begin)
        for place, b, a in zip(directories[phase.part.number], before, after, strict=True):
            places[place] += a - b
        begin = end
    names = (f"samples_of/{name}" for name in names_of(places))
    return dict(zip(names, places.values(), strict=True))


def _directories(phase: RunPhase) -> list[str]:
    """Where the corpora of a phase are; none for labelled pairs."""
    corpus = phase.stream.corpus
    if isinstance(corpus, LabelledPairs):
        return []
    return [str(one.directory) for one in corpora_of(corpus)]


def describe(engine: Engine, phase: RunPhase) -> list[str]:
    """Notes for the user on how `phase` is trained."""
    train, length, stream = phase.config.train, phase.config.data.seq_length, phase.stream
    order = "lanes" if stream.uses_lanes else "shuffle"
    log = phase.config.log
    graphs = ", CUDA graphs" if engine.uses_graphs else ""
    return [
        f"{engine.num_parameters:,} parameters in {train.precision}, ZeRO stage "
        f"{engine.stage}{graphs}, {dist.world_size()} ranks x {engine.gradient_accumulation_steps} "
        f"micro-batches x {train.micro_batch()} sequences of {length}; "
        f"{stream.corpus.num_tokens:,} tokens = {stream.num_samples:,} samples, "
        f"{stream.steps_per_epoch:,} steps per epoch; order {order}",
        f"one step is {train.global_batch_size:,} sequences of up to {length} tokens, at most "
        f"{train.global_batch_size * length:,}; the run has {train.steps:,}. There is a log line "
        f"after the first step, which shows how long the others will take, then every {log.every} "
        f"steps and at least every {log.seconds:g} s",
        *phase.describe(),
    ]
