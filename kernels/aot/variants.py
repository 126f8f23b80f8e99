"""What is compiled ahead of time: every kernel at BERT's widths, with the tiles that run on a GPU.

The limits are on registers and instructions per element. LayerNorm and softmax may have at most
half of the instructions that an H100 issues while it copies the same bytes. `ISSUED` per byte is
all of them: with more, memory could not be the limit (kernels/README.md has the arithmetic).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import triton.language as tl

from .. import reference
from ..functional import (
    fused_add_norm,
    fused_attention,
    fused_embedding,
    fused_gelu,
    fused_norm,
    fused_softmax,
)
from ..shared import packed_attention, tiles
from .machine_code import TARGETS, Variant

WIDTHS = (312, 768, 1024)
KEY_LENGTHS = (128, 512)
FORWARD_REGISTERS, BACKWARD_REGISTERS = 80, 128
# Lane-instructions an H100 issues while it copies one byte: 29.6e12 / 3.0e12. An MI300X: 9.7.
ISSUED = 9.9
EPS = 1e-12
# Two programs of 128 threads share an NVIDIA multiprocessor at least, as their accumulators and a
# tile of scores are in registers. Instructions are per score with dropout; without, half as many
# and four more. The order of the mask is that of NVIDIA's tensor cores; AMD's exchange it.
ATTENTION_REGISTERS = 255
ATTENTION_INSTRUCTIONS = {
    "forward": {32: 25, 64: 52},  # lanes of a warp: limit
    "dq": {32: 25, 64: 52},
    "dkv": {32: 34, 64: 70},
}


def _constants(tile: tiles.Tile, width: int, p: float | None = None) -> dict[str, Any]:
    found = {
        "H": width, "ROWS": tile.rows, "BLOCK": tile.block, "TAIL": tile.tail, "ACC": tl.float32
    }  # fmt: skip
    if p is not None:
        num_dropped, scale = reference.dropout_threshold(p)
        found |= {"NUM_DROPPED": num_dropped, "KEEP_SCALE": scale}
    return found


def _pointers(kind: str, *names: str) -> dict[str, str]:
    return {f"{name}_ptr": kind for name in names}


def norms(width: int, lanes: int) -> list[Variant]:
    """layer_norm in bf16 with fp32 parameters."""
    forward, backward = tiles.row_tile(width), tiles.backward_tile(width, lanes=lanes)
    shared = _pointers("*fp32", "weight", "statistics") | {"num_rows": "i32"}
    return [
        Variant(
            f"layer_norm forward {width}", fused_norm.forward_kernel,
            shared | _pointers("*bf16", "x", "y") | _pointers("*fp32", "bias"),
            _constants(forward, width) | {"EPS": EPS},
            forward.num_warps, forward.rows * width, FORWARD_REGISTERS, 32, False,
        ),
        Variant(
            f"layer_norm backward {width}", fused_norm.backward_kernel,
            shared | _pointers("*bf16", "dy", "x", "dx") | _pointers("*fp32", "partials"),
            _constants(backward, width) | {"STAGES": tiles.STAGES},
            backward.num_warps, backward.rows * width, BACKWARD_REGISTERS, 6 * ISSUED, True,
        ),
    ]  # fmt: skip


def add_norms(width: int, p: float, lanes: int) -> list[Variant]:
    """bias_dropout_add_layer_norm in bf16, post-LN, with fp32 parameters."""
    forward, backward = tiles.row_tile(width), tiles.backward_tile(width, num_sums=3, lanes=lanes)
    shared = _pointers("*fp32", "weight", "statistics") | {"num_rows": "i32"}
    seed = _pointers("*i64", "seed") if p else {}
    # gfx942 rounds to bf16 in software, which takes 5 instructions per element of each result.
    limit = 50 if p else 32 if lanes == 32 else 8 * ISSUED / 2
    num_bytes = 8 if p else 6  # per element of the backward pass
    # Without dropout, dx is also the residual's gradient.
    gradients = _pointers("*bf16", "dy", "sum", "dx", *(["dresidual"] if p else []))
    return [
        Variant(
            f"bias_dropout_add_layer_norm forward {width} p={p:g}",
            fused_add_norm.forward_kernel,
            shared | seed | _pointers("*bf16", "x", "residual", "y", "sum")
            | _pointers("*fp32", "bias", "ln_bias"),
            _constants(forward, width, p) | {"EPS": EPS},
            forward.num_warps, forward.rows * width, FORWARD_REGISTERS, limit, False,
        ),
        Variant(
            f"bias_dropout_add_layer_norm backward {width} p={p:g}",
            fused_add_norm.backward_kernel,
            shared | seed | gradients | _pointers("*fp32", "partials"),
            _constants(backward, width, p) | {"STAGES": tiles.STAGES, "HAS_BIAS": True},
            backward.num_warps, backward.rows * width, BACKWARD_REGISTERS, num_bytes * ISSUED, True,
        ),
    ]  # fmt: skip


def softmaxes(num_keys: int, p: float) -> list[Variant]:
    """masked_softmax in bf16 with key lengths."""
    tile = tiles.forward_tile(num_keys)
    constants = _constants(tile, num_keys, p) | {"K": num_keys, "SCALE": 0.125}
    forward = constants | {
        "N": 12, "Q": num_keys, "MASK_STRIDE_K": 0, "IS_BOOL": False,
        "mask_stride_b": 0, "mask_stride_n": 0, "mask_stride_q": 0,
    }  # fmt: skip
    seed = {"num_rows": "i32"} | (_pointers("*i64", "seed") if p else {})
    limit = 45 if p else 32
    dropped = _pointers("*bf16", "dropped") if p else {}
    return [
        Variant(
            f"masked_softmax forward {num_keys} p={p:g}", fused_softmax.forward_kernel,
            seed | dropped | _pointers("*bf16", "scores", "out") | _pointers("*i64", "lengths"),
            forward, tile.num_warps, tile.rows * num_keys, FORWARD_REGISTERS, limit, False,
        ),
        Variant(
            f"masked_softmax backward {num_keys} p={p:g}", fused_softmax.backward_kernel,
            seed | _pointers("*bf16", "dy", "out", "dscores"), constants,
            tile.num_warps, tile.rows * num_keys, BACKWARD_REGISTERS, limit, False,
        ),
    ]  # fmt: skip


def gelus(width: int, tanh: bool) -> list[Variant]:
    """bias_gelu in bf16 with an fp32 bias."""
    tile = fused_gelu.tile_of(width)
    constants = _constants(tile, width) | {"TANH": tanh}
    shared = _pointers("*fp32", "bias") | {"num_rows": "i32"}
    kind = "tanh" if tanh else "erf"
    elements = tile.rows * tile.block
    return [
        Variant(
            f"bias_gelu forward {width} {kind}", fused_gelu.forward_kernel,
            shared | _pointers("*bf16", "x", "y"), constants,
            tile.num_warps, elements, FORWARD_REGISTERS, 4 * ISSUED, False,
        ),
        Variant(
            f"bias_gelu backward {width} {kind}", fused_gelu.backward_kernel,
            shared | _pointers("*bf16", "dy", "x", "dx") | _pointers("*fp32", "dbias"),
            constants | {"STAGES": tiles.STAGES},
            tile.num_warps, elements, BACKWARD_REGISTERS, 6 * ISSUED, True,
        ),
    ]  # fmt: skip


def embeddings(width: int, p: float, lanes: int) -> list[Variant]:
    """embedding_layer_norm with bf16 tables and fp32 LayerNorm parameters, token types given."""
    forward, backward = tiles.row_tile(width), tiles.backward_tile(width, lanes=lanes)
    shape = {"V": 8064, "T": 2, "S": 128}
    shared = (
        _pointers("*bf16", "word", "position", "token_type")
        | _pointers("*i64", "ids", "types", *(["seed"] if p else []))
        | _pointers("*fp32", "weight", "statistics")
        | {"num_rows": "i32"}
    )
    return [
        Variant(
            f"embedding_layer_norm forward {width} p={p:g}", fused_embedding.forward_kernel,
            shared | _pointers("*bf16", "y") | _pointers("*fp32", "bias"),
            _constants(forward, width, p) | shape | {"EPS": EPS},
            forward.num_warps, forward.rows * width, FORWARD_REGISTERS, 50, False,
        ),
        Variant(
            f"embedding_layer_norm backward {width} p={p:g}", fused_embedding.backward_kernel,
            shared | _pointers("*bf16", "dy", "dsum") | _pointers("*fp32", "partials"),
            _constants(backward, width, p) | shape,
            backward.num_warps, backward.rows * width, BACKWARD_REGISTERS, 6 * ISSUED, True,
        ),
    ]  # fmt: skip


def attentions(size: int, p: float, target: str) -> list[Variant]:
    """attention in bf16 with 12 heads; an element is a score of a tile in the loop."""
    is_hopper, lanes = target == "sm_90", 64 if target == "gfx942" else 32
    columns = fused_attention.padded_head_size(size)
    chosen = fused_attention.HOPPER_TILES[columns] if is_hopper else fused_attention.TILES
    num_heads, found = 12, []
    stride = 3 * num_heads * size
    num_dropped, scale = reference.dropout_threshold(p)
    constants = {
        "N": num_heads, "D": size, "Q_STRIDE": stride, "Q_HEAD": size, "K_STRIDE": stride,
        "K_HEAD": size, "DQ_STRIDE": stride, "DK_STRIDE": stride, "SCALE": size**-0.5,
        "NUM_DROPPED": num_dropped, "KEEP_SCALE": scale, "BLOCK_D": columns, "ACC": tl.float32,
        "DOT": tl.bfloat16,
    }  # fmt: skip
    shared = (
        _pointers("*bf16", "q", "k", "v")
        | _pointers("*i32", "cu_queries", "cu_keys")
        | (_pointers("*i64", "seed") if p else {})
        | {"num_blocks": "i32", "num_rows": "i32"}
    )
    statistics = _pointers("*fp32", "lse", "delta")
    kernels = {
        "forward": (packed_attention.forward_kernel, _pointers("*bf16", "out") | statistics),
        "dq": (packed_attention.dq_kernel, _pointers("*bf16", "dout", "out", "dq") | statistics),
        "dkv": (packed_attention.dkv_kernel, _pointers("*bf16", "dout", "dk", "dv") | statistics),
    }
    for part, (kernel, types) in kernels.items():
        blocks: fused_attention.Blocks = getattr(chosen, part)
        limit = ATTENTION_INSTRUCTIONS[part][lanes]
        tile = {"BLOCK_M": blocks.queries, "BLOCK_N": blocks.keys, "STAGES": blocks.stages}
        taken = {name: kind for name, kind in (shared | types).items() if name in kernel.arg_names}
        found.append(
            Variant(
                f"attention {part} {size} p={p:g}", kernel, taken, constants | tile,
                blocks.num_warps, blocks.queries * blocks.keys, ATTENTION_REGISTERS,
                limit if p else limit / 2 + 4, True, targets=(target,),
                # The heads of a token lie 52 bytes apart at a head size of 26.
                min_bits=64 if size % 8 == 0 else 32,
            )
        )  # fmt: skip
    return found


def everything() -> list[Variant]:
    """Every variant: NVIDIA's, AMD's, whose warps of 64 lanes have other tiles, and attention."""
    # A width of 64 adds a tile with several rows per warp.
    nvidia = _of_lanes(32) + add_norms(64, 0.1, 32)[1:]
    return [
        *(dataclasses.replace(variant, targets=("sm_80", "sm_90")) for variant in nvidia),
        *(dataclasses.replace(variant, targets=("gfx942",)) for variant in _of_lanes(64)),
        *(v for target in TARGETS for size in (26, 64) for v in attentions(size, 0.1, target)),
        *attentions(64, 0.0, "sm_90"),
    ]


def _of_lanes(lanes: int) -> list[Variant]:
    found = []
    for width in WIDTHS:
        found += norms(width, lanes) + add_norms(width, 0.1, lanes)
    for width in (312, 768):
        found += add_norms(width, 0.0, lanes) + embeddings(width, 0.1, lanes)
    for num_keys in KEY_LENGTHS:
        found += softmaxes(num_keys, 0.0) + softmaxes(num_keys, 0.1)
    return found + gelus(3072, tanh=False) + gelus(3072, tanh=True)
