"""Chooses the implementation of each operation of the model: torch or `clue_ds.kernels`.

The model does all heavy work through this module, and the weights don't depend on the choice. The
implementation is torch until `choose_kernels` is called (with a run's `model.kernels`); importing
this module doesn't change the default of `clue_ds.kernels`. With torch the GEMM adds the bias,
which saves one pass over memory; a fused kernel adds the bias itself, and computes the bias'
gradient in the backward pass that it runs anyway.

B: sequences   Q, K: query and key positions   N: heads   D: head size   H: hidden size
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clue_ds import kernels
from clue_ds.errors import UserError
from clue_ds.kernels import backend, verify
from clue_ds.kernels.verify import Shapes as Sizes
from clue_ds.kernels.verify import Verdict
from clue_ds.presets import Attention, Kernels, ModelConfig

if TYPE_CHECKING:
    from clue_ds.kernels.bench import Row as Rate

# `kernels`, or their torch references. A model uses the kernels only when a run asks for them.
_operations: Any = kernels.reference

dropout = kernels.reference.dropout
# Flash first; what is last serves inputs that no fused kernel takes, such as fp64.
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def choose_kernels(name: Kernels) -> None:
    """Set the implementation for this process from now on: auto, triton or torch."""
    global _operations
    try:
        kernels.set_backend(name)
    except RuntimeError as error:
        raise UserError(f"model.kernels: {error}") from None
    _operations = kernels.reference if name == "torch" else kernels


def sizes(config: ModelConfig, num_sequences: int, seq_length: int) -> Sizes:
    """The sizes at which a network calls the operations on such micro-batches."""
    return Sizes(
        num_sequences=num_sequences,
        seq_length=seq_length,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        vocab_size=config.vocab_size,
        approximate=config.gelu_approximation,
        p=config.hidden_dropout_prob,
    )


def check_kernels(of: Sizes, dtype: torch.dtype, device: torch.device) -> list[Verdict] | None:
    """Each kernel compared with torch on this device, or what the user's cache says of that.

    None where `auto` takes no kernel: on a CPU, or without Triton. UserError when a kernel has left
    the device unusable.
    """
    if not backend.takes_kernels(device):
        return None
    try:
        return verify.remembered(of, dtype, device)
    except verify.DeviceFailed as error:
        raise UserError(f"model.kernels: {error}; set model.kernels torch") from None


def kernel_rates(of: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Rate]:
    """Bandwidth of each kernel on this device, forward and backward."""
    from clue_ds.kernels.verify import rates

    return rates.rates(of, dtype, device)


def refuse_kernels(operations: Iterable[str]) -> None:
    """From now on `auto` takes torch for exactly these operations, in this process."""
    kernels.refuse(operations)


def uses_kernels() -> bool:
    """Whether operations of this process may run as kernels of ours."""
    return _operations is kernels and kernels.available()


def _takes_kernel(x: Tensor, width: int, operation: str) -> bool:
    return _operations is kernels and kernels.use_triton(x, width, operation)


def takes_attention(x: Tensor) -> bool:
    """Whether attention on packed sequences `x` [..., D] runs as a kernel of ours."""
    return _operations is kernels and kernels.takes_attention(x)


def embedding_layer_norm(*tables_and_options: Any, **options: Any) -> Tensor:
    """`clue_ds.kernels.embedding_layer_norm`, or its reference."""
    return _operations.embedding_layer_norm(*tables_and_options, **options)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension: x [..., H], weight and bias [H] -> [..., H]."""
    return _operations.layer_norm(x, weight, bias, eps)


def dense_gelu(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """GELU(x W^T + bias): x [..., I], weight [O, I] -> [..., O]."""
    if _takes_kernel(x, weight.shape[0], "bias_gelu"):
        return _operations.bias_gelu(F.linear(x, weight), bias, approximate)
    return _operations.bias_gelu(F.linear(x, weight, bias), None, approximate)


def dense_dropout_add_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    p: float,
    eps: float,
    training: bool,
) -> Tensor:
    """LayerNorm(residual + dropout(x W^T + bias)): x [..., I], weight [H, I] -> [..., H]."""
    takes_kernel = _takes_kernel(x, weight.shape[0], "bias_dropout_add_layer_norm")
    gemm_bias, kernel_bias = (None, bias) if takes_kernel else (bias, None)
    return _operations.bias_dropout_add_layer_norm(
        F.linear(x, weight, gemm_bias), kernel_bias, residual, ln_weight, ln_bias, p, eps, training
    )


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, p: float
) -> Tensor:
    """torch's fused attention on a GPU, by a backend that drops with probability p exactly.

    cuDNN draws its masks in steps of 1/16; torch 2.11 gives it other probabilities, too, and 0.1 is
    then silently rounded. Where cuDNN is out, torch takes flash, then efficient attention. A head
    size like 26 is padded with zeros to a multiple of 8: with a mask, or in fp32, no fused kernel
    takes another, and torch would materialize the scores in fp32.
    """
    size = query.shape[-1]
    if padding := -size % 8:
        query, key, value = (F.pad(t, (0, padding)) for t in (query, key, value))
    with contextlib.nullcontext() if (16 * p).is_integer() else _without_cudnn():
        context = F.scaled_dot_product_attention(
            query, key, value, attn_mask=keep, dropout_p=p, scale=size**-0.5
        )
    return context[..., :size]


def most_likely(logits: Tensor) -> Tensor:
    """Where the largest of each row of fp32 logits [..., V] is: the first of several, or a NaN.

    torch's argmax has no vector code on a CPU: over a vocabulary it took 20 times as long as
    numpy's, and a twentieth of a step.
    """
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.as_tensor(logits.detach().numpy().argmax(-1))
    return logits.argmax(-1)


def _without_cudnn() -> contextlib.AbstractContextManager[None]:
    """Within: torch's attention takes no kernel of cuDNN."""
    if torch.compiler.is_compiling():
        return sdpa_kernel(WITHOUT_CUDNN)
    return _with_cudnn_off()


@contextlib.contextmanager
def _with_cudnn_off() -> Iterator[None]:
    # sdpa_kernel does the same in eager code, but it takes tens of microseconds.
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    p: float,
    training: bool,
    backend: Attention,
) -> Tensor:
    """dropout(softmax(q k^T / sqrt(D))) v -> [B, N, Q, D].

    query [B, N, Q, D], key and value [B, N, K, D]; `keep` is bool [B, 1, 1 or Q, K], True where a
    key may be attended to, and None keeps all keys. Each query must keep at least one key.
    """
    p = p if training else 0.0
    if backend == "sdpa" and query.device.type != "cpu":
        return _fused_attention(query, key, value, keep, p)
    if backend == "sdpa" and p == 0.0:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=keep)
    # SDPA with dropout on a CPU comes here too: torch would also materialize the scores, and it
    # draws dropout masks more slowly. The scale multiplies the query, which has a fifth of the
    # scores' elements or fewer.
    scaled = query * query.shape[-1] ** -0.5
    scores = torch.matmul(scaled, key.transpose(-1, -2))  # [B, N, Q, K]
    masked = None if keep is None else ~keep
    probabilities = _operations.masked_softmax(scores, masked, dropout_p=p, training=training)
    return torch.matmul(probabilities, value)
