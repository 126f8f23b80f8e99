"""`clue-ds bench kernels`: the ahead-of-time checks, and the measurement tried on a CPU."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clue_ds.benchmarks.kernels import kernels
from clue_ds.errors import UserError
from clue_ds.kernels import backend, bench

# Made by: clue-ds bench kernels --aot > tests/aot_kernels.txt
GOLDEN = Path(__file__).with_name("aot_kernels.txt")


@pytest.mark.heavy
def test_compiled_kernels_keep_their_limits_and_are_the_golden_ones() -> None:
    """In a process of its own, as TRITON_INTERPRET may have turned kernels into functions here."""
    triton = pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "clue_ds.cli", "bench", "kernels", "--aot"],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    golden = GOLDEN.read_text("utf-8")
    if f"# triton {triton.__version__};" not in golden:
        pytest.skip(f"limits hold; the golden table is of another Triton than {triton.__version__}")
    assert done.stdout == golden


def test_aot_is_refused_where_kernels_are_interpreted(kernel_device: torch.device) -> None:
    if kernel_device.type == "cuda":
        pytest.skip("kernels are compiled here")
    with pytest.raises(UserError, match="TRITON_INTERPRET unset"):
        kernels(aot=True)


def test_measuring_without_a_gpu_is_a_users_mistake() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        kernels()


def test_every_operation_is_checked_timed_written_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    table, picture = tmp_path / "figures.csv", tmp_path / "figures.png"
    sizes = {"hidden": (8, 16), "rows": (4,), "seq_length": (2,)}
    kernels(**sizes, dtype="fp32", device="cpu", csv=table, plot=picture)
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # Six operations, four of them also with dropout, have two providers each, and layer_norm has a
    # third; all have two widths and three modes.
    host = [row for row in rows if row["clock"] == "host"]
    assert len(rows) - len(host) == ((6 + 4) * 2 + 1) * 2 * 3
    assert {row["op"] for row in rows} == {row["op"] for row in host} == set(bench.OPS)
    assert {row["rows"] for row in host} == {"0"}  # nothing to launch on a CPU
    assert any(row["provider"] == "ours" for row in host) == backend.available()
    for row in rows:
        assert 0 < float(row["p20_us"]) <= float(row["median_us"]) <= float(row["p80_us"])
        if row["clock"] != "host":
            assert float(row["gb_per_s"]) > 0 and float(row["percent_of_copy"]) > 0
            assert (float(row["tflop_per_s"]) > 0) == (row["op"] == "attention")
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5 + len(rows) + 2 and "clue_ds" not in printed[4]


def test_bytes_are_those_of_the_fused_operation() -> None:
    case = bench.Case("bias_dropout_add_layer_norm", 10, 312, torch.bfloat16, 0.1)
    assert case.num_bytes("fwd") == case.num_bytes("bwd") == 8 * 10 * 312
    assert case._replace(p=0.0).num_bytes("full") == 14 * 10 * 312


def test_flops_are_those_of_attentions_products() -> None:
    case = bench.Case("attention", 256, 312, torch.bfloat16, 0.1, seq_length=128)
    scores = 12 * 2 * 128 * 128  # heads, sequences
    assert (case.head_size, case.num_flops("fwd")) == (26, scores * 26 * 2 * 2)
    assert case.num_flops("full") == scores * 26 * 2 * 7
    assert case._replace(op="layer_norm").num_flops("fwd") == 0


def test_a_wrong_provider_is_caught_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "providers", lambda case, device: {"wrong": lambda x, b: x + b})
    case = bench.Case("bias_gelu", 4, 8, torch.float32, 0.0)
    with pytest.raises(AssertionError, match="wrong is off by"):
        bench.check(case, torch.device("cpu"))
