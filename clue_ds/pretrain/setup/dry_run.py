"""`clue-ds pretrain --dry-run`: everything before the first step, without writing anything.

The ranks meet and are compared, the checkpoint to continue from is found, and every `auto` gets its
value on these devices: kernels are compared with torch, and sizes of micro-batches are tried.
"""

from __future__ import annotations

from clue_ds import dist
from clue_ds.config import RunConfig
from clue_ds.job import preflight, watchdog
from clue_ds.pretrain import auto, ds_json, phases, resume, setup
from clue_ds.pretrain.engine import start


def run(config: RunConfig) -> None:
    """Print, on rank 0, what the run would do; every rank must call it."""
    checked = setup.prepare(config)
    watch = watchdog.start(config.health, "clue-ds pretrain --dry-run", can_stop=False)
    device = start()
    notes = [
        preflight.check(
            watch, config, checked.identity.corpus_fingerprint(config.train.steps), device
        )
    ]
    choice = resume.choose(checked.identity, sets_aside=False)
    streams = [phase.stream for phase in checked.phases]
    identity, notes_on_auto = auto.resolve(checked.identity, choice, device, streams)
    notes += [*notes_on_auto, *checked.notes]
    stage = ds_json.zero_stage(checked.ds_values)
    for phase in phases.with_settings(checked.phases, identity.config):
        train = phase.config.train
        notes += phase.describe()
        notes.append(
            f"each step is {train.global_batch_size:,} sequences of {phase.config.data.seq_length} "
            f"= {dist.world_size()} ranks x {train.gradient_accumulation_steps(dist.world_size())} "
            f"micro-batches x {train.micro_batch():,}, in {train.precision} at ZeRO stage {stage}"
        )
    if choice is not None:
        notes += resume.describe(choice)
    watch.close()
    if dist.rank() == 0:
        print("\n".join([*notes, "dry run: nothing was trained or written"]), flush=True)
