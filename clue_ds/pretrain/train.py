"""`clue-ds pretrain`: parse, build, run, close.

Guarantees: without dropout the losses depend on the global batch, not on how it is split over ranks
and micro-batches (with dropout every rank draws its own masks); the same command on the same run
directory continues from its newest intact checkpoint, or reports why it can't.

Works under the deepspeed launcher, torchrun and mpirun, and without any of them:

    clue-ds launch --local 2 -- pretrain --config run.yaml
    clue-ds pretrain --config run.yaml --train.steps 100
    clue-ds pretrain --config run.yaml --dry-run
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from clue_ds import command_line, dist
from clue_ds import config as run_config
from clue_ds.checkpoint import manifest as manifests
from clue_ds.checkpoint import room
from clue_ds.config import RunConfig
from clue_ds.data import Corpus, Loader, SampleStream
from clue_ds.data.stream.labelled_pairs import LabelledPairs
from clue_ds.data.stream.loader import Skip
from clue_ds.data.stream.mixture import Mixture
from clue_ds.errors import UserError, run_module
from clue_ds.job import preflight, run_lock, stop, watchdog
from clue_ds.job.slow_rank import SlowRanks
from clue_ds.metrics import Meter, Pulse
from clue_ds.metrics.trace import Trace
from clue_ds.model.bert import BertForPreTraining, pad_vocab
from clue_ds.model.init import initialize
from clue_ds.pretrain import (
    auto,
    batches,
    optim,
    phases,
    resume,
    saving,
    schedule,
    setup,
    start_weights,
)
from clue_ds.pretrain.anomalies import spikes
from clue_ds.pretrain.anomalies.nonfinite import NonFiniteSteps
from clue_ds.pretrain.anomalies.spikes import Spikes
from clue_ds.pretrain.engine import Engine, LossScaleExhausted, dropout_seed, start
from clue_ds.pretrain.phases import RunPhase
from clue_ds.pretrain.setup import dry_run
from clue_ds.pretrain.writers import Writers
from clue_ds.settings import program
from clue_ds.settings.phases import num_samples


@dataclass
class Run:
    """Everything that the loop needs. `start_step`: updates made before this process started."""

    config: RunConfig
    identity: resume.RunIdentity
    engine: Engine
    phases: list[RunPhase]
    phase: RunPhase
    loader: Loader
    meter: Meter
    writers: Writers
    start_step: int
    watch: watchdog.Watchdog
    non_finite: NonFiniteSteps
    spikes: Spikes
    slow_ranks: SlowRanks
    saver: saving.Saver
    trace: Trace

    @property
    def stream(self) -> SampleStream:
        """The sample stream of the phase."""
        return self.phase.stream

    def batch_number(self, step: int) -> int:
        """The batch of the sample stream that step `step` (from 0) is trained on."""
        return self.phase.batch_number(step, self.spikes.skips)


def main(argv: list[str]) -> None:
    """Pretrain an encoder on a corpus (`clue-ds pretrain --help` lists every setting)."""
    with watchdog.reporting(), dist.report_errors_once():
        words = [word for word in argv if word not in ("--dry-run", "--dry_run")]
        config = parse(words)
        if words != argv:
            dry_run.run(config)
            dist.report_end(stopped=False)
            return
        run = build(config)
        with run.writers, run.saver:
            done = train(run)
        close(run, stopped_at=done if done < config.train.steps else None)


def train(run: Run) -> int:
    """The loop: one iteration is one update of the weights from one global batch.

    Returns the number of updates made: all, unless the run was asked to save and stop.
    """
    config, engine, meter = run.config, run.engine, run.meter
    pulse = Pulse(config.log.seconds, lambda: run.watch.stop.seconds)
    engine.module.train()
    step = run.start_step
    while step < config.train.steps:
        if step == run.phase.part.end:
            begin_phase(run, step)
        run.trace.begin(step + 1)
        with meter.waiting(), run.slow_ranks.waiting():
            batch = next(run.loader)
        meter.add_batch(batch)

        micro_batches = engine.micro_batches(batch)
        for micro_batch in micro_batches:
            with run.slow_ranks.forward():
                output = engine.forward(**micro_batch)
            engine.backward(output.loss)
            share = 1 / engine.gradient_accumulation_steps
            meter.add_micro_batch(output.loss, output.num_correct, share, output.pair_sums)
            run.watch.mark()

        lr = schedule.learning_rate(config.train, step)
        done = step + 1
        look_at_update(run, ago=1)  # of the step before, whose answer is there by now
        try:
            grad_norm = engine.step(lr)
        except LossScaleExhausted:
            raise run.non_finite.exhausted(done, run.batch_number(step), micro_batches) from None
        run.non_finite.remember(done, run.batch_number(step), micro_batches)
        if (note := run.slow_ranks.step(done)) is not None:
            run.writers.note(note)

        stops, is_done = run.watch.step(done), done == config.train.steps
        if run.trace.ends(done, is_last=stops or is_done):
            with meter.paused(), run.watch.section("profile"):
                run.writers.note(run.trace.write(done))
        saves = stops or is_done or done % config.checkpoint.every == 0
        # A request to stop leaves time to save, but not to evaluate.
        evaluates = is_done or (done % config.evaluate.every == 0 and not stops)
        # Log before saving: a loss that is inf or nan ends the run here, and is not saved.
        is_regular = saves or evaluates or done % config.log.every == 0
        is_regular |= done == run.phase.part.end  # a line never covers steps of two phases
        if pulse.is_due(is_regular):
            look_at_update(run, ago=0)
            line = meter.flush(done, grad_norm, is_regular)
            # Other lines come when time has passed, which must not change what is trained.
            if is_regular and (back := look_for_spike(run)) is not None:
                step = roll_back(run, back)
                continue
            samples = num_samples(config.model_dump(), done)
            skipped = engine.skipped_steps
            if evaluates and run.phase.evaluator is not None:
                with meter.paused(), run.watch.section("evaluate"):
                    line |= run.phase.evaluator(engine)
            by_corpus = phases.mixture_samples(run.phases, done, run.spikes.skips)
            counts = {"samples": samples, **by_corpus, "skipped_steps": skipped}
            counts |= run.phase.figures()
            counts |= {"skipped_batches": run.spikes.num_skipped}
            figures = run.slow_ranks.figures() | run.saver.figures()
            run.writers.write({**line, "lr": lr, **counts, **figures})
        if saves:
            with meter.paused(), run.watch.section("save"):
                texts = {spikes.FILE: run.spikes.state()}
                run.saver.save(done, line.get("held_out_loss"), texts)
                if stops or is_done:
                    run.saver.wait()
        if stops or is_done:
            return done
        step = done
    return step


def look_at_update(run: Run, ago: int) -> None:
    """Tell the user if the last update was skipped, which was `ago` steps before the last passes.

    Nothing happens if that was looked at before. UserError when the run must not go on.
    """
    note = run.non_finite.note()
    if note is not None:
        run.meter.leave_out_step(ago)
        run.writers.note(note)


def begin_phase(run: Run, step: int) -> None:
    """Go on with the stream, the evaluator and the batch sizes of the phase that begins here."""
    run.phase = phases.at(run.phases, step)
    run.watch.begin_phase()
    run.loader.close()
    number = run.batch_number(step)
    run.loader = Loader(run.stream, dist.rank(), dist.world_size(), number, run.engine.device)
    run.engine.change_batch(run.phase.config.train)
    run.non_finite.begin(run.phase.config.train, run.phase.name)
    run.spikes.begin(run.phase.part)
    for note in phases.describe(run.engine, run.phase):
        run.writers.note(note)


def look_for_spike(run: Run) -> Skip | None:
    """What a rollback is to skip, if the losses of the last log line ask for one."""
    spike = run.spikes.look(run.meter.step_losses)
    if spike is None:
        return None
    skip = run.spikes.decide(spike)
    note = run.spikes.warning(spike) if skip is None else run.spikes.past(spike, skip)
    if note is not None:
        run.writers.note(note)
    return skip


def roll_back(run: Run, skip: Skip) -> int:
    """Load a checkpoint from before `skip`, and go on from there without its batches.

    Returns the number of updates that were made up to that checkpoint.
    """
    config, engine = run.config, run.engine
    run.watch.begin(config.health)
    run.saver.wait()
    choice = spikes.go_back(config.run_dir, skip)
    step = choice.manifest.step
    saving.load(engine, choice)
    run.spikes = Spikes(config, spikes.read(choice), (*run.spikes.skips, skip))
    run.loader.close()
    skips, device = run.spikes.skips, engine.device
    run.loader = Loader(run.stream, dist.rank(), dist.world_size(), step, device, skips)
    run.meter.restart()
    # The lines of the steps that are trained again are removed, as when a run resumes.
    run.writers.go_back(step)
    run.writers.note(f"resuming after step {step} from {choice.directory}")
    return step


def parse(argv: list[str], prog: str = "clue-ds pretrain") -> RunConfig:
    """The run's config; `--local_rank N`, which some launchers append, is accepted and ignored."""
    launcher = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    launcher.add_argument("--local_rank", "--local-rank", type=int)
    _, ours = launcher.parse_known_args(argv)
    if dist.rank() == 0:
        return command_line.parse(ours, prog)
    # tyro prints help and errors itself; only rank 0 is to do so.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return command_line.parse(ours, prog)


