"""The states that an interrupted fine-tuning run resumes from, published as checkpoints are.

    state/
      step-00000500/     manifest.json, and state.pt: torch.save of weights, moments and progress
      step-00000640/
      latest             name of the newest one, for people and tools; not used here

Guarantees: those of checkpoint/manifest.py, because its functions publish, verify and choose these
directories, and checkpoint/room.py makes room for them. A damaged state is skipped, with the
reason, and the run resumes from the one before, which is deleted only when the next save begins;
so two states are on the disk at most, one of which may be incomplete. A state that others could
have changed is refused. Nothing but tensors and plain values is unpickled.

Rejected: one file with a checksum at its end, which earlier versions wrote. It was a second
protocol, and a damaged one cost the whole run.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from clue_ds.checkpoint import manifest as manifests
from clue_ds.checkpoint import pickles, retention, room
from clue_ds.checkpoint.manifest import Entries
from clue_ds.errors import UserError
from clue_ds.job import preflight

FORMAT = 1
FILE = "state.pt"
# The names of tensors, the losses and the answers on dev, beside the tensors themselves.
OTHER_BYTES = 1 << 20

_ADAPTER = TypeAdapter(Entries)


@dataclass(frozen=True)
class States:
    """Where a run saves its states, and the directory of the one that it resumes from."""

    folder: Path
    newest: Path | None = None

    def save(self, step: int, content: dict[str, Any]) -> None:
        """Publish the state after `step` steps; UserError when it can't be written."""
        num_bytes = OTHER_BYTES + sum(t.numel() * t.element_size() for t in _tensors(content))
        final = self.folder / manifests.name(step)
        staging = final.with_name(final.name + ".tmp")
        entries = Entries(format=FORMAT, step=step, versions=preflight.versions(), files={})
        for problem in retention.look_after(self.folder, retention.Rule(newest=1)):
            print(f"warning: {problem}", flush=True)
        try:
            room.prepare(staging, num_bytes)
            with room.clear_write_errors(staging, num_bytes):
                torch.save(content, staging / FILE)
                manifests.publish(staging, final, entries)
        except UserError:
            shutil.rmtree(staging, ignore_errors=True)
            raise

    def load(self) -> dict[str, Any]:
        """The content of the state that the run resumes from, which `choose` has verified."""
        assert self.newest is not None
        return pickles.load_plain(self.newest / FILE)


def choose(folder: Path) -> tuple[States, list[str]]:
    """(the newest intact state, if there is one; why each newer one was skipped).

    Damaged ones are renamed to step-N.damaged. UserError when others could have changed one.
    """
    found, skipped = manifests.first_intact(folder, verify)
    for directory in skipped:
        retention.set_aside(directory)
    reasons = [f"{directory}: {reason}" for directory, reason in skipped.items()]
    return States(folder, None if found is None else found[0]), reasons


def verify(directory: Path) -> Entries:
    """The manifest of a state in which every byte is as it was saved; Damaged with the reason."""
    return manifests.verify_files(
        directory, lambda place: manifests.read_entries(place, _ADAPTER, FORMAT)
    )


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _tensors(value)
