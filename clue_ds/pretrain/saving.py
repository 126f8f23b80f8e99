"""Saving and loading a run: our checkpoint contains DeepSpeed's.

A save has two parts. In the first one training waits: every rank captures what belongs into its
files, with copies of the tensors in host memory (checkpoint/snapshot.py). In the second one a
thread of each rank writes, syncs and hashes its files while training goes on; when all ranks have
done so, rank 0 checks its run lock, writes the manifest, renames the directory, and deletes old
checkpoints. With `checkpoint.async_save: false` nothing is copied, and training waits for both.

Guarantees: a published checkpoint is complete (checkpoint/manifest.py); saving either publishes a
new one or leaves the earlier ones unchanged, whichever part is interrupted; its content does not
depend on `async_save`. At most one save is in flight: the next one, a stop and the end of the run
wait for it. What prevents a save in the background ends the run on all ranks with the message that
it would have in the foreground, within about a second. Resuming with the same number of ranks,
versions and threads continues bit for bit, including dropout; any other number of ranks or ZeRO
stage continues with the same weights and moments (checkpoint/regroup.py). Our own files are JSON,
YAML and safetensors.

Rejected: DeepSpeed's `latest`, which is written before the last barrier, and not atomically; a
process per rank instead of a thread (writing, hashing and syncing all release Python's lock).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from clue_ds import config as run_config
from clue_ds import dist, files
from clue_ds.checkpoint import manifest as manifests
from clue_ds.checkpoint import pickles, retention, room
from clue_ds.checkpoint.manifest import FROZEN, TAG, Choice, FileRecord, Manifest
from clue_ds.checkpoint.snapshot import PendingFile
from clue_ds.data.stream.samples import STREAM_VERSION
from clue_ds.errors import UserError, first_line
from clue_ds.job import diagnosis, preflight, run_lock, watchdog
from clue_ds.job.agreement import Agreement
from clue_ds.pretrain import resume
from clue_ds.pretrain.engine import Engine, dropout_seed
from clue_ds.pretrain.resume import RunIdentity
from clue_ds.pretrain.writers import Writers
from clue_ds.settings import phases

SECONDS_BEFORE_A_NOTE = 1.0
SECONDS_BETWEEN_SIGNALS = 0.5  # Python handles a signal when a wait of the main thread ends

# ---------------------------------------------------------------------------------------- saving


class Saved(NamedTuple):
    """The newest checkpoint that this process has published.

    `taken_at`: time.monotonic() of its state. `seconds`: from there until it was published, of
    which training waited for `waited`.
    """

    step: int
    num_bytes: int
    taken_at: float
    seconds: float
    waited: float


@dataclasses.dataclass(frozen=True)
class _Capture:
    """All that this rank's thread needs to write its part of a checkpoint."""

    final: Path
    described: Manifest
    pending: list[PendingFile]
    random_state: dict[str, Tensor]
    texts: dict[str, str]
    num_bytes: int
    taken_at: float

    @property
    def staging(self) -> Path:
        return self.final.with_name(self.final.name + ".tmp")