def build(config: RunConfig) -> Run:
    """Check that corpus, model and batch sizes fit, then start ranks, model and data."""
    # What one rank can check alone.
    checked = setup.prepare(config)
    identity, corpus, ds_values = checked.identity, checked.corpus, checked.ds_values
    config, all_phases = identity.config, checked.phases
    # The ranks connect and compare themselves.
    watch = watchdog.start(config.health)
    device = start()
    fingerprint = identity.corpus_fingerprint(config.train.steps)
    notes = [preflight.check(watch, config, fingerprint, device)]
    # The run starts, or continues from its newest intact checkpoint.
    watch.claim(config.run_dir)
    choice = resume.choose(identity)
    streams = [phase.stream for phase in all_phases]
    identity, notes_on_auto = auto.resolve(identity, choice, device, streams)
    config = identity.config
    start_step = 0 if choice is None else choice.manifest.step
    stop.check_progress(config.run_dir, start_step)
    model, notes_on_model = build_model(identity, choice, corpus)
    all_phases = phases.with_settings(all_phases, config)
    phase = phases.at(all_phases, start_step)
    engine = Engine(model, phase.config.train, ds_values, config.deepspeed, device)
    notes += phases.describe(engine, phase)
    notes += [*notes_on_auto, *checked.notes, *notes_on_model]
    notes += prepare_run_dir(config, engine)
    compiles, tensorboard = config.model.compile is True, config.log.tensorboard
    writers = Writers(config.run_dir, config.train.steps, start_step, tensorboard, compiles)
    if choice is not None:
        notes += resume.describe(choice) + resume.extension(choice, config)
        notes += resume.environment(
            choice.manifest, uses_cpu=device.type == "cpu" or engine.offload
        )
    for note in notes:
        writers.note(note)
    writers.event("start", start_step, machine=notes[0], versions=preflight.versions())
    torch.manual_seed(dropout_seed(config.seed, start_step))
    if choice is not None:
        for note in saving.load(engine, choice):
            writers.note(note)
    seen = Spikes(config, spikes.read(choice))
    phases.check_skips(all_phases, seen.skips)
    seen.resume(phase.part, start_step)
    rank, world_size, first = dist.rank(), dist.world_size(), phase.part.batch(start_step)
    loader = Loader(phase.stream, rank, world_size, first, device, seen.skips)
    meter = Meter(identity.model, device)
    writers.open_trackers(config)
    return Run(
        config,
        identity,
        engine,
        all_phases,
        phase,
        loader,
        meter,
        writers,
        start_step,
        watch,
        NonFiniteSteps(phase.config.train, engine, phase.name),
        seen,
        SlowRanks(watch.hosts, device, waits_in_forward=engine.stage == 3),
        saving.Saver(engine, identity, writers, watch.stop.ask),
        Trace(config.train.profile, config.run_dir),
    )


