"""Modules that drop in for torch's, Megatron's and Hugging Face's.

State dicts don't change: a fused module holds the parameters of the one it stands for, under the
same names, so weights load and save as before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .functional import bias_dropout_add_layer_norm, bias_gelu, layer_norm, masked_softmax


class FusedLayerNorm(nn.LayerNorm):
    """nn.LayerNorm through `clue_ds.kernels.layer_norm`; same arguments, parameters and names."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., *normalized_shape] -> the same."""
        if len(self.normalized_shape) == 1:
            return layer_norm(x, self.weight, self.bias, self.eps)
        width = math.prod(self.normalized_shape)
        weight = None if self.weight is None else self.weight.reshape(width)
        bias = None if self.bias is None else self.bias.reshape(width)
        flat = x.flatten(-len(self.normalized_shape))
        return layer_norm(flat, weight, bias, self.eps).reshape(x.shape)


class FusedScaleMaskSoftmax(nn.Module):
    """Megatron's FusedScaleMaskSoftmax, without its limits on length, for padding masks.

    Args (Megatron's):
        input_in_fp16, input_in_bf16: what scores must be; none of them: any dtype
        scaled_masked_softmax_fusion: False computes with torch
        mask_func: called as mask_func(scores, mask) instead of masking in the kernel
        scale: of the scores, before masking

    Masked keys get probability 0, where Megatron's -10000 leaves e^-10000; a row without keys is
    zeros, where Megatron's is uniform.
    """

    def __init__(
        self,
        input_in_fp16: bool = False,
        input_in_bf16: bool = False,
        scaled_masked_softmax_fusion: bool = True,
        mask_func: Callable[[Tensor, Tensor], Tensor] | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if input_in_fp16 and input_in_bf16:
            raise ValueError("scores can't be both fp16 and bf16")
        wanted = {torch.float16: input_in_fp16, torch.bfloat16: input_in_bf16}
        self.dtype = next((dtype for dtype, is_wanted in wanted.items() if is_wanted), None)
        self.fused = scaled_masked_softmax_fusion
        self.mask_func = mask_func
        self.scale = 1.0 if scale is None else scale

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """scores [B, N, Q, K], mask that broadcasts to it, True where masked -> like scores."""
        if self.dtype not in (None, scores.dtype):
            raise ValueError(f"scores are {scores.dtype}, the module was made for {self.dtype}")
        softmax = masked_softmax if self.fused else reference.masked_softmax
        if mask is not None and self.mask_func is not None:
            return softmax(self.mask_func(scores * self.scale, mask))
        return softmax(scores, mask, scale=self.scale)


class _FusedAddNorm:
    """Hugging Face's BertSelfOutput and BertOutput: dense, dropout, add, LayerNorm."""

    dense: nn.Linear
    LayerNorm: nn.LayerNorm
    dropout: nn.Dropout
    training: bool

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """hidden_states [..., I], input_tensor (the residual) [..., H] -> [..., H]."""
        norm = self.LayerNorm
        projected = F.linear(hidden_states, self.dense.weight)
        return bias_dropout_add_layer_norm(
            projected, self.dense.bias, input_tensor, norm.weight, norm.bias,
            self.dropout.p, norm.eps, self.training,
        )  # fmt: skip


class _FusedGelu:
    """Hugging Face's BertIntermediate: dense, GELU."""

    dense: nn.Linear
    approximate: str

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] -> [..., I]."""
        projected = F.linear(hidden_states, self.dense.weight)
        return bias_gelu(projected, self.dense.bias, self.approximate)


# Hugging Face's activation functions that are GELU, by class name.
APPROXIMATIONS = {"GELUActivation": "none", "NewGELUActivation": "tanh", "GELUTanh": "tanh"}
ADD_NORMS = ("BertSelfOutput", "BertOutput", "RobertaSelfOutput", "RobertaOutput")
INTERMEDIATES = ("BertIntermediate", "RobertaIntermediate")


def apply_kernels_to_bert(model: nn.Module) -> nn.Module:
    """Make a Hugging Face BERT or RoBERTa use the fused operations, in place; returns it.

    Every nn.LayerNorm, every dense + dropout + add + LayerNorm, and every dense + GELU changes its
    class, not its parameters, hooks or place. Raises ValueError where nothing of a BERT was found.
    """
    num_blocks = 0
    for module in model.modules():
        name = type(module).__name__
        if type(module) is nn.LayerNorm:
            module.__class__ = FusedLayerNorm
        elif name in ADD_NORMS:
            _mix_in(module, _FusedAddNorm)
            num_blocks += 1
        elif name in INTERMEDIATES:
            activation = type(module.intermediate_act_fn).__name__
            if activation in APPROXIMATIONS:
                module.approximate = APPROXIMATIONS[activation]  # type: ignore[assignment]
                _mix_in(module, _FusedGelu)
    if not num_blocks:
        raise ValueError(f"{type(model).__name__} has none of {', '.join(ADD_NORMS)}")
    return model


def _mix_in(module: Any, fused: type) -> None:
    """Give one module `fused.forward`; its class stays a subclass of what it was."""
    module.__class__ = type(f"Fused{type(module).__name__}", (fused, type(module)), {})
