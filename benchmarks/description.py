"""Describes where figures were measured: device, versions, command. Part of every result file.

The description names no directory, host or user, so that results can be published unchanged.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "numba", "numpy")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the source tree with this file; None outside of one or before the first."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _without_directories(argument: str) -> str:
    """The last component of a path; other arguments unchanged."""
    name, equals, value = argument.partition("=")
    if equals and name.startswith("-") and os.sep in value:
        return f"{name}={Path(value).name}"
    return Path(argument).name if os.sep in argument else argument


def command_line() -> str:
    """The command that started this process, without the paths of this machine."""
    return shlex.join(_without_directories(argument) for argument in sys.argv)


def describe() -> dict[str, Any]:
    """cpu, gpu, num_cores, python, platform, versions, git_commit, command, date."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "num_cores": len(os.sched_getaffinity(0)),
        "num_torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "git_commit": _git_commit(),
        "command": command_line(),
        "date": datetime.date.today().isoformat(),
    }


def write_results(output: Path, figures: dict[str, Any]) -> None:
    """Write figures and the description of the machine as JSON, and print where."""
    output.parent.mkdir(parents=True, exist_ok=True)
    results = {"environment": describe(), **figures}
    output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {output}")