def build_model(
    identity: resume.RunIdentity,
    choice: resume.Choice | None,
    corpus: Corpus | Mixture | LabelledPairs,
) -> tuple[BertForPreTraining, list[str]]:
    """The model on the CPU in fp32 with padded vocabulary rows, and notes for the user.

    Its weights are fresh or from `model.init`; a run that resumes loads its weights later.
    """
    section = identity.config.model
    rows = pad_vocab(identity.model).vocab_size
    model = batches.make_model(identity, corpus, padded_vocab_size=rows)
    notes = batches.describe(identity.config, corpus)
    if choice is None:
        initialize(model, identity.config.seed)
        if section.init is not None:
            notes += start_weights.load(
                model, section.init, identity.vocab_file, identity.lower_case
            )
    optim.freeze_unused(model, identity.config.train.objective)
    if section.compile is True:  # pretrain/auto has replaced "auto"
        model.compile_blocks()
    return model, notes


def prepare_run_dir(config: RunConfig, engine: Engine) -> list[str]:
    """Write config.yaml and make the folder of checkpoints; returns notes for the user.

    UserError on every rank when a checkpoint would not fit on the disk.
    """
    error, notes = None, []
    if dist.rank() == 0:
        run_dir = Path(config.run_dir)
        try:
            notes = room.prepare_folder(run_dir / manifests.FOLDER, saving.checkpoint_bytes(engine))
            run_config.save(config, run_dir / "config.yaml")
        except UserError as refusal:
            error = str(refusal)
        except OSError as failure:
            error = f"can't write {run_dir / 'config.yaml'}: {failure}; set another run_dir"
    dist.agree(error)
    return notes


def report_end(run: Run, step: int) -> None:
    """Say what comes next, and note the end in the run's history."""
    is_done = step >= run.config.train.steps
    if is_done:
        export = program.command("export", run.config.run_dir, "--to", "hf")
        run.writers.note(f"done: {run.config.run_dir}; next: {export}")
        run.writers.attach_card(run.identity.model)
    else:
        run.writers.note(
            f"stopped on request after step {step}; the same command continues the run"
        )
    run.writers.event("done" if is_done else "stopped on request", step)


def close(run: Run, stopped_at: int | None = None) -> None:
    """End threads, files and process group, and report the end of the run to the launcher."""
    run.loader.close()
    report_end(run, run.config.train.steps if stopped_at is None else stopped_at)
    run.writers.close()
    run.engine.close()
    run.watch.close()
    run_lock.withdraw(run.config.run_dir)
    dist.report_end(stopped_at is not None)


if __name__ == "__main__":
    sys.exit(run_module("clue-ds pretrain", main))
