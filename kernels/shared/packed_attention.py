"""The kernels of packed attention, which `attention` and `attention_to` launch (attention.py).

T: tokens   R: queries   S: sequences   N: heads   D: head size   M, N in tiles: queries, keys

A program takes one block of queries (forward, dq) or of keys (dk and dv) of one head of one
sequence, and goes through the blocks of the other side. Two tensors `cu_queries` and `cu_keys`,
int32 [S + 1], say where each sequence begins. Strides are between tokens and between heads; those
of v are those of k.

Exponents are of base 2, as the hardware's are: scores are multiplied by log2(e) / sqrt(D) at once,
and lse is the base-2 logarithm of the sum of exponentials.

DOT is the dtype in which factors enter a product. On a GPU it is that of the activations, for the
tensor cores; in the interpreter, whose products of bf16 are wrong, it is fp32. ACC is the dtype of
sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import tiles

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def place(num_blocks: tl.tensor, N: tl.constexpr) -> tl.tuple:
    """(block, head, sequence) of this program.

    Blocks come first, then heads: programs that run at the same time then share the cache lines in
    which the heads of a token lie, and empty sequences at the end come last.
    """
    program = tl.program_id(0)
    return program % num_blocks, program // num_blocks % N, program // num_blocks // N


@triton.jit
def load_tile(
    ptr: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
) -> tl.tensor:
    """`count` rows of a head from row `first`, which is 64-bit, as [ROWS, BLOCK_D], 0 outside."""
    rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (rows < count) & (cols < D)
    return tl.load(ptr + first * STRIDE + (rows * STRIDE + cols), mask=inside, other=0.0).to(DOT)


@triton.jit
def store_tile(
    ptr: tl.tensor,
    tile: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Write [ROWS, BLOCK_D] to the places that `load_tile` reads."""
    rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (rows < count) & (cols < D)
    tl.store(ptr + first * STRIDE + (rows * STRIDE + cols), tile, mask=inside)


@triton.jit
def product(a: tl.tensor, b: tl.tensor, ACC: tl.constexpr) -> tl.tensor:
    """a @ b in ACC; factors of fp32 keep all their digits, and none of TF32's rounding."""
    return tl.dot(a, b, input_precision="ieee", out_dtype=ACC)


