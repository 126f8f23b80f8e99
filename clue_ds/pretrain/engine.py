"""The only module that trains with DeepSpeed: process group, engine, and fixes for 0.19.8.

Guarantees: works under the deepspeed launcher, torchrun and mpirun, and without a launcher; starts
no compiler; collectives end with an error after PROCESS_GROUP_TIMEOUT instead of hanging; the
update of a step is plain AdamW's (or Lamb's, Muon's) on fp32 master weights at every stage and
precision.

Fixed here, because DeepSpeed 0.19.8 behaves differently (each fix has a test):
- it compiles a shared-memory operator with g++ at start, 87 to 220 s, for inference only;
- bf16 and fp16 at stage 0 take a phantom optimizer step when the engine is built;
- new process groups ignore the timeout that was asked for;
- fp32 at stage 0 reports no gradient norm, and makes an update from a gradient that is not finite;
- stage 3 gathers small parameters when a checkpoint is loaded, and the first backward pass of a
  fresh engine then fails on them ("size of tensor a (0)").

Rejected: set_z3_leaf_modules for the blocks that read their children's parameters. Its backward
pass finds released weights ("size of tensor a (0)"); DeepSpeed finds those parameters by itself.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import math
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clue_ds import dist
from clue_ds.checkpoint import layout, pickles, regroup
from clue_ds.checkpoint.deepspeed_import import import_deepspeed
from clue_ds.checkpoint.manifest import FROZEN, TAG, Choice
from clue_ds.checkpoint.shards import COUNTERS, SavedState
from clue_ds.checkpoint.snapshot import Capture, PendingFile
from clue_ds.config import TrainSection
from clue_ds.data import flat
from clue_ds.errors import UserError
from clue_ds.job import rendezvous
from clue_ds.model.cuda_graph import GraphedForward, takes_graphs
from clue_ds.model.encoder import without_full_lengths
from clue_ds.pretrain import ds_json, muon, optim
from clue_ds.pretrain.update import DeviceUpdate, Skip, without_update

# DeepSpeed's own variable, in minutes, with DeepSpeed's default.
PROCESS_GROUP_TIMEOUT = timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", "10")))
RandomState = tuple[Tensor, Tensor | None]  # of the host, and of a GPU
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def start() -> torch.device:
    """Join the process group (once per process); returns this rank's device."""
    meeting = rendezvous.meet()
    device = _device()
    deepspeed = import_deepspeed()
    c10d = torch.distributed.distributed_c10d
    # DeepSpeed makes further groups without a timeout of their own; they use these defaults.
    c10d.default_pg_timeout = PROCESS_GROUP_TIMEOUT
    c10d.default_pg_nccl_timeout = PROCESS_GROUP_TIMEOUT
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            torch.distributed.get_default_backend_for_device(device),
            store=torch.distributed.PrefixStore(f"{meeting.prefix}/group", meeting.store),
            rank=dist.rank(),
            world_size=dist.world_size(),
            timeout=PROCESS_GROUP_TIMEOUT,
        )
        atexit.register(_leave)
    deepspeed.init_distributed(timeout=PROCESS_GROUP_TIMEOUT, verbose=False)
    return device


def dropout_seed(seed: int, step: int) -> int:
    """Seed of this rank's dropout from `step` on: another one for every rank and every step."""
    return (seed * 1_000_003 + step) * 65_537 + dist.rank()


