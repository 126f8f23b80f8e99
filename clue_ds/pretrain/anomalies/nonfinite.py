"""A step whose gradient is not finite: which rank, which tensor, which samples, and what follows.

The norm of the summed gradients is looked at before the weights are updated, so the update is left
out on every rank, at every ZeRO stage and precision. Where the device does that by itself
(pretrain/update), the host asks for the answer of a step only when the passes of the next one are
queued, and before that one's update: nothing waits, and no later update is made in the meantime.
What is in this module runs only after such a step.

Guarantees: with train.on_nan `stop` the run ends with a message that names the step, its samples,
the ranks, and on each of them the first tensor that is not finite; with `skip` it goes on without
that update, at most train.max_skipped_steps times in a row. The weights stay finite, and nothing
that is not finite is saved. In fp16 skipped updates are how the loss scale is found; there, only a
loss scale that can't be lowered any more ends the run.

To find the tensor, the step is repeated with the same dropout. Rejected: hooks on every tensor in
every step, and a look at the weights afterwards (after clipping by a norm that is not a number, all
of them would be).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clue_ds import dist
from clue_ds.config import TrainSection
from clue_ds.errors import UserError
from clue_ds.pretrain.engine import Engine, RandomState

MAX_RANKS_NAMED = 4


class _Made(NamedTuple):
    """A step that has ended; `state`: of the random generators at its beginning."""

    step: int
    batch: int
    micro_batches: list[dict[str, Tensor]]
    state: RandomState


class NonFiniteSteps:
    """What a run does about steps whose gradient is not finite."""

    def __init__(self, train: TrainSection, engine: Engine, samples_of: str = "the run") -> None:
        """`samples_of`: in messages, what the numbers of samples are counted in."""
        self._train, self._engine = train, engine
        self._in_a_row = 0
        self._samples_of = samples_of
        self._made: _Made | None = None

    def begin(self, train: TrainSection, samples_of: str) -> None:
        """Go on with the batch sizes of the phase that begins."""
        self._train, self._samples_of = train, samples_of

    def remember(self, step: int, batch: int, micro_batches: list[dict[str, Tensor]]) -> None:
        """After every Engine.step: what `note` needs if the update was skipped.

        `batch`: the number of its batch in the sample stream, from 0.
        """
        self._made = _Made(step, batch, micro_batches, self._engine.random_state)

    def note(self) -> str | None:
        """None if the step that is remembered made its update, else the line for the user.

        Every rank must call it before the next update. UserError, the same on all ranks, when the
        run must not go on.
        """
        made, self._made = self._made, None
        engine = self._engine
        if made is None:
            return None
        if not engine.skipped_update:
            self._in_a_row = 0
            return None
        if engine.precision == "fp16":
            return None
        step, batch, micro_batches, state = made
        self._in_a_row += 1
        what = f"the gradient is not finite at step {step} ({self._samples(batch)})"
        if self._train.on_nan == "skip" and self._in_a_row <= self._train.max_skipped_steps:
            return (
                f"{what}: its update was skipped, {self._in_a_row} in a row, "
                f"{engine.skipped_steps} in this run"
            )
        raise UserError(f"{what}: {self._culprits(micro_batches, state)}. {self._advice()}")

    def exhausted(self, step: int, batch: int, micro_batches: list[dict[str, Tensor]]) -> UserError:
        """The error for a loss scale that can't be lowered any more; on all ranks."""
        culprits = self._culprits(micro_batches, self._engine.random_state)
        return UserError(
            f"fp16 training diverged at step {step} ({self._samples(batch)}): the gradient "
            f"overflows even at the smallest loss scale: {culprits}. Use "
            "train.precision bf16 if the GPU supports it, or a smaller train.lr, or more "
            "train.warmup_steps, and start again from the newest checkpoint"
        )

    def _samples(self, batch: int) -> str:
        size = self._train.global_batch_size
        return f"samples {batch * size:,} to {(batch + 1) * size - 1:,} of {self._samples_of}"

    def _culprits(self, micro_batches: list[dict[str, Tensor]], state: RandomState) -> str:
        """What each rank that is to blame finds when it repeats the step."""
        found = dist.all_gather(first_not_finite(self._engine, micro_batches, state))
        blamed = [f"rank {rank}: {what}" for rank, what in enumerate(found) if what is not None]
        if not blamed:
            return (
                "no rank finds the same when it repeats the step, so the memory of a device, or a "
                "link between ranks, may be faulty"
            )
        more = len(blamed) - MAX_RANKS_NAMED
        size = self._train.global_batch_size // dist.world_size()
        share = f" (each rank has {size} of the samples, in order)" if dist.world_size() > 1 else ""
        named = "; ".join(blamed[:MAX_RANKS_NAMED])
        return named + (f"; and {more} more ranks" if more > 0 else "") + share

    def _advice(self) -> str:
        advice = (
            "That update was not made, and nothing was saved after the newest checkpoint. Start "
            "again in a new run_dir with a smaller train.lr or more train.warmup_steps"
        )
        if self._train.on_nan == "stop":
            return (
                f"{advice}; or continue the run with --train.on_nan skip, which leaves out such "
                "updates"
            )
        return f"{advice}; train.max_skipped_steps is {self._train.max_skipped_steps}"


