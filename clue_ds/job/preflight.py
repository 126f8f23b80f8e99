"""Checks before the first step: all ranks run one program on the same data and can communicate.

Guarantees: if ranks differ in versions, config or corpus, the error lists the hosts of each value;
a first all-reduce on the real devices has its own deadline; /dev/shm has room for NCCL. `clue-ds
doctor` makes the same checks without a run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clue_ds import dist
from clue_ds.config import RunConfig, flatten
from clue_ds.errors import UserError
from clue_ds.job.watchdog import Watchdog

if TYPE_CHECKING:  # which takes a second to import, also for `clue-ds doctor --help`
    import torch

ALL_REDUCE_SECONDS = 60.0
# Packages whose versions decide what a run computes; a checkpoint and a result record them.
PACKAGES = ("clue_ds", "torch", "deepspeed", "numpy")
# NCCL maps about this much of /dev/shm per rank; with less it ends with "Bus error".
SHM_BYTES_PER_RANK = 64 << 20
SHM = Path("/dev/shm")
CPUINFO = Path("/proc/cpuinfo")
# Names in /proc/cpuinfo, of x86 and then of ARM.
BF16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}


def versions() -> dict[str, str]:
    """Installed version of each of PACKAGES."""
    return {package: importlib.metadata.version(package) for package in PACKAGES}


def report(
    config: RunConfig | None, corpus_fingerprint: str, device: torch.device
) -> dict[str, Any]:
    """What this rank is: host, device, versions, and hashes of its config and corpus."""
    import torch

    values = "" if config is None else json.dumps(config.model_dump(), sort_keys=True)
    return {
        "host": socket.gethostname(),
        "rank": dist.rank(),
        "device": dist.device_name(device),
        "same": {
            "python": platform.python_version(),
            **versions(),
            "cuda": str(torch.version.cuda),
            "config": hashlib.sha256(values.encode()).hexdigest()[:16],
            "corpus": corpus_fingerprint[:16],
        },
        "shm_bytes": shutil.disk_usage(SHM).free if SHM.is_dir() else 0,
    }


def differences(reports: list[dict[str, Any]]) -> list[str]:
    """One line for each value in which ranks differ, with the hosts of each variant.

    Ranks are named, too, where ranks on the same host differ.
    """
    lines = []
    for key in sorted({key for one in reports for key in one["same"]}):
        groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for one in reports:
            groups[str(one["same"].get(key))].append(one)
        if len(groups) > 1:
            homes = Counter(name for ones in groups.values() for name in {o["host"] for o in ones})
            values = (f"{v} on {_some(_names(ones, homes))}" for v, ones in sorted(groups.items()))
            lines.append(f"{key}: {'; '.join(values)}")
    return lines


def _names(ones: list[dict[str, Any]], homes: Counter[str]) -> list[str]:
    """Host names without repetition; with the rank if the host also appears in another group."""
    names = (
        f"{one['host']} (rank {one['rank']})" if homes[one["host"]] > 1 else one["host"]
        for one in ones
    )
    return list(dict.fromkeys(names))


def _some(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def little_shm(reports: list[dict[str, Any]]) -> list[str]:
    """Hosts whose /dev/shm is too small for their ranks on GPUs, with its size."""
    by_host: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in reports:
        if one["device"] != "cpu":
            by_host[one["host"]].append(one)
    return [
        f"{host}: {ranks[0]['shm_bytes'] >> 20} MiB free for {len(ranks)} ranks"
        for host, ranks in by_host.items()
        if len(ranks) > 1 and ranks[0]["shm_bytes"] < SHM_BYTES_PER_RANK * len(ranks)
    ]


def check(
    watch: Watchdog, config: RunConfig | None, corpus_fingerprint: str, device: torch.device
) -> str:
    """Compare all ranks; returns a line that describes them. UserError when they differ."""
    with watch.section("the pre-flight all-reduce", ALL_REDUCE_SECONDS):
        (total,) = dist.all_reduce([1.0])
        reports = dist.all_gather(report(config, corpus_fingerprint, device))
    assert total == dist.world_size()
    if lines := differences(reports):
        if any(line.startswith("config:") for line in lines):
            lines += differences(dist.all_gather(_settings(config)))  # which settings
        raise UserError(
            f"ranks are not the same program on the same data: {'; '.join(lines)}. Install the "
            "same environment on every host and give all of them the same files"
        )
    if lines := little_shm(reports):
        raise UserError(
            f"/dev/shm is too small for NCCL ({'; '.join(lines)}); start the container with "
            "--shm-size=1g, or set NCCL_SHM_DISABLE=1"
        )
    return describe(reports)


def has_bf16_units(cpuinfo: Path | None = None) -> bool | None:
    """Whether this processor has instructions for bf16; None where nothing says so."""
    cpuinfo = cpuinfo or CPUINFO
    if not cpuinfo.is_file():
        return None
    words = set(cpuinfo.read_text(encoding="utf-8", errors="replace").split())
    return bool(words & BF16_UNITS)


def slow_precision(precision: str, device: torch.device, cpuinfo: Path | None = None) -> list[str]:
    """A warning where this processor computes in bf16 only by converting to fp32 and back."""
    if precision != "bf16" or device.type != "cpu" or has_bf16_units(cpuinfo) is not False:
        return []
    return [
        "warning: this processor has no instructions for bf16 (avx512_bf16, amx_bf16), which makes "
        "it slower than fp32 here, up to three times; set train.precision fp32"
    ]


def _settings(config: RunConfig | None) -> dict[str, Any]:
    """Every setting by its dotted name, in the form that `differences` compares."""
    values = {} if config is None else dict(flatten(config.model_dump()))
    return {"host": socket.gethostname(), "rank": dist.rank(), "same": values}


def describe(reports: list[dict[str, Any]]) -> str:
    """`4 ranks on 2 hosts (n1, n2): NVIDIA H100 80GB HBM3`."""
    hosts = list(dict.fromkeys(one["host"] for one in reports))
    devices = list(dict.fromkeys(one["device"] for one in reports))
    ranks = f"{len(reports)} rank{'s' if len(reports) > 1 else ''}"
    where = f"{len(hosts)} host{'s' if len(hosts) > 1 else ''}"
    cores = len(os.sched_getaffinity(0))
    return f"{ranks} on {where} ({_some(hosts)}): {', '.join(devices)}; {cores} cores"
