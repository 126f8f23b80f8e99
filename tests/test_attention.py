"""Packed attention: lengths, head sizes, layouts, dropout masks, and what must not leak."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DTYPES, compare, guard_bands, guarded
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clue_ds import kernels
from clue_ds.kernels import reference

SEED = 77
NUM_HEADS = 2
# 26: RoBERTa-tiny's heads, padded to 32 in a tile and not aligned to 16 bytes; 64: BERT's; 6: less
# than the narrowest product.
HEAD_SIZES = (26, 64, 6)
# In two blocks of queries and three of keys; empty ones in between and, spare, at the end; a
# sequence of one token; no length a multiple of anything.
LENGTHS = (3, 0, 133, 1, 66, 0, 0)
# How many queries `attention_to` has in each: none for the long one, and two for an empty one.
NUM_QUERIES = (2, 2, 0, 1, 9, 0, 0)


def offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [S + 1]."""
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)


def packed(num_tokens: int, head_size: int, device: torch.device, parts: int = 3) -> Tensor:
    """fp32 [T, parts, N, D]."""
    return torch.randn(num_tokens, parts, NUM_HEADS, head_size, device=device)


def eager(
    query: Tensor, kv: Tensor, cu_queries: Tensor, cu_seqlens: Tensor, dropout_p: float, seed: int
) -> Tensor:
    """Attention in the inputs' dtype, a sequence after another: torch's flash without dropout.

    With dropout it is the chain of products and softmax that an eager network runs, because torch's
    flash can't be given our masks.
    """
    num_queries, num_heads, size = query.shape
    num_dropped, scale = reference.dropout_threshold(dropout_p)
    width = int(cu_seqlens.diff().max())
    mask = torch.Size((num_queries, num_heads, width))
    keep = reference.philox_keep_scores(mask, num_dropped, seed).to(query.device)
    found = []
    for i in range(len(cu_seqlens) - 1):
        rows = slice(int(cu_queries[i]), int(cu_queries[i + 1]))
        tokens = slice(int(cu_seqlens[i]), int(cu_seqlens[i + 1]))
        length = tokens.stop - tokens.start
        if rows.start == rows.stop or not length:
            found.append(query[rows] * 0.0)
            continue
        q, k, v = (t.transpose(0, 1)[None] for t in (query[rows], *kv[tokens].unbind(1)))
        if dropout_p == 0.0:
            # By name, because torch's math would upcast, and other backends round elsewhere.
            flash = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else nullcontext():
                out = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = (q @ k.transpose(-1, -2) * size**-0.5).softmax(-1)
            kept = keep[rows, :, :length].transpose(0, 1)
            out = torch.where(kept, weights * scale, 0.0) @ v
        found.append(out[0].transpose(0, 1))
    return torch.cat(found)


def eager_self(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float, seed: int
) -> Tensor:
    """`eager` with `attention`'s arguments."""
    return eager(qkv[:, 0], qkv[:, 1:], cu_seqlens, cu_seqlens, dropout_p, seed)


def eager_to(
    query: Tensor, kv: Tensor, cu_queries: Tensor, cu_seqlens: Tensor, max_queries: int,
    max_seqlen: int, dropout_p: float, seed: int,
) -> Tensor:  # fmt: skip
    """`eager` with `attention_to`'s arguments."""
    return eager(query, kv, cu_queries, cu_seqlens, dropout_p, seed)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_and_gradient_have_no_more_error_than_torchs(
    dtype: torch.dtype, dropout_p: float, kernel_device: torch.device
) -> None:
    # The interpreter takes seconds for each size, so there all of them are tested in fp32 only.
    interpreted = kernel_device.type == "cpu"
    sizes = HEAD_SIZES if dtype == torch.float32 or not interpreted else (64,)
    for size in sizes:
        options = {
            "cu_seqlens": offsets(LENGTHS, kernel_device),
            "max_seqlen": max(LENGTHS),
            "dropout_p": dropout_p,
            "seed": SEED,
        }

        def make(size: int = size) -> list[Tensor]:
            return [packed(sum(LENGTHS), size, kernel_device).to(dtype)]

        what = f"head size {size}"
        if dtype == torch.float32:
            agrees_in_fp32("attention", make(), options, what)
        else:
            compare(kernels.attention, reference.attention, make, options, what, own=eager_self)