@triton.jit
def forward_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    cu_queries_ptr: tl.tensor,
    cu_keys_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    num_blocks: tl.tensor,
    num_rows: tl.tensor,
    N: tl.constexpr,
    D: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    Q_HEAD: tl.constexpr,
    K_STRIDE: tl.constexpr,
    K_HEAD: tl.constexpr,
    SCALE: tl.constexpr,
    NUM_DROPPED: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    block, head, sequence = place(num_blocks, N)
    begin = block * BLOCK_M
    first_query = tl.load(cu_queries_ptr + sequence)
    count = tl.load(cu_queries_ptr + sequence + 1) - first_query - begin
    if count <= 0:
        return
    first_key = tl.load(cu_keys_ptr + sequence).to(tl.int64)
    num_keys = tl.load(cu_keys_ptr + sequence + 1) - first_key.to(tl.int32)
    first = first_query.to(tl.int64) + begin
    tokens = first + tl.arange(0, BLOCK_M)
    q = load_tile(q_ptr + head * Q_HEAD, first, count, Q_STRIDE, D, BLOCK_M, BLOCK_D, DOT)
    largest = tl.full((BLOCK_M,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    out = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    if NUM_DROPPED > 0:
        seed = tl.load(seed_ptr)
    for start in tl.range(0, num_keys, BLOCK_N, num_stages=STAGES):
        at, rest = first_key + start, num_keys - start
        k = load_tile(k_ptr + head * K_HEAD, at, rest, K_STRIDE, D, BLOCK_N, BLOCK_D, DOT)
        v = load_tile(v_ptr + head * K_HEAD, at, rest, K_STRIDE, D, BLOCK_N, BLOCK_D, DOT)
        scores = product(q, tl.trans(k), ACC)
        scores = tl.where(tl.arange(0, BLOCK_N)[None, :] < rest, scores, float("-inf"))
        # In units of exponents; multiplication and subtraction below are one instruction.
        higher = tl.maximum(largest, tl.max(scores, axis=1) * (SCALE * LOG2_E))
        weights = tl.exp2(scores * (SCALE * LOG2_E) - higher[:, None])
        shrink = tl.exp2(largest - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        if NUM_DROPPED > 0:
            keep = tiles.keep_scores(seed, tokens * N + head, start, NUM_DROPPED, BLOCK_M, BLOCK_N)
            weights = tl.where(keep, weights, 0.0)
        out = out * shrink[:, None] + product(weights.to(v_ptr.dtype.element_ty).to(DOT), v, ACC)
        largest = higher
    # A sequence without keys has a sum of 0, and 0 / 0 would be NaN.
    total = tl.where(total == 0.0, 1.0, total)
    out *= (KEEP_SCALE / total)[:, None]
    store_tile(out_ptr + head * D, out, first, count, N * D, D, BLOCK_M, BLOCK_D)
    inside = tl.arange(0, BLOCK_M) < count
    row = head.to(tl.int64) * num_rows
    tl.store(lse_ptr + row + tokens, largest + tl.log2(total), mask=inside)


@triton.jit
def probabilities(
    q: tl.tensor,
    k: tl.tensor,
    lse: tl.tensor,
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
) -> tl.tensor:
    """[M, N], as they were before dropout; those of keys outside are not zero."""
    return tl.exp2(product(q, tl.trans(k), ACC) * (SCALE * LOG2_E) - lse[:, None])


@triton.jit
def dq_kernel(
    dout_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    cu_queries_ptr: tl.tensor,
    cu_keys_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    dq_ptr: tl.tensor,
    num_blocks: tl.tensor,
    num_rows: tl.tensor,
    N: tl.constexpr,
    D: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    Q_HEAD: tl.constexpr,
    K_STRIDE: tl.constexpr,
    K_HEAD: tl.constexpr,
    DQ_STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    NUM_DROPPED: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    """Writes dq, and for `dkv_kernel` delta, the sum of dout * out of each query and head."""
    block, head, sequence = place(num_blocks, N)
    begin = block * BLOCK_M
    first_query = tl.load(cu_queries_ptr + sequence)
    count = tl.load(cu_queries_ptr + sequence + 1) - first_query - begin
    if count <= 0:
        return
    first_key = tl.load(cu_keys_ptr + sequence).to(tl.int64)
    num_keys = tl.load(cu_keys_ptr + sequence + 1) - first_key.to(tl.int32)
    first = first_query.to(tl.int64) + begin
    tokens = first + tl.arange(0, BLOCK_M)
    inside = tl.arange(0, BLOCK_M) < count
    row = head.to(tl.int64) * num_rows
    q = load_tile(q_ptr + head * Q_HEAD, first, count, Q_STRIDE, D, BLOCK_M, BLOCK_D, DOT)
    dout = load_tile(dout_ptr + head * D, first, count, N * D, D, BLOCK_M, BLOCK_D, DOT)
    out = load_tile(out_ptr + head * D, first, count, N * D, D, BLOCK_M, BLOCK_D, ACC)
    lse = tl.load(lse_ptr + row + tokens, mask=inside, other=0.0)
    delta = tl.sum(dout.to(ACC) * out, axis=1)
    tl.store(delta_ptr + row + tokens, delta, mask=inside)
    dq = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    if NUM_DROPPED > 0:
        seed = tl.load(seed_ptr)
    for start in tl.range(0, num_keys, BLOCK_N, num_stages=STAGES):
        at, rest = first_key + start, num_keys - start
        k = load_tile(k_ptr + head * K_HEAD, at, rest, K_STRIDE, D, BLOCK_N, BLOCK_D, DOT)
        v = load_tile(v_ptr + head * K_HEAD, at, rest, K_STRIDE, D, BLOCK_N, BLOCK_D, DOT)
        weights = probabilities(q, k, lse, SCALE, ACC)
        dweights = product(dout, tl.trans(v), ACC)
        if NUM_DROPPED > 0:
            keep = tiles.keep_scores(seed, tokens * N + head, start, NUM_DROPPED, BLOCK_M, BLOCK_N)
            dweights = tl.where(keep, dweights, 0.0)
        dscores = weights * (dweights * KEEP_SCALE - delta[:, None])
        dscores = tl.where(tl.arange(0, BLOCK_N)[None, :] < rest, dscores, 0.0)
        dq += product(dscores.to(k_ptr.dtype.element_ty).to(DOT), k, ACC)
    store_tile(dq_ptr + head * D, dq * SCALE, first, count, DQ_STRIDE, D, BLOCK_M, BLOCK_D)


@triton.jit
def dkv_kernel(
    dout_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    cu_queries_ptr: tl.tensor,
    cu_keys_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    dk_ptr: tl.tensor,
    dv_ptr: tl.tensor,
    num_blocks: tl.tensor,
    num_rows: tl.tensor,
    N: tl.constexpr,
    D: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    Q_HEAD: tl.constexpr,
    K_STRIDE: tl.constexpr,
    K_HEAD: tl.constexpr,
    DK_STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    NUM_DROPPED: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    block, head, sequence = place(num_blocks, N)
    begin = block * BLOCK_N
    first_key = tl.load(cu_keys_ptr + sequence)
    count = tl.load(cu_keys_ptr + sequence + 1) - first_key - begin
    if count <= 0:
        return
    first_query = tl.load(cu_queries_ptr + sequence).to(tl.int64)
    num_queries = tl.load(cu_queries_ptr + sequence + 1) - first_query.to(tl.int32)
    first = first_key.to(tl.int64) + begin
    row = head.to(tl.int64) * num_rows
    k = load_tile(k_ptr + head * K_HEAD, first, count, K_STRIDE, D, BLOCK_N, BLOCK_D, DOT)
    v = load_tile(v_ptr + head * K_HEAD, first, count, K_STRIDE, D, BLOCK_N, BLOCK_D, DOT)
    dk = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dv = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    if NUM_DROPPED > 0:
        seed = tl.load(seed_ptr)
    for start in tl.range(0, num_queries, BLOCK_M, num_stages=STAGES):
        at, rest = first_query + start, num_queries - start
        tokens = at + tl.arange(0, BLOCK_M)
        inside = tl.arange(0, BLOCK_M) < rest
        q = load_tile(q_ptr + head * Q_HEAD, at, rest, Q_STRIDE, D, BLOCK_M, BLOCK_D, DOT)
        dout = load_tile(dout_ptr + head * D, at, rest, N * D, D, BLOCK_M, BLOCK_D, DOT)
        # Queries outside have q, dout, lse and delta of 0: probabilities of 1 and gradients of 0.
        # Keys outside have any values, in rows of dk and dv that are not stored.
        lse = tl.load(lse_ptr + row + tokens, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + row + tokens, mask=inside, other=0.0)
        weights = probabilities(q, k, lse, SCALE, ACC)
        dweights = product(dout, tl.trans(v), ACC)
        kept = weights
        if NUM_DROPPED > 0:
            keep = tiles.keep_scores(seed, tokens * N + head, begin, NUM_DROPPED, BLOCK_M, BLOCK_N)
            kept = tl.where(keep, weights, 0.0)
            dweights = tl.where(keep, dweights, 0.0)
        dv += product(tl.trans(kept.to(v_ptr.dtype.element_ty).to(DOT)), dout, ACC)
        dscores = weights * (dweights * KEEP_SCALE - delta[:, None])
        dk += product(tl.trans(dscores.to(k_ptr.dtype.element_ty).to(DOT)), q, ACC)
    store_tile(dk_ptr + head * D, dk * SCALE, first, count, DK_STRIDE, D, BLOCK_N, BLOCK_D)
    store_tile(dv_ptr + head * D, dv * KEEP_SCALE, first, count, DK_STRIDE, D, BLOCK_N, BLOCK_D)
