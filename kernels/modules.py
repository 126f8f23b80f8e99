"""Modules that drop in for torch's, Megatron's and Hugging Face's.

A fused module holds the parameters of the module that it replaces, under the same names, so state
dicts don't change and weights load and save as before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .functional import bias_dropout_add_layer_norm, bias_gelu, layer_norm, masked_softmax


class FusedLayerNorm(nn.LayerNorm):
    """nn.LayerNorm, computed by `clue_ds.kernels.layer_norm`; same arguments and parameters."""

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
    """Megatron's FusedScaleMaskSoftmax: same constructor and call, without its limits on length.

    Args (Megatron's, in its order; there, only the last one has a default):
        input_in_fp16, input_in_bf16: return the probabilities in this dtype
        attn_mask_type: Megatron's AttnMaskType or the name of a member; "causal" masks later keys,
            "padding" and all others mask only what `mask` masks
        scaled_masked_softmax_fusion: True masks in the kernel and ignores `mask_func`, as Megatron
            does; False computes in torch and calls `mask_func`
        mask_func: mask_func(scores, mask) -> masked scores; None masks as the kernel does
        softmax_in_fp32: must be True if there is a scale; the softmax is computed in fp32 anyway
        scale: multiplies the scores before masking; None is 1
        window_size: (left, right) numbers of keys around its own that a query sees; -1 is no limit

    A masked key gets probability 0 (Megatron's -10000 leaves e^-10000), and a row without keys is
    zeros. A mask given together with "causal" or a window is combined with it; each of Megatron's
    two paths ignores one of them.
    """

    def __init__(
        self,
        input_in_fp16: bool = False,
        input_in_bf16: bool = False,
        attn_mask_type: Enum | str = "padding",
        scaled_masked_softmax_fusion: bool = True,
        mask_func: Callable[[Tensor, Tensor], Tensor] | None = None,
        softmax_in_fp32: bool = True,
        scale: float | None = None,
        window_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if input_in_fp16 and input_in_bf16:
            raise ValueError("scores can't be both fp16 and bf16")
        if scale is not None and not softmax_in_fp32:
            raise ValueError("softmax_in_fp32 must be True where scores are scaled")
        wanted = {torch.float16: input_in_fp16, torch.bfloat16: input_in_bf16}
        self.dtype = next((dtype for dtype, is_wanted in wanted.items() if is_wanted), None)
        name = attn_mask_type.name if isinstance(attn_mask_type, Enum) else attn_mask_type
        self.is_causal = name == "causal"
        self.fused = scaled_masked_softmax_fusion
        self.mask_func = mask_func
        self.scale = 1.0 if scale is None else scale
        self.window_size = window_size

    def forward(
        self, input: Tensor, mask: Tensor | None = None, softmax_offset: Tensor | None = None
    ) -> Tensor:
        """input [B, N, Q, K], bool mask that broadcasts to it, True where MASKED -> like input.

        `softmax_offset` [N] is the score of one more key per head, which counts in the sum of the
        softmax and is left out of the result. It is computed in torch.
        """
        hidden = self._hidden(input)
        if hidden is not None:
            mask = hidden if mask is None else mask | hidden
        if self.fused and softmax_offset is None:
            probabilities = masked_softmax(input, mask, scale=self.scale)
        else:
            probabilities = self._in_torch(input.float() * self.scale, mask, softmax_offset)
        return probabilities.to(self.dtype or input.dtype)

    def _hidden(self, scores: Tensor) -> Tensor | None:
        """bool [Q, K], True where the position alone masks a key; None if it masks none."""
        num_queries, num_keys = scores.shape[-2:]
        if self.window_size is not None:
            behind, ahead = (num_keys if size < 0 else size for size in self.window_size)
        elif self.is_causal and num_queries > 1:  # a single query comes after all its keys
            behind, ahead = num_keys, 0
            if num_queries != num_keys:
                raise ValueError(
                    f"a causal mask needs as many keys as queries, not {num_keys} for {num_queries}"
                )
        else:
            return None
        positions = torch.arange(num_keys, device=scores.device)
        distance = positions - positions[num_keys - num_queries :, None]
        return (distance > ahead) | (distance < -behind)

    def _in_torch(self, scores: Tensor, mask: Tensor | None, offset: Tensor | None) -> Tensor:
        if mask is not None and self.mask_func is not None:
            scores, mask = self.mask_func(scores, mask), None
        if offset is None:
            return reference.masked_softmax(scores, mask)
        if mask is not None:
            scores = scores.masked_fill(mask, float("-inf"))
        sink = offset.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]


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

    The class of every nn.LayerNorm, every dense + dropout + add + LayerNorm and every dense + GELU
    changes; parameters, hooks and module names don't. Raises ValueError for a model that has no
    block of a BERT or RoBERTa.
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
        raise ValueError(
            f"{type(model).__name__} is no BERT or RoBERTa of transformers: "
            f"it has none of {', '.join(ADD_NORMS)}"
        )
    return model


def _mix_in(module: Any, fused: type) -> None:
    """Give one module `fused.forward`; its new class is a subclass of its old one."""
    module.__class__ = type(f"Fused{type(module).__name__}", (fused, type(module)), {})
