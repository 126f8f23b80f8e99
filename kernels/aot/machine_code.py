"""Compile kernels ahead of time, without a GPU, and measure their machine code.

For each variant and target: registers per thread, spilled bytes, the narrowest bulk access to
global memory in bits, and instructions per element. The last is the number of instructions of the
kernel, or of the loop of a persistent one, times the threads, divided by the elements of a tile
that are not padding. On AMD it leaves out scalar instructions, which have an issue slot of their
own. A kernel within its limits keeps up with memory. `variants.py` lists what is compiled,
`clue-ds bench kernels --aot` prints the table, and tests/aot_kernels.txt holds the expected one.

NVIDIA's numbers come from the cuobjdump that Triton bundles, AMD's from the assembly and its
metadata. This needs a process without TRITON_INTERPRET, which turns kernels into Python functions.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

VERSION = triton.__version__
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Accesses of one width are bulk if they make up this share of all bits or more. Others read or
# write a row's statistics, a seed, a length, or parameters that many rows share.
BULK_SHARE = 0.15


@dataclass(frozen=True)
class Variant:
    """One compilation: a kernel with its types and constants, and the limits that it must keep."""

    name: str
    kernel: Any
    types: dict[str, str]  # of the arguments that are not constants, e.g. {"x_ptr": "*bf16"}
    constants: dict[str, Any]
    num_warps: int
    elements: int  # of a tile, without padding
    max_registers: int
    max_instructions: float  # per element
    loops: bool  # whether it is a persistent kernel
    targets: tuple[str, ...] = tuple(TARGETS)
    min_bits: int = 64  # of a bulk access


class Report(NamedTuple):
    """The figures of one compilation; widths in bits, instructions per element."""

    variant: str
    target: str
    registers: int
    spilled_bytes: int
    narrowest_bulk: int
    instructions: float
    shared_bytes: int

    def violations(self, limits: Variant) -> list[str]:
        """A line for each limit that is exceeded; empty if all are kept."""
        found = []
        if self.spilled_bytes:
            found.append(f"spills {self.spilled_bytes} bytes")
        if self.registers > limits.max_registers:
            found.append(f"{self.registers} registers > {limits.max_registers}")
        if self.narrowest_bulk < limits.min_bits:
            found.append(f"bulk accesses of {self.narrowest_bulk} bits < {limits.min_bits}")
        if self.instructions > limits.max_instructions:
            found.append(f"{self.instructions:.1f} instructions > {limits.max_instructions:g}")
        return [f"{self.variant} on {self.target}: {what}" for what in found]


def compile_variant(variant: Variant, target: str) -> Report:
    """Compile for one of TARGETS and read the machine code; 1 to 4 s."""
    names = variant.kernel.arg_names
    signature = {n: variant.types.get(n, "constexpr") for n in names}
    constants = {n: variant.constants.get(n) for n in names if n not in variant.types}
    # The launcher finds the same of every tensor of ours: its address is a multiple of 16 bytes.
    aligned = {
        (names.index(n),): [["tt.divisibility", 16]]
        for n, kind in variant.types.items()
        if kind.startswith("*")
    }
    source = ASTSource(variant.kernel, signature, constants, aligned)
    compiled = triton.compile(
        source,
        target=TARGETS[target],
        options={"num_warps": variant.num_warps, "enable_fp_fusion": True},
    )
    shared = compiled.metadata.shared
    if target == "gfx942":
        return _read_amd(variant, target, compiled.asm["amdgcn"], shared)
    return _read_nvidia(variant, target, compiled.asm["cubin"], shared)


def _read_nvidia(variant: Variant, target: str, cubin: bytes, shared: int) -> Report:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _cuobjdump("--dump-resource-usage", path)
        sass = _cuobjdump("--dump-sass", path)
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    stack = int(re.findall(r"STACK:(\d+)", usage)[-1])
    local = int(re.findall(r"LOCAL:(\d+)", usage)[-1])
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);", sass)
    code = [(int(address, 16), name, rest) for address, name, rest in lines]
    widths = [
        _nvidia_width(name) for _, name, _ in code if name.startswith(("LDG.", "LDGSTS.", "STG."))
    ]
    spilled = stack + local
    return _report(
        variant, target, registers, spilled, widths, len(_body(code, variant.loops)), shared
    )


def _body(code: list[tuple[int, str, str]], loops: bool) -> list[str]:
    """Instructions of the longest loop, or of the whole kernel up to its last EXIT."""
    real = [entry for entry in code if entry[1] != "NOP"]
    if not loops:
        last = max(i for i, entry in enumerate(real) if entry[1] == "EXIT")
        return [name for _, name, _ in real[: last + 1]]
    jumps = []
    for address, name, rest in real:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and target:
            jumps.append((int(target[1], 16), address))
    start, end = _longest_loop(jumps)
    return [name for address, name, _ in real if start <= address <= end]


def _longest_loop(jumps: list[tuple[int, int]]) -> tuple[int, int]:
    """(first, last) address of the longest loop, which ends in the longest of the backward jumps.

    Jumps are given as (target, address).
    """
    return max((jump for jump in jumps if jump[0] < jump[1]), key=lambda jump: jump[1] - jump[0])


def _nvidia_width(name: str) -> int:
    for bits in (128, 64, 16, 8):
        if re.search(rf"\.[US]?{bits}(\.|$)", name):
            return bits
    return 32


def _cuobjdump(flag: str, path: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), flag, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _read_amd(variant: Variant, target: str, assembly: str, shared: int) -> Report:
    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[-1])

    names: list[str] = []
    labels, branches = {}, []
    for label, name, rest in re.findall(r"^(?:(\.LBB\w+):|\s+([a-z]\w+)(.*))", assembly, re.M):
        if label:
            labels[label] = len(names)
        elif name.startswith(("v_", "s_", "global_", "buffer_", "ds_", "flat_")):
            if name.startswith(("s_branch", "s_cbranch")):
                branches.append((rest.strip(), len(names)))
            names.append(name)
    widths = []
    for name in names:
        if name.startswith(("global_load", "global_store", "buffer_load", "buffer_store")):
            words = re.search(r"dwordx(\d)", name)
            narrow = 16 if "short" in name else 8 if "byte" in name else 32
            widths.append(32 * int(words[1]) if words else narrow)
    if variant.loops:
        first, last = _longest_loop([(labels[label], address) for label, address in branches])
        names = names[first : last + 1]
    num_vector = sum(not name.startswith("s_") for name in names)
    spilled = 4 * (field("vgpr_spill_count") + field("sgpr_spill_count"))
    return _report(variant, target, field("vgpr_count"), spilled, widths, num_vector, shared)


def _report(
    variant: Variant,
    target: str,
    registers: int,
    spilled: int,
    widths: list[int],
    num_instructions: int,
    shared: int,
) -> Report:
    threads = variant.num_warps * TARGETS[target].warp_size
    enough = BULK_SHARE * sum(widths)
    narrowest = min(bits for bits in set(widths) if bits * widths.count(bits) >= enough)
    per_element = num_instructions * threads / variant.elements
    return Report(variant.name, target, registers, spilled, narrowest, per_element, shared)


def table(reports: list[Report]) -> str:
    """The reports as aligned text, one per line."""
    head = (
        f"{'kernel':<52}{'target':<8}{'regs':>5}{'spill':>6}{'bits':>5}{'instr/el':>9}{'smem':>7}"
    )
    lines = [
        f"{r.variant:<52}{r.target:<8}{r.registers:>5}{r.spilled_bytes:>6}"
        f"{r.narrowest_bulk:>5}{r.instructions:>9.1f}{r.shared_bytes:>7}"
        for r in reports
    ]
    return "\n".join([head, *lines]) + "\n"
