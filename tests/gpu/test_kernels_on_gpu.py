"""Checks that need a GPU: sizes beyond 2^31, CUDA graphs, the device's masks, a training run.

`make test-gpu` also runs the numeric tests of tests/test_*.py on the device.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from device_checks import (
    OPERATIONS,
    SEED,
    check_all_rows,
    check_last_masks,
    check_last_rows,
    check_last_sequence,
    losses_of,
)

from clue_ds import kernels
from clue_ds.kernels import bench, reference

# Three rows more than 2^31 elements; a bf16 tensor of that size takes 4.3 GB.
WIDTH = 1024
FAR = 2**31 // WIDTH + 3


@pytest.mark.parametrize("rows", [65_535, 65_536, 65_537])
@pytest.mark.parametrize("op", OPERATIONS)
def test_more_rows_than_a_grid_dimension_once_had(
    op: str, rows: int, kernel_device: torch.device
) -> None:
    check_all_rows(op, rows, 312, kernel_device)


@pytest.mark.parametrize("op", OPERATIONS)
def test_offsets_beyond_32_bits(op: str, kernel_device: torch.device) -> None:
    """Forward and backward; flash-attention and Liger once computed row * stride in int32."""
    _need_tensors(8)
    check_last_rows(op, FAR, WIDTH, kernel_device)


def test_masks_beyond_32_bits(kernel_device: torch.device) -> None:
    _need_tensors(8)
    check_last_masks(FAR, WIDTH, kernel_device)


def test_tokens_beyond_32_bits(kernel_device: torch.device) -> None:
    """Three more sequences than fit into 2^31 numbers of q, k and v."""
    num_heads, length = 12, 512
    num_tokens = (2**31 // (3 * num_heads * 64 * length) + 3) * length
    _need_tensors(6)
    check_last_sequence(num_tokens, num_heads, length, kernel_device)


def _need_tensors(number: int) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < number * FAR * WIDTH * 2:
        pytest.skip(f"needs {number * FAR * WIDTH * 2 / 1e9:.0f} GB of free GPU memory")


# Draws the mask of `test_device_draws_the_interpreters_masks` and writes it to a file.
INTERPRETED = """
import sys
import torch
from clue_ds import kernels
kernels.set_backend("triton")
x, weight = torch.zeros(1000, 312), torch.ones(312)
_, mask = kernels.bias_dropout_add_layer_norm(
    x, None, None, weight, weight, 0.1, 1e-12, True, seed=int(sys.argv[1]), return_mask=True
)
torch.save(mask, sys.argv[2])
"""


def interpreters_mask(path: Path) -> torch.Tensor:
    """bool [1000, 312], from a process of its own: Triton reads TRITON_INTERPRET at decoration."""
    command = [sys.executable, "-c", INTERPRETED, str(SEED), str(path)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, env=environment, check=True)
    return torch.load(path)


def test_device_draws_the_interpreters_masks(kernel_device: torch.device, tmp_path: Path) -> None:
    x = torch.zeros(1_000, 312, device=kernel_device)
    weight = torch.ones(312, device=kernel_device)
    _, mask = kernels.bias_dropout_add_layer_norm(
        x, None, None, weight, weight, 0.1, 1e-12, True, seed=SEED, return_mask=True
    )
    num_dropped, _ = reference.dropout_threshold(0.1)
    assert torch.equal(mask.cpu(), interpreters_mask(tmp_path / "mask.pt"))
    assert torch.equal(mask.cpu(), reference.philox_keep(x.shape, num_dropped, SEED))


def test_replayed_graph_draws_new_masks_and_right_gradients(kernel_device: torch.device) -> None:
    x = torch.randn(64, 768, device=kernel_device, requires_grad=True)
    residual = torch.randn_like(x)
    weight, bias = torch.ones(768, device=kernel_device), torch.zeros(768, device=kernel_device)

    def step() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y, mask = kernels.bias_dropout_add_layer_norm(
            x, None, residual, weight, bias, 0.5, 1e-12, True, return_mask=True
        )
        return y, mask, torch.autograd.grad(y.pow(3).sum(), x)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, mask, dx = step()
    seen = []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        seen.append(mask.clone())
        assert torch.count_nonzero(dx[~mask]) == 0  # backward drew the mask of its forward
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_replayed_graph_draws_new_attention_masks(kernel_device: torch.device) -> None:
    qkv = torch.zeros(200, 3, 2, 64, device=kernel_device)
    qkv[:, 2] = 1.0
    qkv.requires_grad_()
    starts = torch.tensor([0, 120, 200, 200], dtype=torch.int32, device=kernel_device)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        out = kernels.attention(qkv, starts, 128, 0.5)
        return out, torch.autograd.grad(out.sum(), qkv)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grad = step()
    seen = []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        seen.append(out.clone())
        # Every value is 1, so that both sums are that of all kept probabilities: the backward pass
        # drew the mask of its forward pass.
        torch.testing.assert_close(grad[:, 2].sum(), out.sum(), rtol=1e-4, atol=1e-4)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_inductor_compiles_around_attention(kernel_device: torch.device) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 312, device=kernel_device, requires_grad=True)
    weight = torch.randn(936, 312, device=kernel_device) / 312**0.5
    starts = torch.tensor([0, 40, 64, 64], dtype=torch.int32, device=kernel_device)

    def chain(x: torch.Tensor) -> torch.Tensor:
        qkv = torch.nn.functional.linear(x, weight).view(-1, 3, 12, 26)
        return kernels.attention(qkv, starts, 40).flatten(1) * 2

    ours, eager = torch.compile(chain, fullgraph=True)(x), chain(x)
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    for first, second in zip(
        torch.autograd.grad(ours.pow(2).sum(), x),
        torch.autograd.grad(eager.pow(2).sum(), x),
        strict=True,
    ):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)


def test_auto_takes_torch_for_a_small_layer_norm_only(kernel_device: torch.device) -> None:
    kernels.set_backend("auto")
    weight, bias = torch.randn(2, 1024, device=kernel_device)
    nodes = []
    for rows in (4096, 4097):
        x = torch.randn(rows, 1024, device=kernel_device, requires_grad=True)
        y = kernels.layer_norm(x, weight, bias, 1e-12)
        torch.testing.assert_close(y, reference.layer_norm(x, weight, bias, 1e-12))
        nodes.append(y.grad_fn.name())
    assert nodes == ["NativeLayerNormBackward0", "layer_norm_directBackward"]


def test_inductor_compiles_around_the_operations(kernel_device: torch.device) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 312, device=kernel_device, requires_grad=True)
    weight, bias = torch.randn(2, 312, device=kernel_device)

    def chain(x: torch.Tensor) -> torch.Tensor:
        return kernels.layer_norm(kernels.bias_gelu(x, bias) * 2, weight, bias, 1e-12) + 1

    ours, eager = torch.compile(chain, fullgraph=True)(x), chain(x)
    torch.testing.assert_close(ours, eager)
    for first, second in zip(
        torch.autograd.grad(ours.pow(2).sum(), x),
        torch.autograd.grad(eager.pow(2).sum(), x),
        strict=True,
    ):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_benchmark_measures_every_mode_and_clock(kernel_device: torch.device) -> None:
    """This captures backward passes without their forward, and runs compiled ones repeatedly."""
    case = bench.Case("bias_dropout_add_layer_norm", 512, 312, torch.bfloat16, 0.1)
    rows = bench.measure(case, ["fwd", "bwd", "full"], kernel_device)
    found = {(row.mode, row.clock, row.provider) for row in rows}
    for mode in ("fwd", "bwd", "full"):
        for clock in ("graph", "eager", "host"):
            assert {(mode, clock, name) for name in ("torch", "ours", "compile")} <= found
    assert all(row.median_us > 0 for row in rows)


@pytest.mark.parametrize("hidden", [312, 768])
def test_attention_is_measured_beside_torchs(hidden: int, kernel_device: torch.device) -> None:
    """The check before the measurement compares every peer with fp32."""
    case = bench.Case("attention", 512, hidden, torch.bfloat16, 0.1)
    rows = bench.measure(case, ["fwd", "full"], kernel_device)
    found = {row.provider for row in rows if row.clock == "graph"}
    assert found == {"ours", "torch", "math", "eager", "compile", "flash"} | (
        {"varlen"} if hidden == 768 else set()
    )
    assert all(row.median_us > 0 and row.tflop_per_s > 0 for row in rows)


def test_training_with_and_without_kernels_agrees(kernel_device: torch.device) -> None:
    with_kernels, without = (
        losses_of(name, 0.0, kernel_device, 200) for name in ("triton", "torch")
    )
    assert without[-1] < 0.5 * without[0]
    # The same arithmetic in another order: losses are equal until training amplifies rounding.
    torch.testing.assert_close(with_kernels[:20], without[:20], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(with_kernels, without, rtol=0.05, atol=0.05)


def test_training_with_dropout_learns_as_well(kernel_device: torch.device) -> None:
    """Torch's masks differ from the kernels', so only the last losses are compared."""
    with_kernels, without = (
        losses_of(name, 0.1, kernel_device, 200) for name in ("triton", "torch")
    )
    assert abs(with_kernels[-20:].mean() - without[-20:].mean()) < 0.2 * without[0]
