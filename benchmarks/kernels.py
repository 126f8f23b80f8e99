"""`clue-ds bench kernels`: measure our fused operations beside torch's and other projects'.

Measuring needs a CUDA GPU; kernels/bench.py describes what is measured and how. `--aot` needs none:
instead of measuring, it compiles every kernel for sm_80, sm_90 and gfx942 and checks registers,
spills, access widths and instructions per element.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from csv import writer as csv_writer
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from clue_ds.benchmarks.description import describe
from clue_ds.errors import UserError
from clue_ds.kernels import backend, bench
from clue_ds.kernels.bench import Mode, Op, Row

# Packages that the figures depend on, besides torch; the table's head has their versions.
PACKAGES = ("triton", "liger_kernel", "flash_attn", "apex")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def kernels(
    op: tuple[Op, ...] = bench.OPS,
    hidden: tuple[int, ...] = (312, 768, 1024),
    rows: tuple[int, ...] = (32_768,),
    dtype: Literal["fp32", "fp16", "bf16"] = "bf16",
    mode: tuple[Mode, ...] = get_args(Mode),
    dropout: tuple[float, ...] = (0.0, 0.1),
    seq_length: tuple[int, ...] = (128, 512),
    device: Literal["cuda", "cpu"] = "cuda",
    csv: Path | None = None,
    plot: Path | None = None,
    aot: bool = False,
) -> None:
    """Bandwidth of the fused operations: ours, torch, torch.compile, and installed peers.

    Args:
        op: operations to measure
        hidden: hidden sizes (numbers of keys for masked_softmax)
        rows: numbers of rows
        dtype: dtype of activations and parameters
        mode: forward, backward, or both together (full)
        dropout: dropout probabilities, for operations that have dropout
        seq_length: tokens of a sequence, for attention
        device: cpu only shows that the benchmark itself works
        csv: write the figures to this file
        plot: draw the figures into this file: bandwidth against hidden size, a line per provider
        aot: instead of measuring, compile without a GPU, print the table and check its limits
    """
    if aot:
        _compile_all()
        return
    if device == "cuda" and not (torch.cuda.is_available() and backend.available()):
        raise UserError(
            "measuring kernels needs a CUDA GPU and the package triton; without them, `--aot` "
            "checks the compiled kernels and `--device cpu` tries the benchmark itself"
        )
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install 'clue_ds[plots]'")
    _print_head(dtype, device)
    measured: list[Row] = []
    for case in _cases(op, hidden, rows, DTYPES[dtype], dropout, seq_length):
        new = bench.measure(case, list(mode), torch.device(device))
        _print_rows(new)
        measured += new
        if csv is not None:  # after every case, so that a run cut short leaves its figures
            _write_csv(measured, csv)
    if csv is not None:
        print(f"written to {csv}")
    if plot is not None:
        _write_plot(measured, plot, f"{dtype}, {_device_name()}")


def _cases(
    ops: tuple[Op, ...],
    hidden: tuple[int, ...],
    rows: tuple[int, ...],
    dtype: torch.dtype,
    dropout: tuple[float, ...],
    seq_lengths: tuple[int, ...],
) -> list[bench.Case]:
    has_no_dropout = {"layer_norm", "bias_gelu"}
    return [
        bench.Case(op, num_rows, width, dtype, p, length)
        for op in ops
        for width in hidden
        for num_rows in rows
        for p in ((0.0,) if op in has_no_dropout else dropout)
        for length in (seq_lengths if op == "attention" else (bench.SEQ_LENGTH,))
    ]


def _compile_all() -> None:
    """Print the table of kernels/aot/machine_code.py; UserError lists the limits exceeded."""
    if backend.INTERPRETED or not backend.HAS_TRITON:
        raise UserError("--aot needs the package triton, and TRITON_INTERPRET unset")
    from clue_ds.kernels.aot import machine_code, variants

    all_variants = variants.everything()
    pairs = [
        (v, machine_code.compile_variant(v, target)) for v in all_variants for target in v.targets
    ]
    print(f"# triton {machine_code.VERSION}; made by: clue-ds bench kernels --aot")
    print(machine_code.table([report for _, report in pairs]), end="")
    broken = [line for variant, report in pairs for line in report.violations(variant)]
    if broken:
        raise UserError("kernels break their limits:\n" + "\n".join(broken))


def _device_name() -> str:
    facts = describe()
    return facts["gpu"] or facts["cpu"]


def _print_head(dtype: str, device: str) -> None:
    facts = describe()
    versions = [f"torch {facts['versions']['torch']}"]
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    print(f"# {_device_name()}; {', '.join(versions)}")
    print(f"# {facts['date']}, commit {facts['git_commit']}: {facts['command']}")
    print(f"# {dtype}; 100% is a copy of the same number of bytes; - means no bandwidth")
    if device == "cpu":
        print("# no figure is of a GPU: `ours` is plain torch here, except under the host clock")
    print(
        f"{'op':<28}{'rows':>7}{'H':>6}{'p':>5}{'S':>6} {'mode':<5}{'clock':<6}"
        f"{'provider':<11}{'us':>9}{'p20':>9}{'p80':>9}{'GB/s':>8}{'% copy':>7}{'TFLOP/s':>8}"
    )


def _print_rows(measured: list[Row]) -> None:
    for row in measured:
        rate = f"{row.gb_per_s:>8.0f}{row.percent_of_copy:>7.0f}"
        print(
            f"{row.op:<28}{row.rows:>7}{row.hidden:>6}{row.p:>5g}{row.seq_length:>6} "
            f"{row.mode:<5}{row.clock:<6}{row.provider:<11}{row.median_us:>9.1f}"
            f"{row.p20_us:>9.1f}{row.p80_us:>9.1f}{rate.replace('nan', '  -')}"
            f"{f'{row.tflop_per_s:.1f}' if row.tflop_per_s else '-':>8}",
            flush=True,
        )


def _write_csv(measured: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv_writer(file)
        writer.writerow(bench.Row._fields)
        writer.writerows(measured)


def _write_plot(measured: list[Row], path: Path, subtitle: str) -> None:
    """Draw a line of panels for each (operation, dropout, rows), with one panel for each mode.

    The figures are of the first clock: on a GPU `graph`, which times the kernels alone. A dashed
    line shows the copy.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    clock = measured[0].clock
    shown = [row for row in measured if row.clock == clock]
    lines = list(dict.fromkeys((row.op, row.p, row.rows, row.seq_length) for row in shown))
    modes = list(dict.fromkeys(row.mode for row in shown))
    figure, axes = pyplot.subplots(
        len(lines), len(modes), figsize=(1 + 4.5 * len(modes), 1 + 3.2 * len(lines)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    figure.suptitle(f"{subtitle}, {clock} clock")
    for i, (op, p, num_rows, length) in enumerate(lines):
        for axis, mode in zip(axes[i], modes, strict=True):
            key = (op, p, num_rows, length, mode)
            inside = [r for r in shown if (r.op, r.p, r.rows, r.seq_length, r.mode) == key]
            _draw_panel(axis, inside)
            of = f" of {length}" if op == "attention" else ""
            axis.set_title(f"{op}\n{mode}, dropout {p:g}, {num_rows:,} rows{of}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"written to {path}")


def _draw_panel(axis: Any, rows: list[Row]) -> None:
    """Draw bandwidth against hidden size, a line per provider."""
    copy = {row.hidden: 100 * row.gb_per_s / row.percent_of_copy for row in rows}
    axis.plot(*zip(*sorted(copy.items()), strict=True), "--", color="grey", label="copy")
    for provider in dict.fromkeys(row.provider for row in rows):
        line = [(row.hidden, row.gb_per_s) for row in rows if row.provider == provider]
        axis.plot(*zip(*sorted(line), strict=True), marker="o", label=provider)
    axis.set_xticks(sorted(copy))
    axis.set_xlabel("keys" if rows[0].op == "masked_softmax" else "hidden size")
    axis.set_ylabel("GB/s")
    axis.set_ylim(0, 1.08 * max(*copy.values(), *(row.gb_per_s for row in rows)))
    axis.legend(fontsize=8)
