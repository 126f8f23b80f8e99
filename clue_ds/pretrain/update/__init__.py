"""An update of the weights that the host does not wait for: norm, clip and skip on the device.

DeepSpeed 0.19.8 reads the gradient's norm on the host, to decide whether it clips and whether it
skips the update: 4 waits in a step at stage 1 in bf16, and as many launches as there are
parameters. Here the norm stays on the device, and torch's fused AdamW takes from there what the
gradients are divided by (grad_scale) and whether nothing is updated (found_inf).

Guarantees: weights, moments and the count of steps are those of clipping and skipping on the host,
up to the rounding of one division; the host can queue a step while the one before it computes.

For AdamW at stage 0 in fp32 and at stage 1 in fp32 and bf16 (optim.updates_on_device). fp16 needs
its loss scale on the host; LAMB and Muon know no found_inf; stages 2 and 3 are for models that are
too large for the waits to matter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Of torch.nn.utils.clip_grad_norm_ and of DeepSpeed.
EPS = 1e-6


class DeviceUpdate:
    """Takes the decisions of DeepSpeed's optimizer; made once for an engine.

    `norm`: of the last step's gradient over all ranks, before clipping, a scalar on the device; inf
    or nan if a gradient was not finite.
    """

    def __init__(self, engine: Any, stage: int, clipping: float) -> None:
        """`engine`: DeepSpeed's, with the optimizer of optim.build at this stage."""
        self._engine, self._clipping = engine, clipping
        optimizer = engine.optimizer
        self._adamw = optimizer.optimizer if stage else optimizer
        assert self._adamw.defaults["fused"], "the decisions are taken by the fused kernel"
        self._is_bf16 = hasattr(optimizer, "fp32_groups_flat_partition")
        self._stage = stage
        if stage == 0:
            engine.clip_fp32_gradients = lambda: None
        elif self._is_bf16:
            optimizer.step = self._step_bf16
        else:
            optimizer.check_grad_overflow = False
            optimizer.unscale_and_clip_grads = lambda gradients, norm: None
        self.norm = torch.zeros(())

    @torch.no_grad()
    def step(self) -> Skip:
        """Update the weights; returns whether that was skipped, which the device finds out."""
        self.norm = self._norm()
        # DeepSpeed marks a norm that is not finite by inf, or in places by -1.
        skips = (~torch.isfinite(self.norm) | (self.norm < 0)).float()
        self._adamw.found_inf = skips
        if self._clipping > 0:
            self._adamw.grad_scale = ((self.norm + EPS) / self._clipping).clamp_(min=1.0)
        with self._norm_given():
            self._engine.step()
        return Skip(skips)

    @contextlib.contextmanager
    def _norm_given(self) -> Iterator[None]:
        """Within: the optimizer of stage 1 in fp32 looks at no norm."""
        optimizer = self._engine.optimizer
        if not self._stage or self._is_bf16:
            yield
            return
        # Only here, because DeepSpeed loads no checkpoint of a clipped run without it.
        optimizer.compute_grad_norm = False
        try:
            yield
        finally:
            optimizer.compute_grad_norm = True

    def _norm(self) -> Tensor:
        optimizer = self._engine.optimizer
        if self._stage and not self._is_bf16:
            return optimizer.scaled_global_norm()
        if self._is_bf16:  # every rank has the sums of all gradients
            gradients, _ = optimizer.get_grads_for_norm()
        else:
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _step_bf16(self) -> None:
        """BF16_Optimizer.step without what it decides on the host."""
        optimizer = self._engine.optimizer
        optimizer.overflow = False
        for master, gradient in zip(
            optimizer.fp32_groups_flat_partition,
            optimizer.fp32_groups_gradient_flat_partition,
            strict=True,
        ):
            master.grad = gradient
        optimizer.optimizer.step()
        optimizer._lazy_init_hp_params_optimizer_state()
        optimizer.update_lp_params()
        optimizer.clear_hp_grads()


class Skip:
    """Whether an update was skipped, on its way to the host."""

    def __init__(self, flag: Tensor) -> None:
        """`flag`: a scalar on the device, 0 if the update was made."""
        if flag.device.type == "cpu":
            self._host, self._event = flag, None
            return
        self._host = torch.empty((), pin_memory=True)
        self._host.copy_(flag, non_blocking=True)
        self._event = torch.get_device_module(flag.device).Event()
        self._event.record()

    def read(self) -> bool:
        """The answer; waits for the update, and for nothing that was queued after it."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._host.numpy())


@contextlib.contextmanager
def without_update(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """In the block DeepSpeed counts a step and clears gradients, but updates no weight."""
    optimizer.step = lambda closure=None: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del optimizer.step  # type: ignore[method-assign]
