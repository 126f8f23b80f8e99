"""What DeepSpeed would write for a checkpoint, held until a thread writes it.

DeepSpeed gives each file of a checkpoint to its checkpoint engine: one call of `save` with the
content and the path. `Capture` takes the place of that engine. It keeps the contents, with copies
of their tensors in host memory, and later DeepSpeed's own engine writes them.

Guarantees: the files have the bytes that DeepSpeed would have written at once (on a GPU the same
values; the files then say that their tensors were on the CPU, and every reader of checkpoints puts
them there). Nothing that training changes later is seen. The copies take as much host memory as
this rank's files, once: the memory is kept, and the next copy uses it again.

Rejected: DeepSpeed's decoupled writer, which compiles an operator with g++, waits for the files at
the next update of the weights, and says that files are saved before they are;
torch.distributed.checkpoint.async_save, which has another format of files; a forked process, which
is unsafe beside CUDA and the threads of gloo; pinned memory, because a copy of a checkpoint from a
GPU to ordinary memory takes a fraction of a second, and pinned memory can't be swapped or shared.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clue_ds.checkpoint.deepspeed_import import import_deepspeed
from clue_ds.errors import UserError, first_line
from clue_ds.files import size_text


class PendingFile(NamedTuple):
    """A file of a checkpoint that is still to be written, by `write`."""

    path: Path
    content: Any
    engine: Any

    def write(self) -> None:
        """Write the file as DeepSpeed would; any thread may call it."""
        self.engine.save(self.content, str(self.path))


class Capture:
    """Takes what the DeepSpeed engine `engine` gives to its checkpoint engine."""

    def __init__(self, engine: Any, ds_name: str) -> None:
        """`ds_name` names the DeepSpeed JSON in the UserError for a writer that can't be used."""
        self._memory = HostMemory()
        self._copies = True
        self._files: list[PendingFile] = []
        original = engine.checkpoint_engine
        if original.is_decoupled():
            raise UserError(
                f"DeepSpeed JSON {ds_name} asks for {type(original).__name__}, which says that a "
                "checkpoint is saved before its files are complete; remove `checkpoint.writer` and "
                "`datastates_ckpt` there: checkpoint.async_save writes in the background, too"
            )
        engine.checkpoint_engine = self._as_checkpoint_engine(original)

    def _as_checkpoint_engine(self, original: Any) -> Any:
        import_deepspeed()
        from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

        def keep(content: Any, path: str) -> None:
            copied = self._memory.copy(content) if self._copies else content
            self._files.append(PendingFile(Path(path), copied, original))

        class CapturingEngine(CheckpointEngine):
            def create(self, info: Any) -> None:
                pass

            def save(self, state_dict: Any, path: str) -> None:
                keep(state_dict, path)

            def load(self, path: str, map_location: Any = None) -> Any:
                return original.load(path, map_location=map_location)

            def commit(self, info: Any) -> bool:
                return True

            def is_data_parallel_writer(self, dp_rank: int) -> bool:
                return original.is_data_parallel_writer(dp_rank)

        return CapturingEngine()

    @contextlib.contextmanager
    def capturing(self, copies: bool) -> Iterator[list[PendingFile]]:
        """A list that holds, after the block, the files that DeepSpeed saved in the block.

        With `copies` they stay as they are until the next block; otherwise they hold the engine's
        own tensors and must be written before the next step.
        """
        self._copies, self._files = copies, []
        self._memory.reuse()
        try:
            yield self._files
        finally:
            self._files = []


class HostMemory:
    """Memory of this process for copies of tensors; made at the first copy and used again."""

    def __init__(self) -> None:
        self._blocks: list[torch.UntypedStorage] = []
        self._next = 0

    @property
    def num_bytes(self) -> int:
        """Size of all blocks."""
        return sum(block.nbytes() for block in self._blocks)

    def reuse(self) -> None:
        """Earlier copies may be overwritten from now on."""
        self._next = 0

    def copy(self, content: Any) -> Any:
        """`content` with copies of its tensors and of everything else that could change.

        Tensors that share memory still do, and objects that are one object stay one, so that torch
        writes the copy with the same bytes. Content is what torch.save can write: it is pickled
        without the tensors, in memory, and read back.
        """
        originals: list[Tensor] = []
        numbers: dict[int, int] = {}

        class Writer(pickle.Pickler):
            def persistent_id(self, value: Any) -> int | None:
                if type(value) is not Tensor or vars(value):
                    return None
                if id(value) not in numbers:
                    numbers[id(value)] = len(originals)
                    originals.append(value)  # held, so that no other tensor gets its id
                return numbers[id(value)]

            def reducer_override(self, value: Any) -> Any:
                if type(value) is Tensor:  # one with attributes; torch.save writes them, too
                    return _with_attributes, (value.detach(), value.requires_grad, vars(value))
                return NotImplemented  # torch's reduction of a Parameter leads to its tensor

        pickled = io.BytesIO()
        Writer(pickled).dump(content)
        storages: dict[int, torch.UntypedStorage] = {}
        copies = [self._copy_tensor(tensor, storages) for tensor in originals]

        class Reader(pickle.Unpickler):
            def persistent_load(self, number: int) -> Tensor:
                return copies[number]

        return Reader(io.BytesIO(pickled.getvalue())).load()

    def _copy_tensor(self, tensor: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:  # its address, by which torch.save knows it, too
            storages[storage._cdata] = self._copy_storage(storage)
        copied = torch.empty(0, dtype=tensor.dtype).set_(
            storages[storage._cdata], tensor.storage_offset(), tensor.size(), tensor.stride()
        )
        return copied.requires_grad_(tensor.requires_grad)

    def _copy_storage(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        size = storage.nbytes()
        if self._next == len(self._blocks):
            self._blocks.append(_allocate(size))
        elif self._blocks[self._next].nbytes() != size:
            self._blocks[self._next] = _allocate(size)
        block = self._blocks[self._next]
        self._next += 1
        # As tensors, because torch then copies with all its threads.
        bytes_of = [
            torch.empty(0, dtype=torch.uint8, device=each.device).set_(each)
            for each in (block, storage)
        ]
        bytes_of[0].copy_(bytes_of[1])
        return block


def _with_attributes(tensor: Tensor, requires_grad: bool, attributes: dict[str, Any]) -> Tensor:
    restored = tensor.detach().requires_grad_(requires_grad)
    vars(restored).update(attributes)
    return restored


def _allocate(num_bytes: int) -> torch.UntypedStorage:
    try:
        return torch.UntypedStorage(num_bytes)
    except RuntimeError as error:
        raise UserError(
            f"this host has no memory for a copy of {size_text(num_bytes)} of the training state "
            f"({first_line(error)}); set checkpoint.async_save: false, which needs no copy, or use "
            "more hosts. `clue-ds plan` calculates the memory that is needed"
        ) from None
