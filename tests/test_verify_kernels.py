"""`auto` compares each kernel with torch before it is used; a wrong one is named and replaced."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import tiny_config

from clue_ds import kernels, presets
from clue_ds.kernels import backend, bench, functional, reference, verify
from clue_ds.kernels.verify import rates
from clue_ds.model import ops
from clue_ds.pretrain.auto import kernels as auto_kernels

SHAPES = verify.Shapes(
    num_sequences=2, seq_length=16, hidden_size=24, intermediate_size=40, num_heads=2, vocab_size=30
)
OPERATIONS = [
    "layer_norm", "bias_dropout_add_layer_norm", "masked_softmax", "bias_gelu",
    "embedding_layer_norm", "attention",
]  # fmt: skip


@pytest.fixture
def device(
    kernel_device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[torch.device]:
    """A device for which `auto` takes kernels: a GPU, or the interpreter in place of one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(backend, "takes_kernels", lambda device: True)
    monkeypatch.setattr(backend, "HOST_BOUND_ELEMENTS", 0)
    kernels.set_backend("auto")
    yield kernel_device
    kernels.refuse(())


def off_by_a_thousandth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the kernel of bias_gelu wrong by an amount that no loss curve would show."""
    right = functional.fused_gelu.bias_gelu
    monkeypatch.setattr(functional.fused_gelu, "bias_gelu", lambda *a: right(*a) * 1.001)


def test_right_kernels_agree(device: torch.device) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    verdicts = verify.verify(SHAPES, torch.float32, device)
    assert [v.operation for v in verdicts] == OPERATIONS
    assert [v for v in verdicts if not v.agrees] == []
    assert torch.equal(torch.get_rng_state(), before) and kernels.get_backend() == "auto"


def test_a_wrong_kernel_is_named_replaced_and_remembered(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    off_by_a_thousandth(monkeypatch)
    verdicts = verify.remembered(SHAPES, torch.float32, device)
    (wrong,) = [v for v in verdicts if not v.agrees]
    assert wrong.operation == "bias_gelu" and "its result has an RMS error of" in wrong.reason
    x, bias = torch.randn(8, 40, device=device), torch.randn(40, device=device)
    right = reference.bias_gelu(x, bias)
    assert not torch.allclose(kernels.bias_gelu(x, bias), right, rtol=1e-4)
    kernels.refuse([wrong.operation])
    assert torch.equal(kernels.bias_gelu(x, bias), right)
    assert kernels.use_triton(x, 40, "layer_norm")

    def again(*arguments: Any) -> list[verify.Verdict]:
        raise AssertionError("the answer was not remembered")

    monkeypatch.setattr(verify, "verify", again)
    assert verify.remembered(SHAPES, torch.float32, device) == verdicts
    with pytest.raises(AssertionError, match="not remembered"):
        verify.remembered(SHAPES, torch.bfloat16, device)


def test_a_kernel_that_does_not_compile_is_a_reason(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> None:
        raise RuntimeError("PTX JIT compilation failed\nlong log")

    monkeypatch.setattr(functional.fused_norm, "layer_norm", fails)
    wrong = verify.verify(SHAPES, torch.float32, device)[0]
    assert wrong.reason == "it raises RuntimeError: PTX JIT compilation failed"


# Without dropout a run on an H200 once refused masked_softmax, for keeping bf16 as torch does.
@pytest.mark.parametrize("p", [0.1, 0.0], ids=["dropout", "no dropout"])
def test_bf16_kernels_agree_and_every_operation_of_the_package_is_compared(
    p: float, device: torch.device
) -> None:
    shapes = dataclasses.replace(SHAPES, p=p, seq_length=64)
    verdicts = verify.verify(shapes, torch.bfloat16, device)
    assert [v for v in verdicts if not v.agrees] == []
    assert {v.operation for v in verdicts} == set(bench.OPS)


def test_a_run_takes_torch_for_the_operation_that_is_wrong(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    off_by_a_thousandth(monkeypatch)
    model = presets.get("roberta_tiny_clue").replace(
        hidden_size=24, intermediate_size=40, num_attention_heads=2, vocab_size=30
    )
    config = tiny_config("corpus", "run", model={"kernels": "auto"}, data={"seq_length": 16})
    (note,) = auto_kernels.choose(config, model, device)
    assert "these operations run in torch" in note and "bias_gelu (its result has an RMS" in note
    assert backend.refused() == {"bias_gelu"}
    monkeypatch.undo()
    ops.choose_kernels("torch")


def test_without_a_gpu_a_run_takes_torch_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("corpus", "run", model={"kernels": "auto"})
    model = presets.get("roberta_tiny_clue")
    (note,) = auto_kernels.choose(config, model, torch.device("cpu"))
    assert note == "model.kernels auto is torch: there is no GPU"
    assert kernels.get_backend() == "torch"
    kernels.set_backend("auto")


def test_rates_are_measured_at_the_sizes_of_the_run(device: torch.device) -> None:
    found = rates.rates(SHAPES, torch.float32, device)
    assert list(found) == list(bench.OPS)
    assert found["bias_gelu"].hidden == 40 and found["masked_softmax"].rows == 2 * 2 * 16
    assert all(row.gb_per_s > 0 and row.percent_of_copy > 0 for row in found.values())
