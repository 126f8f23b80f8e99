"""The checks that tests/gpu makes of the kernels at sizes that need a GPU.

They are in a module of their own so that tests/test_device_checks.py can run the same code at small
sizes in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clue_ds import kernels
from clue_ds.kernels import reference
from clue_ds.model import BertForPreTraining, ops
from clue_ds.presets import get

EPS = 1e-12
SEED = 0x1234_5678_9ABC
NUM_WORDS = 8
TAIL = slice(-3, None)  # the rows with the largest offsets


def _embedded(impl: Any, words: Tensor, weight: Tensor, bias: Tensor, rows: Tensor) -> Tensor:
    ids = (rows % NUM_WORDS)[:, None]
    return impl.embedding_layer_norm(
        ids, None, words, words[:1], words[:2], weight, bias, 0.0, EPS, True
    )[:, 0]


# (kernels or reference, x [M, H] or a table [NUM_WORDS, H], weight, bias, row numbers) -> [M, H]
OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "layer_norm": lambda impl, x, w, b, rows: impl.layer_norm(x, w, b, EPS),
    "bias_dropout_add_layer_norm": lambda impl, x, w, b, rows: impl.bias_dropout_add_layer_norm(
        x, b, x, w, b, 0.0, EPS, True
    ),
    "masked_softmax": lambda impl, x, w, b, rows: impl.masked_softmax(x[None, None])[0, 0],
    "bias_gelu": lambda impl, x, w, b, rows: impl.bias_gelu(x, b),
    "embedding_layer_norm": _embedded,
}


def _gradients(out: Tensor, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(out, leaves, dy, allow_unused=True)
    return [grad for grad in found if grad is not None]


def check_all_rows(op: str, num_rows: int, width: int, device: torch.device) -> None:
    """Compare result and gradients of every row with the reference, in fp32."""
    torch.manual_seed(0)
    x = torch.randn(NUM_WORDS if op == "embedding_layer_norm" else num_rows, width, device=device)
    leaves = [t.requires_grad_() for t in (x, *torch.randn(2, width, device=device).clone())]
    rows = torch.arange(num_rows, device=device)
    dy = torch.randn(num_rows, width, device=device)
    ours, theirs = (OPERATIONS[op](impl, *leaves, rows) for impl in (kernels, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    pairs = zip(_gradients(ours, leaves, dy), _gradients(theirs, leaves, dy), strict=True)
    for mine, other in pairs:
        # The error of a sum over all rows grows with the root of their number.
        is_sum = mine.shape != ours.shape
        atol = 1e-4 * (num_rows**0.5 if is_sum else 1.0)
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=atol)


def check_last_rows(op: str, num_rows: int, width: int, device: torch.device) -> None:
    """Compare result and gradients of the last three rows; the others are zeros."""
    torch.manual_seed(0)
    dtype = torch.bfloat16
    if op == "embedding_layer_norm":
        x = torch.randn(NUM_WORDS, width, device=device).to(dtype)
    else:
        x = torch.zeros(num_rows, width, device=device, dtype=dtype)
        x[TAIL] = torch.randn(3, width, device=device).to(dtype)
    parameters = [t.to(dtype).requires_grad_() for t in torch.randn(2, width, device=device)]
    rows = torch.arange(num_rows, device=device)
    dy = torch.zeros(num_rows, width, device=device, dtype=dtype)
    dy[TAIL] = torch.randn(3, width, device=device).to(dtype)
    near = x if op == "embedding_layer_norm" else x[TAIL]
    small = [near.detach().clone().requires_grad_(), *parameters]
    expected = OPERATIONS[op](reference, *small, rows[TAIL])
    wanted = _gradients(expected, small, dy[TAIL])
    leaves = [x.requires_grad_(), *parameters]
    out = OPERATIONS[op](kernels, *leaves, rows)
    torch.testing.assert_close(out[TAIL], expected, rtol=2**-6, atol=2**-6)
    found = _gradients(out, leaves, dy)
    for mine, other in zip(found, wanted, strict=True):
        mine = mine[TAIL] if mine.shape[0] == num_rows else mine
        torch.testing.assert_close(mine, other, rtol=2**-5, atol=2**-5)


def check_last_masks(num_rows: int, width: int, device: torch.device) -> None:
    """The dropout mask of the last rows has the right rate, differs between rows, and is repeated.

    Backward must draw the same mask as forward.
    """
    x = torch.zeros(num_rows, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.ones(width, device=device), torch.zeros(width, device=device)
    _, total, mask = kernels.bias_dropout_add_layer_norm(
        x, None, None, weight, bias, 0.5, EPS, True, prenorm=True, seed=SEED, return_mask=True
    )
    dtotal = torch.zeros_like(total)
    dtotal[TAIL] = 1.0
    (dx,) = torch.autograd.grad(total, x, dtotal)
    last = mask[TAIL]
    assert torch.equal(dx[TAIL] != 0, last)
    assert 0.4 < last.float().mean().item() < 0.6 and not torch.equal(last[0], last[1])


def check_last_sequence(num_tokens: int, num_heads: int, length: int, device: torch.device) -> None:
    """Compare attention's result and gradient in the last sequence; the others are zeros."""
    torch.manual_seed(0)
    last = slice(num_tokens - length, num_tokens)
    qkv = torch.zeros(num_tokens, 3, num_heads, 64, device=device, dtype=torch.bfloat16)
    qkv[last] = torch.randn(length, 3, num_heads, 64, device=device).bfloat16()
    starts = torch.arange(0, num_tokens + 1, length, device=device, dtype=torch.int32)
    small = qkv[last].clone().requires_grad_()
    expected = reference.attention(small, starts[:2], length)
    dy = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, small, dy)
    out = kernels.attention(qkv.requires_grad_(), starts, length)
    torch.testing.assert_close(out[last], expected, rtol=2**-6, atol=2**-6)
    dout = torch.zeros_like(out)
    dout[last] = dy
    (found,) = torch.autograd.grad(out, qkv, dout)
    torch.testing.assert_close(found[last], wanted, rtol=2**-5, atol=2**-5)


def losses_of(
    backend: str, dropout: float, device: torch.device, num_steps: int, **sizes: int
) -> Tensor:
    """The losses of `num_steps` of MLM on one random batch, which a model can memorise."""
    ops.choose_kernels(backend)
    torch.manual_seed(0)
    config = dataclasses.replace(
        get("roberta_tiny_clue"), vocab_size=256,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0, **sizes,
    )  # fmt: skip
    model = BertForPreTraining(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(5, 256, (8, 32), generator=generator).to(device)
    positions = torch.arange(0, 32, 6, device=device).expand(8, -1)
    losses = []
    for _ in range(num_steps):
        masked = text.scatter(1, positions, 4)
        loss = model(
            masked, masked_positions=positions, masked_labels=text.gather(1, positions)
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()