def agrees_in_fp32(
    operation: str, inputs: list[Tensor], options: dict[str, object], what: str
) -> None:
    """Compare with fp64: absolutely, because the hardware's exp2 is not torch's on a GPU."""
    found: list[list[Tensor]] = []
    dy = torch.randn_like(inputs[0] if operation == "attention_to" else inputs[0][:, 0])
    for impl, dtype in ((kernels, torch.float32), (reference, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = getattr(impl, operation)(*leaves, **options)
        found.append([out, *torch.autograd.grad(out, leaves, dy.to(dtype))])
    for mine, exact in zip(*found, strict=True):
        torch.testing.assert_close(
            mine.double(), exact, rtol=1e-5, atol=1e-5, msg=lambda text: f"{what}: {text}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_of_their_own(dtype: torch.dtype, kernel_device: torch.device) -> None:
    """As in the last block, where only predicted positions need a result."""
    for dropout_p in (0.0, 0.1) if kernel_device.type == "cuda" else (0.1,):
        options = {
            "cu_queries": offsets(NUM_QUERIES, kernel_device),
            "cu_seqlens": offsets(LENGTHS, kernel_device),
            "max_queries": max(NUM_QUERIES),
            "max_seqlen": max(LENGTHS),
            "dropout_p": dropout_p,
            "seed": SEED,
        }

        def make() -> list[Tensor]:
            query = packed(sum(NUM_QUERIES), 26, kernel_device, 1)[:, 0]
            return [query.to(dtype), packed(sum(LENGTHS), 26, kernel_device, 2).to(dtype)]

        what = f"p={dropout_p}"
        if dtype == torch.float32:
            agrees_in_fp32("attention_to", make(), options, what)
        else:
            implementations = (kernels.attention_to, reference.attention_to)
            compare(*implementations, make, options, what, own=eager_to)


def uniform(values: Tensor) -> Tensor:
    """qkv [T, 3, N, D] of these values [T, N, D], with queries and keys of 0: equal weights."""
    return torch.stack((torch.zeros_like(values), torch.zeros_like(values), values), dim=1)


@pytest.mark.parametrize("blocks", [(64, 64), (32, 32)], ids=str)
def test_masks_are_the_references_bit_for_bit_whatever_the_blocks(
    blocks: tuple[int, int], kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clue_ds.kernels.functional import fused_attention

    tiles = fused_attention.Tiles(*[fused_attention.Blocks(*blocks, 4, 2)] * 3)
    monkeypatch.setattr(fused_attention, "tiles_of", lambda *_: tiles)
    lengths, size, p = (5, 0, 40), 64, 0.5
    cu_seqlens, num_tokens = offsets(lengths, kernel_device), sum(lengths)
    shape_of_mask = torch.Size((num_tokens, NUM_HEADS, max(lengths)))
    num_dropped, scale = reference.dropout_threshold(p)
    keep = reference.philox_keep_scores(shape_of_mask, num_dropped, SEED).to(kernel_device)
    position = torch.cat([torch.arange(n, device=kernel_device) for n in lengths])
    length = torch.cat([torch.full((n,), n, device=kernel_device) for n in lengths])
    # Column j of the values is 1 for the key at position j, so that column j of the result is the
    # probability of that key: 1 / length, scaled, or 0.
    values = F.one_hot(position, size).float()[:, None].expand(-1, NUM_HEADS, -1)
    qkv = uniform(values).requires_grad_()
    out = kernels.attention(qkv, cu_seqlens, max(lengths), p, seed=SEED)
    inside = (torch.arange(max(lengths), device=kernel_device) < length[:, None])[:, None]
    assert torch.equal(out[..., : max(lengths)] != 0, keep & inside)
    # dv of a key is the sum over queries of probability x dout: with column j of dout 1 for the
    # query at position j, it is the same mask with queries and keys exchanged.
    (grad,) = torch.autograd.grad(out, qkv, values)
    dropped = torch.where(keep & inside, scale / length[:, None, None], 0.0)
    first = 0
    for n in lengths:
        there = slice(first, first + n)
        expected = dropped[there, :, :n].permute(2, 1, 0)
        assert torch.equal(grad[there, 2, :, :n] != 0, expected != 0)
        torch.testing.assert_close(grad[there, 2, :, :n], expected)
        first += n
    twin = reference.attention(qkv, cu_seqlens, max(lengths), p, seed=SEED)
    torch.testing.assert_close(grad, torch.autograd.grad(twin, qkv, values)[0])


def test_everything_dropped_and_no_training(kernel_device: torch.device) -> None:
    cu_seqlens = offsets((5,), kernel_device)
    qkv = packed(5, 26, kernel_device).requires_grad_()
    out = kernels.attention(qkv, cu_seqlens, 5, 1.0, seed=SEED)
    (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert torch.count_nonzero(out) == 0 and torch.count_nonzero(grad) == 0
    quiet = kernels.attention(qkv, cu_seqlens, 5, 0.5, training=False)
    assert torch.equal(quiet, kernels.attention(qkv, cu_seqlens, 5))


def layouts(num_tokens: int, device: torch.device) -> dict[str, Tensor]:
    """The same kind of [T, 3, N, D] tensor in memory in several ways."""
    wide = torch.randn(num_tokens, 3 * NUM_HEADS * 26 + 4, device=device)
    return {
        "padded rows, as inductor lays them out": wide[:, :-4].unflatten(1, (3, NUM_HEADS, 26)),
        "a head at a time": torch.randn(3, NUM_HEADS, num_tokens, 26, device=device).permute(
            2, 0, 1, 3
        ),
        "heads outside of q, k and v": torch.randn(
            num_tokens, NUM_HEADS, 3, 26, device=device
        ).transpose(1, 2),
        "every second number": torch.randn(num_tokens, 3, NUM_HEADS, 52, device=device)[..., ::2],
    }


def test_strides_change_nothing(kernel_device: torch.device) -> None:
    torch.manual_seed(0)
    lengths = (7, 4)
    cu_seqlens, num_tokens = offsets(lengths, kernel_device), sum(lengths)
    dy = torch.randn(NUM_HEADS, num_tokens, 26, device=kernel_device).transpose(0, 1)
    for name, qkv in layouts(num_tokens, kernel_device).items():
        found = []
        for leaf in (qkv.detach().requires_grad_(), qkv.detach().contiguous().requires_grad_()):
            out = kernels.attention(leaf, cu_seqlens, max(lengths), 0.1, seed=SEED)
            found.append((out, *torch.autograd.grad(out, leaf, dy)))
        for mine, other in zip(*found, strict=True):
            assert torch.equal(mine, other), name
        assert found[0][1].is_contiguous()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_sequence_has_the_same_bits_every_time_and_in_any_company(
    kernel_device: torch.device,
) -> None:
    """No atomics, and nothing of other sequences: with NaN all round, nothing changes."""
    torch.manual_seed(0)
    lengths = (9, 70)
    qkv, dy = packed(79, 26, kernel_device), packed(79, 26, kernel_device, 1)[:, 0]

    def run(x: Tensor, dout: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        out = kernels.attention(leaf, cu_seqlens, 70)
        return out.detach(), torch.autograd.grad(out, leaf, dout)[0]

    out, grad = run(qkv, dy, offsets(lengths, kernel_device))
    again = run(qkv, dy, offsets((*lengths, 0, 0, 0), kernel_device))
    assert torch.equal(out, again[0]) and torch.equal(grad, again[1])
    nan = torch.full_like(qkv[:3], float("nan"))
    surrounded = torch.cat((nan, qkv, nan))
    dout = torch.cat((nan[:, 0], dy, nan[:, 0]))
    third = run(surrounded, dout, offsets((3, *lengths, 3), kernel_device))
    assert torch.equal(third[0][3:-3], out) and torch.equal(third[1][3:-3], grad)
    assert third[0][:3].isnan().all() and third[1][-3:].isnan().all()


def test_large_scores_neither_overflow_nor_vanish(kernel_device: torch.device) -> None:
    qkv = torch.zeros(3, 3, 1, 26, device=kernel_device)
    qkv[:, 0, :, 0] = 1e4
    qkv[:, 1, 0, 0] = torch.tensor([1.0, -1.0, 0.5])
    qkv[:, 2, 0, 0] = torch.tensor([1.0, 2.0, 3.0])
    out = kernels.attention(qkv, offsets((3,), kernel_device), 3)
    torch.testing.assert_close(out[:, 0, 0], torch.ones_like(out[:, 0, 0]))


def test_nothing_to_do(kernel_device: torch.device) -> None:
    """No tokens; keys without queries get zeros, and queries without keys are zeros."""
    none, two = offsets((0, 0), kernel_device), offsets((2, 0), kernel_device)
    empty = packed(0, 26, kernel_device).requires_grad_()
    out = kernels.attention(empty, none, 0)
    assert out.shape == (0, NUM_HEADS, 26)
    assert torch.autograd.grad(out.sum(), empty)[0].shape == empty.shape
    for impl in (kernels, reference):
        query = packed(2, 26, kernel_device, 1)[:, 0].requires_grad_()
        kv = packed(2, 26, kernel_device, 2).requires_grad_()
        for q, x, starts in ((query[:0], kv, (none, two)), (query, kv[:0], (two, none))):
            out = impl.attention_to(q, x, *starts, 2, 2)
            grads = torch.autograd.grad(out.sum(), (query, kv), materialize_grads=True)
            assert all(torch.count_nonzero(t) == 0 for t in (out, *grads))


def test_touches_nothing_outside_its_buffers(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    cu_queries = offsets((1, 0, 2), kernel_device)
    cu_seqlens = offsets((5, 1, 2), kernel_device)
    qkv = guarded(packed(8, 26, kernel_device)).requires_grad_()
    query = guarded(packed(3, 26, kernel_device, 1)[:, 0]).requires_grad_()
    kv = guarded(packed(8, 26, kernel_device, 2)).requires_grad_()
    with guard_bands(monkeypatch):
        out = kernels.attention(qkv, cu_seqlens, 5, 0.1, seed=SEED)
        (grad,) = torch.autograd.grad(out, qkv, guarded(torch.randn_like(out)))
        few = kernels.attention_to(query, kv, cu_queries, cu_seqlens, 2, 5, 0.1, seed=SEED)
        grads = torch.autograd.grad(few, (query, kv), guarded(torch.randn_like(few)))
    assert all(t.isfinite().all() for t in (out, grad, few, *grads))


def test_other_head_sizes_take_the_reference(kernel_device: torch.device) -> None:
    cu_seqlens = offsets((4,), kernel_device)
    for size in (7, 80):
        qkv = packed(4, size, kernel_device)
        ours = kernels.attention(qkv, cu_seqlens, 4, 0.5, seed=SEED)
        assert torch.equal(ours, reference.attention(qkv, cu_seqlens, 4, 0.5, seed=SEED))


def test_reference_equals_attention_of_each_sequence_by_itself() -> None:
    torch.manual_seed(0)
    lengths = (5, 0, 9, 0)
    qkv = packed(14, 26, torch.device("cpu")).double()
    cu_seqlens = offsets(lengths, torch.device("cpu"))
    expected = eager_self(qkv, cu_seqlens, 9, 0.0, SEED)
    torch.testing.assert_close(reference.attention(qkv, cu_seqlens, 9), expected)
    expected = eager_self(qkv, cu_seqlens, 9, 0.3, SEED)
    torch.testing.assert_close(reference.attention(qkv, cu_seqlens, 9, 0.3, seed=SEED), expected)
