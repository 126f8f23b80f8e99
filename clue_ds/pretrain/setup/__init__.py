"""What one rank can check of a run before it meets the others: settings, corpus, batch sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clue_ds.checkpoint import retention
from clue_ds.config import RunConfig
from clue_ds.data import Corpus
from clue_ds.data.stream.labelled_pairs import LabelledPairs
from clue_ds.data.stream.mixture import Mixture
from clue_ds.errors import UserError
from clue_ds.metrics import trackers
from clue_ds.model import ops
from clue_ds.presets import ModelConfig
from clue_ds.pretrain import auto, batches, ds_json, phases, start_weights
from clue_ds.pretrain.anomalies import spikes
from clue_ds.pretrain.phases import RunPhase
from clue_ds.pretrain.resume import RunIdentity


@dataclass(frozen=True)
class Checked:
    """A run whose settings fit each other and its corpus. `notes`: for the user."""

    identity: RunIdentity
    corpus: Corpus | Mixture | LabelledPairs
    ds_values: dict[str, Any]
    phases: list[RunPhase]
    notes: list[str]


def prepare(config: RunConfig) -> Checked:
    """Open the corpus and check everything that needs no other rank; UserError for a mistake."""
    corpus = batches.open_data(config)
    config, notes = start_weights.adopt_activation(config)
    model_config = config.model.resolve(corpus.vocab_size)
    ds_values = ds_json.read(config.deepspeed)
    check(config, model_config, ds_values)
    all_phases = phases.open_phases(config, corpus)
    retention.check(config, has_held_out=all_phases[0].evaluator is not None)
    spikes.check_retention(config)
    identity = RunIdentity(
        config=config,
        model=model_config,
        vocab_file=corpus.vocab_file,
        vocab_sha256=corpus.vocab_sha256,
        lower_case=corpus.lower_case,
        corpora=phases.fingerprints(all_phases),
    )
    return Checked(identity, corpus, ds_values, all_phases, notes)


def check(config: RunConfig, model: ModelConfig, ds_values: dict[str, Any]) -> None:
    """A UserError for settings that don't fit each other or this machine; needs no other rank."""
    phases.check(auto.on_this_machine(config), model, ds_values)
    ops.choose_kernels(config.model.kernels)
    ds_json.check_compile(config, ds_values)
    trackers.check_installed(config.log.trackers)
    if Path(config.run_dir).is_file():
        raise UserError(f"run_dir {config.run_dir} is a file; give a directory")
