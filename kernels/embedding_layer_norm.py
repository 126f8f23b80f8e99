"""dropout(LayerNorm(word + position + token type)) from three tables: kernel, launch, gradient.

M: rows, sequences x positions   H: hidden size   V: vocabulary   T: token types

The forward pass moves 4 bytes per element in bf16: it reads a row of the word table and writes y;
the two small tables stay in cache. The chain of torch operations moves 26. The backward pass
gathers the sums again instead of keeping them, and writes the gradient of the sum [M, H]; torch's
own `embedding_dense_backward` adds that into the tables. It sorts the ids, so the result is
deterministic.

An id outside its table makes its row NaN. That shows in the loss; reading memory beyond the table
would go unnoticed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .shared import launching, normalization, registered, tiles


@triton.jit
def gather(
    ids_ptr: tl.tensor,
    types_ptr: tl.tensor,
    word_ptr: tl.tensor,
    position_ptr: tl.tensor,
    token_type_ptr: tl.tensor,
    first: tl.tensor,
    num_rows: tl.tensor,
    V: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    ACC: tl.constexpr,
) -> tl.tuple:
    """(sums of the three tables' rows in segments [ROWS, columns], bool [ROWS]: are the ids valid).

    Sums are in ACC, 0 in columns outside. Rows outside, and rows of invalid ids, read the first
    rows of the word and token type tables.
    """
    rows = first + tl.arange(0, ROWS)
    ids = tl.load(ids_ptr + rows, mask=rows < num_rows, other=0).to(tl.int64)
    known = ids.to(tl.uint64) < V  # a negative id is a large one
    types = tl.zeros((ROWS,), tl.int64)
    if types_ptr is not None:
        types = tl.load(types_ptr + rows, mask=rows < num_rows, other=0).to(tl.int64)
        known &= types.to(tl.uint64) < T
    # 32 bits where they are enough: one 64-bit remainder for the tile instead of one per row.
    positions = ((first % S).to(tl.int32) + tl.arange(0, ROWS)) % S
    words = tl.where(known, ids.to(tl.int32), 0)
    types = tl.where(known, types.to(tl.int32), 0)
    # Ids were made safe above, so that the loads below need no mask except that of the columns,
    # which is known at compile time.
    word_rows = word_ptr + words.to(tl.int64)[:, None] * H
    position_rows = position_ptr + positions[:, None] * H
    type_rows = token_type_ptr + types[:, None] * H
    segments = ()
    for i in tl.static_range(2 if TAIL else 1):
        cols = tiles.columns(i, BLOCK, TAIL)
        word = tl.load(word_rows + cols, mask=cols < H, other=0.0).to(ACC)
        position = tl.load(position_rows + cols, mask=cols < H, other=0.0).to(ACC)
        token_type = tl.load(type_rows + cols, mask=cols < H, other=0.0).to(ACC)
        segments += (word + position + token_type,)
    return segments, known


@triton.jit
def forward_kernel(
    ids_ptr: tl.tensor,
    types_ptr: tl.tensor,
    word_ptr: tl.tensor,
    position_ptr: tl.tensor,
    token_type_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    y_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    num_rows: tl.tensor,
    EPS: tl.constexpr,
    NUM_DROPPED: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    V: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * ROWS
    z, known = gather(
        ids_ptr, types_ptr, word_ptr, position_ptr, token_type_ptr, first, num_rows,
        V, T, S, H, ROWS, BLOCK, TAIL, ACC,
    )  # fmt: skip
    # This NaN reaches every element of the row and, through the stored statistics, its gradients.
    eps = tl.where(known, EPS, float("nan")).to(ACC)
    normalization.store(
        z, weight_ptr, bias_ptr, seed_ptr, y_ptr, statistics_ptr, first, num_rows,
        eps, NUM_DROPPED, KEEP_SCALE, H, ROWS, BLOCK, TAIL, ACC,
    )  # fmt: skip


@triton.jit
def backward_kernel(
    dy_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    types_ptr: tl.tensor,
    word_ptr: tl.tensor,
    position_ptr: tl.tensor,
    token_type_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    dsum_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    num_rows: tl.tensor,
    NUM_DROPPED: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    V: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    seed = 0
    if NUM_DROPPED > 0:
        seed = tl.load(seed_ptr)
    weight = tiles.load_columns(weight_ptr, H, BLOCK, TAIL, ACC)
    dweight = tiles.no_sums(ROWS, BLOCK, TAIL, ACC)
    dbias = tiles.no_sums(ROWS, BLOCK, TAIL, ACC)
    # A persistent loop, as in layer_norm.py, but without stages: the addresses come from a load (of
    # the ids), and Triton's pipeliner doesn't prefetch through one.
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        first = tl.cast(tile, tl.int64) * ROWS
        z, _ = gather(
            ids_ptr, types_ptr, word_ptr, position_ptr, token_type_ptr, first, num_rows,
            V, T, S, H, ROWS, BLOCK, TAIL, ACC,
        )  # fmt: skip
        dy = tiles.load_rows(dy_ptr, first, num_rows, H, ROWS, BLOCK, TAIL, ACC)
        if NUM_DROPPED > 0:
            dy = tiles.dropout(dy, seed, first, NUM_DROPPED, KEEP_SCALE, ROWS, BLOCK, TAIL)
        dz, dweight, dbias = normalization.gradient(
            dy, z, weight, statistics_ptr, first, num_rows, dweight, dbias, H, ROWS
        )
        tiles.store_rows(dsum_ptr, dz, first, num_rows, H, ROWS, BLOCK, TAIL)
    tiles.store_sums(partials_ptr, 0, dweight, H, BLOCK, TAIL)
    tiles.store_sums(partials_ptr, 1, dbias, H, BLOCK, TAIL)


_forward = launching.Launcher(forward_kernel)
_backward = launching.Launcher(backward_kernel)


def forward(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    p: float,
    eps: float,
    padding_idx: int,
) -> tuple[Tensor, Tensor]:
    """ids [..., S] -> (y [..., S, H] like word, statistics [2, M])."""
    y, statistics = _outputs(
        input_ids, token_type_ids, word, position, token_type, weight, bias, seed, p, eps,
        padding_idx,
    )  # fmt: skip
    num_rows, width = input_ids.numel(), word.shape[1]
    num_dropped, scale = reference.dropout_threshold(p)
    if num_rows:
        tile = tiles.for_device(tiles.row_tile(width), word, num_rows)
        types = None if token_type_ids is None else token_type_ids.contiguous()
        sizes = (word.shape[0], token_type.shape[0], input_ids.shape[-1])
        _forward(
            (tiles.cdiv(num_rows, tile.rows),),
            (
                input_ids.contiguous(), types, word, position, token_type, weight, bias, seed, y,
                statistics,
            ),
            (num_rows,),
            (
                eps, num_dropped, scale, *sizes, width, *tile.constants,
                tiles.accumulator(word.dtype),
            ),
            tile.num_warps,
        )  # fmt: skip
    return y, statistics


def _outputs(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    p: float,
    eps: float,
    padding_idx: int,
) -> tuple[Tensor, Tensor]:
    shape = (*input_ids.shape, word.shape[1])
    statistics = tiles.statistics_dtype(word.dtype)
    return (
        torch.empty(shape, dtype=word.dtype, device=word.device),
        torch.empty((2, input_ids.numel()), dtype=statistics, device=word.device),
    )


def backward(
    dy: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    statistics: Tensor,
    p: float,
    padding_idx: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dword, dposition, dtoken_type, parameter gradients [2, H]: dweight and dbias)."""
    num_rows, width = input_ids.numel(), word.shape[1]
    seq_length = input_ids.shape[-1]
    parameters = statistics.new_zeros((2, width))
    dsum = torch.empty((num_rows, width), dtype=word.dtype, device=word.device)
    types = token_type_ids
    if num_rows:
        num_dropped, scale = reference.dropout_threshold(p)
        tile = tiles.for_device(tiles.backward_tile(width), word, num_rows)
        num_tiles = tiles.cdiv(num_rows, tile.rows)
        num_programs = tiles.num_persistent(word, num_tiles, tile)
        partials = parameters.new_empty((2, num_programs, width))
        _backward(
            (num_programs,),
            (
                dy.contiguous(), input_ids.contiguous(),
                None if types is None else types.contiguous(), word, position, token_type, weight,
                seed, statistics, dsum, partials,
            ),
            (num_rows,),
            (
                num_dropped, scale, word.shape[0], token_type.shape[0], seq_length, width,
                *tile.constants, tiles.accumulator(word.dtype),
            ),
            tile.num_warps,
        )  # fmt: skip
        torch.sum(partials, dim=1, out=parameters)
    scatter = torch.ops.aten.embedding_dense_backward
    dword = scatter(dsum, input_ids.flatten(), word.shape[0], padding_idx, False)
    by_position = dsum.view(num_rows // max(seq_length, 1), seq_length, width)
    # Not in 16 bits: it is summed once more below, and would be rounded twice.
    by_position = by_position.sum(0, dtype=statistics.dtype)
    dposition = torch.zeros_like(position, memory_format=torch.contiguous_format)
    dposition[:seq_length] = by_position
    if types is None:
        dtoken_type = torch.zeros_like(token_type, memory_format=torch.contiguous_format)
        dtoken_type[0] = by_position.sum(0)
    else:
        dtoken_type = scatter(dsum, types.flatten(), token_type.shape[0], -1, False)
    return dword, dposition, dtoken_type.to(token_type.dtype), parameters


def _gradients(
    dy: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    statistics: Tensor,
    p: float,
    padding_idx: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dword, dposition, dtoken_type = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (word, position, token_type)
    )
    return dword, dposition, dtoken_type, statistics.new_empty((2, word.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ids, types, word, position, token_type, weight, bias, seed, p, _, padding_idx = inputs
    ctx.save_for_backward(ids, types, word, position, token_type, weight, seed, output[1])
    ctx.options = (p, padding_idx)
    ctx.dtypes = (weight.dtype, bias.dtype)


def _formula(launch: registered.Launch) -> Any:
    def differentiate(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        if dy is None:
            return (None,) * 11
        tables = launch(dy, *ctx.saved_tensors, *ctx.options)
        parameters = registered.parameter_gradients(tables[3], ctx.dtypes)
        return None, None, *tables[:3], *parameters, None, None, None, None

    return differentiate


_call = registered.define(
    "embedding_layer_norm", forward, _outputs, _setup_context, backward, _gradients, _formula
)


def embedding_layer_norm(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    p: float,
    eps: float,
    training: bool,
    padding_idx: int | None = None,
    seed: Tensor | int | None = None,
) -> Tensor:
    """See `clue_ds.kernels.embedding_layer_norm`."""
    p = p if training else 0.0
    seeded = registered.fresh_seed(seed, word.device) if p > 0.0 else None
    padding = -1 if padding_idx is None else padding_idx
    return _call(
        input_ids, token_type_ids, word, position, token_type, weight, bias, seeded, p, eps, padding
    )[0]
