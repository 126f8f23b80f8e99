"""The training state in DeepSpeed's shards, by parameter: masters, moments, counts, loss scale.

Guarantees: it is the same for every ZeRO stage, precision, number of ranks and offload; files are
mapped into memory and opened when something in them is needed, so a rank that asks for its own part
of a large model reads that part alone; nothing in the files can run code (pickles.py). What is
missing or has another size is an error that names it, and never filled.

Rejected: DeepSpeed's universal format. It needs a conversion step that writes everything again, it
does not exist for stage 0, and its converter unpickles whatever it finds.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clue_ds.checkpoint import layout as layouts
from clue_ds.checkpoint import pickles
from clue_ds.checkpoint.layout import Layout, Piece, Sizes
from clue_ds.checkpoint.manifest import Manifest
from clue_ds.errors import UserError, first_line

# Rank 0's file with the model and DeepSpeed's counters, at stages 0 to 2 and at stage 3.
MODEL_STATES = "mp_rank_00_model_states.pt"
MODEL_STATES_OF_STAGE_3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"
COUNTERS = ("global_steps", "global_samples", "skipped_steps")
# What of the fp16 loss scale changes in training; DeepSpeed's classes share these names.
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
# The key of the fp32 weights, beside the optimizer's own such as exp_avg.
MASTER = "master"


class SavedState:
    """What one checkpoint holds. `sizes`: elements of each trained parameter, in their order.

    `counters`: DeepSpeed's, by the names of COUNTERS. `loss_scale`: by the names of LOSS_SCALE;
    empty except in fp16. `num_bytes`: copied so far by `copy_to`.
    """

    def __init__(self, folder: Path, saved: Manifest) -> None:
        """Open the folder of DeepSpeed's shards of a checkpoint that was verified."""
        self._folder, self._saved = folder, saved
        self._contents: dict[int, dict[str, Any]] = {}
        self._opened: dict[int, tuple[list[Tensor], list[dict[str, Any]]]] = {}
        self.num_bytes = 0
        with self._expected():
            self._read_index(folder, saved)

    def _read_index(self, folder: Path, saved: Manifest) -> None:
        name = MODEL_STATES if saved.zero_stage < 3 else MODEL_STATES_OF_STAGE_3
        self._model = pickles.load(folder / name, mmap=True)
        self.counters = {key: int(self._model[key]) for key in COUNTERS}
        content = self._optimizer(0)
        self._groups = self._sizes_by_tensor()
        self.sizes: Sizes = {name: n for group in self._groups for name, n in group.items()}
        scaler = content.get("loss_scaler", content)
        values = scaler if isinstance(scaler, dict) else vars(scaler)
        is_fp16 = saved.precision == "fp16"
        self.loss_scale = {key: values[key] for key in LOSS_SCALE if is_fp16 and key in values}
        self._places: dict[str, list[tuple[int, int, Piece]]] = {name: [] for name in self.sizes}
        for rank in range(saved.world_size if saved.zero_stage else 1):
            for number, pieces in enumerate(self.layout(rank)):
                for piece in pieces:
                    self._places[piece.name].append((rank, number, piece))

    def layout(self, rank: int) -> Layout:
        """Which pieces of which parameters the tensors of that rank's shard hold."""
        if self._saved.zero_stage == 0:
            return layouts.whole(self.sizes)
        if self._saved.zero_stage == 3:
            return [layouts.cut_pieces(g, rank, self._saved.world_size) for g in self._groups]
        # Each rank's shard is as long as rank 0's, until the last one that holds anything.
        lengths = [tensor.numel() for tensor in self._shard(0)[0]]
        paddings = self._optimizer(0).get("param_alignment_paddings")
        paddings = paddings or [[0] * len(group) for group in self._groups]
        return [
            layouts.flat_pieces(group, padding, rank, length)
            for group, padding, length in zip(self._groups, paddings, lengths, strict=True)
        ]

    def keys(self, name: str) -> list[str]:
        """Names of the optimizer's tensors for a parameter, such as exp_avg; none before step 1."""
        return [key for key, value in self._state(name).items() if _is_partitioned(value)]

    def scalars(self, name: str) -> dict[str, Any]:
        """What else the optimizer keeps for a parameter, such as the number of its steps."""
        return {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in self._state(name).items()
            if not _is_partitioned(value)
        }

    def copy_to(self, target: Tensor, key: str, name: str, begin: int = 0) -> None:
        """Copy the elements from `begin` on of the flattened parameter into `target`, all of it.

        `key`: MASTER, or one of `keys`. UserError when the checkpoint lacks any of them.
        """
        end, found = begin + target.numel(), 0
        for rank, number, piece in self._places.get(name, ()):
            low, high = max(begin, piece.begin), min(end, piece.end)
            if low >= high:
                continue
            masters, states = self._shard(rank)
            source = masters[number] if key == MASTER else states[number].get(key, masters[0][:0])
            at = piece.at + low - piece.begin
            part = source.detach().reshape(-1)[at : at + high - low]
            found += part.numel()
            if part.numel() == high - low:
                target[low - begin : high - begin].copy_(part)
        if found != target.numel():
            raise UserError(
                f"{self._folder} holds only {found:,} of {target.numel():,} elements of {key} of "
                f"{name}, so the state can't be regrouped. Continue the run on "
                f"{self._saved.world_size} ranks with the DeepSpeed JSON that it had"
            )
        self.num_bytes += target.numel() * target.element_size()

    def read(self, key: str, name: str) -> Tensor:
        """All elements of a parameter, flat, in fp32."""
        target = torch.empty(self.sizes[name])
        self.copy_to(target, key, name)
        return target

    def shape(self, name: str) -> torch.Size:
        """Shape of a trained parameter."""
        if self._saved.zero_stage == 0:
            return self._model["module"][name].shape
        return next(group[name] for group in self._model["param_shapes"] if name in group)

    @contextlib.contextmanager
    def _expected(self) -> Iterator[None]:
        """One message for files that were opened safely but hold something else."""
        try:
            yield
        except UserError:
            raise
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"{self._folder} does not hold what DeepSpeed saves at ZeRO stage "
                f"{self._saved.zero_stage} ({type(error).__name__}: {first_line(error)}); restore "
                "the checkpoint from a copy, or remove it to continue from the one before"
            ) from error

    def _sizes_by_tensor(self) -> list[Sizes]:
        if self._saved.zero_stage == 0:
            module = self._model["module"]
            return [{n: module[n].numel() for n in names} for names in self._saved.group_names]
        return [
            {name: math.prod(shape) for name, shape in group.items()}
            for group in self._model["param_shapes"]
        ]

    def _state(self, name: str) -> dict[str, Any]:
        """The optimizer's state of the tensor that holds the beginning of a parameter."""
        places = self._places.get(name)
        if not places:
            raise UserError(f"{self._folder} holds nothing of {name}, which this run trains")
        rank, number, _ = places[0]
        return self._shard(rank)[1][number]

    def _shard(self, rank: int) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """The master tensors in a rank's shard, and the optimizer's state of each."""
        if rank not in self._opened:
            with self._expected():
                self._opened[rank] = self._open(rank)
        return self._opened[rank]

    def _open(self, rank: int) -> tuple[list[Tensor], list[dict[str, Any]]]:
        content = self._optimizer(rank)
        if self._saved.zero_stage == 3:
            masters, state = content["fp32_flat_groups"], content["optimizer_state_dict"]
        elif self._saved.zero_stage:
            masters = content["single_partition_of_fp32_groups"]
            state = content["base_optimizer_state"]
        elif self._saved.precision == "fp32":
            module = self._model["module"]
            masters = [module[name] for names in self._saved.group_names for name in names]
            state = content
        else:
            masters = [tensor for group in content["fp32_groups"] for tensor in group]
            state = content["optimizer_state_dict"]
        if isinstance(state, list):  # with elastic_checkpoint in the JSON
            return masters, state
        return masters, [state["state"].get(number, {}) for number in range(len(masters))]

    def _optimizer(self, rank: int) -> dict[str, Any]:
        if self._saved.zero_stage == 0:
            return self._model["optimizer"]
        if rank not in self._contents:
            found = list(self._folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
            if len(found) != 1:
                number = len(found)
                raise UserError(f"{self._folder} holds {number} shards of rank {rank} instead of 1")
            content = pickles.load(found[0], mmap=True)
            self._contents[rank] = content["optimizer_state_dict"]
        return self._contents[rank]


def _is_partitioned(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