class Saver:
    """Saves one run. Every rank has one and calls its methods after the same steps.

    As a context it waits at the end for the save in flight, so that a run that ends with an error
    leaves its newest checkpoint complete. `writers` get a sentence and an event for each
    checkpoint; `ask_to_stop` makes the loop call `save` soon, which raises what went wrong in the
    background.
    """

    def __init__(
        self,
        engine: Engine,
        identity: RunIdentity,
        writers: Writers | None = None,
        ask_to_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._identity = engine, identity
        self.writers, self._ask_to_stop = writers, ask_to_stop
        self._agreement = Agreement()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._waited, self._num_bytes = 0.0, 0
        self._newest: Saved | None = None

    def save(
        self,
        step: int,
        held_out_loss: float | None = None,
        texts: dict[str, str] | None = None,
    ) -> None:
        """Save the state after `step` updates; returns when the run may change it again.

        `texts`: further small files of the checkpoint, name -> content.
        UserError on every rank when this save or the one before it can't be written.
        """
        began = time.monotonic()
        if self._thread is not None:
            self._thread.join(SECONDS_BEFORE_A_NOTE)
            if self._thread.is_alive():
                self._note(
                    "training waits, because the checkpoint before is still being written; if "
                    "this happens often, raise checkpoint.every or use a faster disk"
                )
        self.wait()
        capture = self._capture(step, held_out_loss, texts or {})
        if not self._identity.config.checkpoint.async_save:
            self._write(capture)
            self._raise()
            return
        self._thread = threading.Thread(
            target=self._write, args=(capture,), name="clue-ds-save", daemon=True
        )
        self._waited = time.monotonic() - began
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written; UserError on every rank if it can't be written."""
        thread = self._thread
        if thread is not None:
            with watchdog.current().waiting_for(thread):
                while thread.is_alive():
                    thread.join(SECONDS_BETWEEN_SIGNALS)
        self._thread = None
        self._raise()

    def _raise(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            self.wait()
        # Where a rank is gone, its files will never come.
        elif self._thread is not None and not diagnosis.is_failed_collective(error):
            with watchdog.current().section("save"):
                try:
                    self.wait()
                except Exception as second:  # the run ends with the first error
                    self._note(f"warning: {first_line(second)}")

    def figures(self) -> dict[str, float]:
        """Log entries about the newest checkpoint of this process; none before the first.

        The age is that of the state in it: what would be lost now.
        """
        newest = self._newest
        if newest is None:
            return {}
        return {
            "checkpoint_step": newest.step,
            "checkpoint_age_s": time.monotonic() - newest.taken_at,
            "checkpoint_gib": newest.num_bytes / 2**30,
            "checkpoint_save_s": newest.seconds,
            "checkpoint_wait_s": newest.waited,
        }

    def _note(self, text: str) -> None:
        if self.writers is not None:
            self.writers.note(text)
        elif dist.rank() == 0:
            print(text, flush=True)

    # ------------------------------------------------------------ first part: training waits

    def _capture(self, step: int, held_out_loss: float | None, texts: dict[str, str]) -> _Capture:
        config, engine = self._identity.config, self._engine
        final = Path(config.run_dir) / manifests.FOLDER / manifests.name(step)
        capture = _Capture(
            final,
            _describe(engine, self._identity, step, held_out_loss),
            [],
            _random_state(),
            texts,
            checkpoint_bytes(engine),
            time.monotonic(),
        )
        error = None
        if dist.rank() == 0:
            error = run_lock.lost(config.run_dir)
            try:
                if error is None:
                    room.prepare(capture.staging, capture.num_bytes, "lower checkpoint.keep")
            except UserError as refusal:
                error = str(refusal)
        dist.agree(error)
        try:
            # DeepSpeed's ranks wait for each other in here, so a rank that fails must not wait for
            # them. On the disk it only makes directories, and copies two small scripts.
            with room.clear_write_errors(capture.staging, capture.num_bytes):
                capture.pending.extend(
                    engine.capture(capture.staging, TAG, copies=config.checkpoint.async_save)
                )
        except UserError:
            if dist.rank() == 0:
                shutil.rmtree(capture.staging, ignore_errors=True)
            raise
        return capture

    # ------------------------------------------------------ second part: the thread of a rank

    def _write(self, capture: _Capture) -> None:
        """Write this rank's part; rank 0 publishes when all ranks have written theirs."""
        part: dict[str, Any] = {"error": None, "is_bug": False, "files": {}}
        try:
            with room.clear_write_errors(capture.staging, capture.num_bytes):
                written = self._write_files(capture)
                records = manifests.record(capture.staging, written)
            part["files"] = {key: dataclasses.astuple(each) for key, each in records.items()}
        except UserError as error:
            part["error"] = str(error)
        except BaseException as error:
            self._failure = error
            part |= {"error": f"{type(error).__name__}: {first_line(error)}", "is_bug": True}
        try:
            refusal = self._agreement.decide(part, lambda parts: self._publish(capture, parts))
            if refusal is not None and self._failure is None:
                message, is_bug = refusal
                self._failure = RuntimeError(message) if is_bug else UserError(message)
        except BaseException as error:
            self._failure = self._failure or error
        if self._failure is not None:
            self._ask_to_stop()
        elif dist.rank() == 0:
            self._finish(capture)

    def _write_files(self, capture: _Capture) -> list[Path]:
        """Returns what this rank has written, beside the scripts that DeepSpeed copied."""
        staging, identity = capture.staging, self._identity
        for file in capture.pending:
            file.write()
        written = [file.path for file in capture.pending]
        written.append(staging / _random_file(dist.rank()))
        safetensors.torch.save_file(capture.random_state, written[-1])
        if dist.rank() == 0:
            run_config.save(identity.config, staging / "config.yaml")
            shutil.copyfile(identity.vocab_file, staging / "vocab.txt")
            tokenizer = json.dumps({"do_lower_case": identity.lower_case})
            (staging / "tokenizer_config.json").write_text(tokenizer + "\n", encoding="utf-8")
            safetensors.torch.save_file(self._engine.frozen, staging / FROZEN)
            for name, text in capture.texts.items():
                (staging / name).write_text(text, encoding="utf-8")
        return written

    def _publish(self, capture: _Capture, parts: list[dict[str, Any]]) -> tuple[str, bool] | None:
        """On rank 0, when all ranks are done: why nothing is published, and if that is a bug."""
        staging, is_ours = capture.staging, False
        message: str | None
        try:
            with room.clear_write_errors(staging, capture.num_bytes):
                # Another process may own the directory by now; then nothing in it is touched.
                message = run_lock.lost(self._identity.config.run_dir)
                is_ours = message is None
                if is_ours:
                    message = self._publish_files(capture, parts)
        except UserError as error:
            message = str(error)
        if message is None:
            return None
        if is_ours:
            shutil.rmtree(staging, ignore_errors=True)
        return message, any(part["is_bug"] for part in parts)

    def _publish_files(self, capture: _Capture, parts: list[dict[str, Any]]) -> str | None:
        records: dict[str, FileRecord] = {}
        for number, part in enumerate(parts):
            if part["error"] is not None:
                return part["error"] if number == 0 else f"rank {number}: {part['error']}"
            theirs = {key: FileRecord(*values) for key, values in part["files"].items()}
            if (missing := manifests.unseen(capture.staging, theirs)) is not None:
                return (
                    f"rank 0 does not see {capture.staging / missing} as rank {number} wrote it; "
                    "put run_dir on a disk that all machines of the run share"
                )
            records |= theirs
        complete = dataclasses.replace(capture.described, files=records)
        published = manifests.publish(capture.staging, capture.final, complete)
        self._num_bytes = sum(record.size for record in published.files.values())
        return None

    def _finish(self, capture: _Capture) -> None:
        """On rank 0, when the checkpoint is published: figures, and what goes for it."""
        config = self._identity.config
        num_bytes, step = self._num_bytes, capture.described.step
        seconds = time.monotonic() - capture.taken_at
        waited = self._waited if config.checkpoint.async_save else seconds
        self._newest = Saved(step, num_bytes, capture.taken_at, seconds, waited)
        self._note(
            f"saved {capture.final} ({files.size_text(num_bytes)} in {seconds:.1f} s; training "
            f"waited {waited:.1f} s)"
        )
        if self.writers is not None:
            self.writers.event("saved", step, seconds=seconds, waited=waited)
        section = config.checkpoint
        rule = retention.Rule(section.keep, section.keep_every, section.keep_best)
        for problem in retention.look_after(capture.final.parent, rule):
            self._note(f"warning: {problem}")


def checkpoint_bytes(engine: Engine) -> int:
    """About the size of a checkpoint, rather more than less."""
    # Weights, fp32 masters and two moments; everything else is small.
    return 16 * engine.num_parameters + (16 << 20)


def _describe(
    engine: Engine, identity: RunIdentity, step: int, held_out_loss: float | None
) -> Manifest:
    return Manifest(
        format=manifests.FORMAT,
        step=step,
        samples=phases.num_samples(identity.config.model_dump(), step),
        world_size=dist.world_size(),
        zero_stage=engine.stage,
        offload=engine.offload,
        precision=engine.precision,
        config=identity.config.model_dump(),
        model=dataclasses.asdict(identity.model),
        vocab_sha256=identity.vocab_sha256,
        corpus_fingerprint=identity.corpus_fingerprint(step),
        group_names=engine.group_names,
        versions=preflight.versions(),
        files={},
        stream_version=STREAM_VERSION,
        num_threads=torch.get_num_threads(),
        held_out_loss=held_out_loss,
    )


def _random_file(rank: int) -> str:
    return f"rng-rank{rank:05d}.safetensors"


def _random_state() -> dict[str, Tensor]:
    """State of the random generators that dropout uses on this rank."""
    states = {"cpu": torch.get_rng_state()}
    device = dist.device()
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


# -------------------------------------------------------------------------------------- resuming


def load(engine: Engine, choice: Choice) -> list[str]:
    """Load a checkpoint's weights, moments and generator states into a fresh engine.

    Returns a note for the user when the state was regrouped.
    """
    saved = choice.manifest
    num_bytes = engine.load(choice)
    if saved.world_size != dist.world_size():
        # Other ranks draw other dropout masks, but reproducible ones.
        torch.manual_seed(dropout_seed(int(saved.config["seed"]), saved.step))
    else:
        states = pickles.load_tensors(choice.directory / _random_file(dist.rank()))
        torch.set_rng_state(states["cpu"])
        device = dist.device()
        if device.type != "cpu" and device.type in states:
            torch.get_device_module(device).set_rng_state(states[device.type])
    return resume.regrouped(saved, engine.stage, engine.offload, num_bytes)