def first_not_finite(
    engine: Engine, micro_batches: list[dict[str, Tensor]], state: RandomState
) -> str | None:
    """Repeat a step on this rank and name the first tensor that is not finite; None if all are.

    `state`: of the random generators at its beginning.

    Updates nothing. Every rank must call it, because at stage 3 the ranks gather the weights
    together. The engine can't train afterwards.
    """
    for name, parameter in engine.module.named_parameters():
        if not _is_finite(getattr(parameter, "ds_tensor", parameter)):
            return f"the weights {name} themselves"
    engine.leave_graphs()
    engine.repeat_dropout(state)
    found = [_in_micro_batch(engine, micro_batch) for micro_batch in micro_batches]
    return next((what for what in found if what is not None), None)


def _in_micro_batch(engine: Engine, inputs: dict[str, Tensor]) -> str | None:
    outputs: list[tuple[str, Tensor]] = []
    hooks = [
        module.register_forward_hook(_recorder(name, outputs))
        for name, module in engine.module.named_modules()
        if name  # an inner module ends, and is recorded, before the one around it
    ]
    try:
        with torch.enable_grad():
            loss = engine.module(**inputs).loss
    finally:
        for hook in hooks:
            hook.remove()
    # Minus infinity is right in an output: logits of padded rows of the vocabulary.
    wrong = next((n for n, output in outputs if not math.isfinite(float(output.max()))), None)
    text = None
    if wrong is not None:
        text = f"the output of {wrong}, and the loss is {float(loss)}"
    elif not _is_finite(loss):
        text = f"the loss, which is {float(loss)}"
    # Every rank goes back too, also if it knows already: at stage 3 the others need its weights.
    gradients = _gradients(engine, loss, outputs)
    if text is None:
        text = next((name for name, each in gradients if not _is_finite(each)), None)
    return text


def _gradients(
    engine: Engine, loss: Tensor, outputs: list[tuple[str, Tensor]]
) -> list[tuple[str, Tensor]]:
    """Named gradients in the order of the backward pass.

    Of the parameters, or at stage 3, which has no whole parameters, of the modules' outputs.
    """
    if engine.stage == 3:
        named = [(f"the gradient of the output of {n}", t) for n, t in outputs if t.requires_grad]
    else:
        named = [
            (f"the gradient of {n}", p)
            for n, p in engine.module.named_parameters()
            if p.requires_grad
        ]
    tensors = [tensor for _, tensor in named]
    gradients = torch.autograd.grad(loss * engine.loss_scale, tensors, allow_unused=True)
    pairs = zip((name for name, _ in named), gradients, strict=True)
    return [(name, each) for name, each in pairs if each is not None][::-1]


def _recorder(name: str, outputs: list[tuple[str, Tensor]]) -> Any:
    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            outputs.append((name, output))

    return record


def _is_finite(tensor: Tensor) -> bool:
    return math.isfinite(float(tensor.detach().float().abs().max())) if tensor.numel() else True