def _leave() -> None:
    """Before the interpreter ends, or gloo's threads abort it with "terminate called"."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _device() -> torch.device:
    device = dist.device()
    if device.type == "cpu":
        return device
    # With Slurm's --gpus-per-task every rank sees a single device, with number 0.
    number = dist.local_rank() % torch.accelerator.device_count()
    os.environ["LOCAL_RANK"] = str(number)
    torch.accelerator.set_device_index(number)
    return torch.device(device.type, number)


class LossScaleExhausted(UserError):
    """Gradients overflow in fp16 even at the smallest loss scale; on all ranks."""

    def __init__(self) -> None:
        super().__init__(
            "fp16 training diverged: gradients overflow even at the smallest loss scale; use bf16 "
            "if the GPU supports it, or a smaller learning rate, or more warm-up"
        )


class Engine:
    """A model under DeepSpeed. A step is forward and backward on each micro-batch, then `step`.

    `module`: the model, in the run's precision, on this rank's device (sharded at stage 3).
    `group_names`: names of the trained parameters, group by group, in the optimizer's order.
    `frozen`: fp32 copies of the parameters that are not trained, by name.
    `gradient_accumulation_steps`: micro-batches per step on this rank.
    `random_state`: of the random generators at the beginning of the step.
    """

    random_state: RandomState

    def __init__(
        self,
        model: nn.Module,
        train: TrainSection,
        ds_values: dict[str, Any],
        ds_name: str,
        device: torch.device,
    ) -> None:
        """Take over `model` (fp32, on any device).

        `ds_values`: the DeepSpeed JSON as ds_json.read returns it; `ds_name` names it in errors.
        """
        deepspeed = import_deepspeed()
        assert train.precision != "auto"  # pretrain/auto has replaced it
        self.precision = train.precision
        _check_precision(self.precision, device)
        self.device = device
        self.stage = ds_json.zero_stage(ds_values)
        self.offload = ds_json.offloads(ds_values)
        self.gradient_accumulation_steps = train.gradient_accumulation_steps(dist.world_size())
        values = ds_json.fill(ds_values, ds_name, train, dist.world_size())
        # Copied before DeepSpeed rounds the model to the run's precision.
        self.frozen = {
            name: p.detach().float().cpu().clone()
            for name, p in model.named_parameters()
            if not p.requires_grad
        }
        # Counted now, because at stage 3 a parameter is empty afterwards.
        self.num_parameters = sum(p.numel() for p in model.parameters())
        ds_json.fit_buckets(values, self.num_parameters)
        self.group_names = optim.group_names(model, train.optimizer)
        model = model.to(device)
        self._graph: GraphedForward | None = None
        if takes_graphs(train.cuda_graph, device, self.stage, dist.world_size()):
            self._graph = GraphedForward(model)
            model.forward = self._graph  # type: ignore[assignment, method-assign]
        optimizer = optim.build(train, model, self.stage, device, self.offload)
        self._deepspeed = ds_json.initialize(deepspeed, model, optimizer, values, ds_name)
        self.module: nn.Module = self._deepspeed.module
        self._capture = Capture(self._deepspeed, ds_name)
        self._skipped_update = False
        self._skip: Skip | None = None  # of the last step, until it is read
        self._fused = optimizer.defaults.get("fused")
        self._update: DeviceUpdate | None = None
        if optim.updates_on_device(train, self.stage, self.offload):
            self._update = DeviceUpdate(self._deepspeed, self.stage, train.gradient_clipping)
        if self.stage == 0 and self.precision != "fp32":
            self._undo_phantom_step()

    def _undo_phantom_step(self) -> None:
        """Undo the step that FP16_UnfusedOptimizer made on zero gradients in its constructor.

        At learning rate 0 it changed no weight, but it left step = 1 in the bias correction.
        """
        inner = self._deepspeed.optimizer.optimizer
        inner.state.clear()
        for group in inner.param_groups:
            assert group["lr"] == 0.0
            group.pop("step", None)  # pytorch_optimizer counts steps here

    def change_batch(self, train: TrainSection) -> None:
        """Use these batch sizes from the next step on."""
        engine, number = self._deepspeed, train.gradient_accumulation_steps(dist.world_size())
        engine.set_train_micro_batch_size(train.micro_batch())
        engine.set_train_batch_size(train.global_batch_size)
        assert engine.gradient_accumulation_steps() == number
        # DeepSpeed finds the last micro-batch of a step by counting all micro-batches of the run,
        # and the optimizer of stages 1 and 2 has a number of its own.
        engine.micro_steps = 0
        if self.stage:
            engine.optimizer.gradient_accumulation_steps = number
        self.gradient_accumulation_steps = number

    def micro_batches(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """A rank's batch, padded or flat, moved to its device and cut into micro-batches."""
        number = self.gradient_accumulation_steps
        stays = flat.ON_HOST if flat.is_flat(batch) else ()
        moved = {
            k: v if k in stays else v.to(self.device, non_blocking=True)
            for k, v in without_full_lengths(batch).items()
        }
        self.random_state = torch.get_rng_state(), self._device_random_state()
        if flat.is_flat(batch):
            assert len(batch["sizes"]) == number, "the stream was made for other micro-batches"
            return flat.split(moved)
        chunks = {k: v.chunk(number) for k, v in moved.items()}
        return [{k: v[i] for k, v in chunks.items()} for i in range(number)]

    def _device_random_state(self) -> Tensor | None:
        if self.device.type == "cpu":
            return None
        return torch.get_device_module(self.device).get_rng_state()

    @property
    def uses_graphs(self) -> bool:
        """Whether micro-batches are replayed as CUDA graphs."""
        return self._graph is not None and self._graph.active

    def leave_graphs(self) -> None:
        """From now on run the model itself, whose modules can then be watched."""
        if self._graph is not None:
            self._graph.active = False

    def repeat_dropout(self, state: RandomState) -> None:
        """Put the random generators back to the beginning of a step."""
        on_host, on_device = state
        torch.set_rng_state(on_host)
        if on_device is not None:
            torch.get_device_module(self.device).set_rng_state(on_device)

    def forward(self, **inputs: Tensor) -> Any:
        """The model's output on one micro-batch."""
        return self._deepspeed(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch; `step` uses their mean over all ranks."""
        self._deepspeed.backward(loss)
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()  # how DeepSpeed counts micro-batches; updates nothing

    def step(self, lr: float) -> float | Tensor:
        """Update the weights; returns the gradient's norm before clipping, over all ranks.

        It is inf or nan when a gradient was not finite; then the update is skipped, on all ranks
        and at every stage (`skipped_update`). In fp16 that also lowers the loss scale, which is
        normal. LossScaleExhausted when it can't be lowered.

        With a DeviceUpdate the host waits for nothing, and the norm stays on the device. Otherwise
        it waits for the norm before the update: DeepSpeed does so, and so does fp32 at stage 0,
        where DeepSpeed would not look at it.
        """
        before = self.skipped_steps
        optim.set_rate(self._deepspeed.optimizer.param_groups, lr)
        if self._update is not None:
            self._skip = self._update.step()
            return self._update.norm
        norm = self._own_norm() if self.stage == 0 and self.precision == "fp32" else None
        scale = self.loss_scale
        skips = norm is not None and not math.isfinite(norm)
        try:
            with without_update(self.optimizer) if skips else contextlib.nullcontext():
                self._deepspeed.step()
        except Exception as error:
            if self.precision == "fp16" and "minimum" in str(error):
                raise LossScaleExhausted from error
            raise
        self._deepspeed.skipped_steps += skips
        self._skipped_update = self.skipped_steps > before
        if self._skipped_update and scale == self._lowest_scale_at_stage_0():
            raise LossScaleExhausted
        if norm is None:
            norm = self._deepspeed.get_global_grad_norm()
            if self.stage == 0:  # the unfused optimizer returns the norm of the scaled gradient
                norm = norm / scale
        return norm

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by in the backward pass; 1 except in fp16."""
        return float(getattr(self._deepspeed.optimizer, "loss_scale", 1.0) or 1.0)

    def _lowest_scale_at_stage_0(self) -> float | None:
        """In fp16 at stage 0, where DeepSpeed would skip updates at this loss scale for ever."""
        scaling = getattr(self._deepspeed.optimizer, "loss_scale_config", None)
        if self.stage or scaling is None or not scaling.dynamic_loss_scale:
            return None
        return float(scaling.min_loss_scale)

    def _own_norm(self) -> Tensor:
        """For fp32 at stage 0, where gradients are whole and averaged when `backward` returns."""
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads)

    @property
    def skipped_update(self) -> bool:
        """Whether the last step left the weights as they were; waits for its update."""
        if self._skip is not None:
            self._skipped_update, self._skip = self._skip.read(), None
            self._deepspeed.skipped_steps += self._skipped_update
        return self._skipped_update

    @property
    def skipped_steps(self) -> int:
        """Updates that were skipped because a gradient was not finite; waits for the last one."""
        self.skipped_update  # noqa: B018  counts the last one
        return self._deepspeed.skipped_steps

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """DeepSpeed's optimizer; at stage 0 in fp32 it is torch's own."""
        return self._deepspeed.optimizer

    def capture(self, directory: Path, tag: str, copies: bool) -> list[PendingFile]:
        """The files of DeepSpeed's checkpoint `directory`/`tag`; every rank must call it.

        With `copies` they stay as they are while training goes on, until the next call; otherwise
        they must be written before the next step.
        """
        with self._capture.capturing(copies) as files, contextlib.redirect_stdout(io.StringIO()):
            self._deepspeed.save_checkpoint(str(directory), tag=tag, save_latest=False)
        return files

    def load(self, choice: Choice) -> int | None:
        """Load a verified checkpoint; only once, before the first step; every rank must call it.

        One of another layout (ranks, ZeRO stage, offload, order of parameters) is regrouped; then
        the result is the number of bytes that this rank read, and otherwise None.
        UserError for a file that holds anything but tensors and the classes of pickles.ALLOWED.
        """
        num_bytes = self._load(choice)
        base = getattr(self.optimizer, "optimizer", self.optimizer)
        if isinstance(base, torch.optim.AdamW):
            optim.keep_fused(base, self._fused)
        return num_bytes

    def _load(self, choice: Choice) -> int | None:
        self.frozen = pickles.load_tensors(choice.directory / FROZEN)
        # At stage 0 every rank has the whole state.
        if self.stage or choice.manifest.zero_stage:
            saved = dist.on_all_ranks(lambda: SavedState(choice.directory / TAG, choice.manifest))
            fits = dist.on_all_ranks(lambda: self._has_layout_of(choice, saved))
            if not all(dist.all_gather(fits)):
                return self._regroup(saved)
        # Its bf16 optimizer prints the name of a function.
        with pickles.guarded(), contextlib.redirect_stdout(io.StringIO()):
            path, _ = self._deepspeed.load_checkpoint(
                str(choice.directory), tag=TAG, load_lr_scheduler_states=False
            )
        assert path is not None, choice.directory
        kept_whole = getattr(self._deepspeed.optimizer, "persistent_parameters", [])
        if (
            kept_whole
        ):  # stage 3: shard them as in a fresh engine; the first forward pass gathers them
            kept_whole[0].partition(kept_whole)
        return None

    def _has_layout_of(self, choice: Choice, saved: SavedState) -> bool:
        """Whether DeepSpeed itself can load this rank's shard."""
        was = choice.manifest
        now = (self.stage, self.offload, dist.world_size())
        if (was.zero_stage, was.offload, was.world_size) != now:
            return False
        return saved.layout(dist.rank()) == self._living().layout

    def _living(self) -> layout.Living:
        names = {id(p): name for name, p in self.module.named_parameters()}
        ranks = dist.rank(), dist.world_size()
        return layout.of_optimizer(self.optimizer, self.stage, names, self.group_names, *ranks)

    def _regroup(self, saved: SavedState) -> int:
        """Take over the state of a checkpoint of another layout."""
        living, optimizer = self._living(), self.optimizer
        if self.stage and any("shapes" in group for group in optimizer.param_groups):
            sizes = {name: saved.sizes[name] for name in self.group_names[0]}
            muon.check_layout(living, sizes, self.stage)
        dist.on_all_ranks(lambda: regroup.fill(optimizer, self.stage, living, saved))
        regroup.refresh(optimizer, self.stage)
        regroup.set_frozen(self.module, self.frozen, dist.rank())
        for name in COUNTERS:
            setattr(self._deepspeed, name, saved.counters[name])
        return saved.num_bytes

    def close(self, leaves: bool = True) -> None:
        """Release what DeepSpeed holds, and leave the process group.

        DeepSpeed keeps groups of its own in globals, so a process that will train again must stay
        in the group: `leaves` False.
        """
        self._deepspeed.destroy()
        if leaves:
            _leave()


def _check_precision(precision: str, device: torch.device) -> None:
    if precision == "fp16" and device.type == "cpu":
        raise UserError("train.precision fp16 needs a GPU; on a CPU set fp32 or bf16")
