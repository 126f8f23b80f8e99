"""Ranks of real runs that are killed at chosen moments, and the comparison of what they leave.

`start` runs one start of a run on forked ranks (zygote.py). A killer in each of them sends SIGKILL
to its own process some time after the end of a step, wherever the process is by then: in a forward
pass, a collective, a save, or DeepSpeed's part of it. The moments of a run come from a seed.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor
from zygote import Zygote

from clue_ds.checkpoint import manifest, pickles

PRETRAIN = """
import json, os, signal, sys, threading, time
from clue_ds import dist
from clue_ds.pretrain import train
from clue_ds.pretrain.engine import Engine

moment = json.loads(sys.argv[1])
ours = moment["ranks"] is None or dist.rank() in moment["ranks"]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def wait_and_die():
    time.sleep(moment["seconds"])
    die()

def counted(function, number, then):
    calls = []
    def call(*arguments, **named):
        result = function(*arguments, **named)
        calls.append(0)
        if len(calls) == number and ours:
            then()
        return result
    return call

def die_in_the_middle_of_a_file():
    import torch
    original = torch.save
    def half(value, file, *arguments, **named):
        original(value, file, *arguments, **named)
        os.truncate(file if isinstance(file, str) else file.name, 1_000)
        die()
    torch.save = half

if moment["where"] == "after a step":
    later = lambda: threading.Thread(target=wait_and_die, daemon=True).start()
    Engine.step = counted(Engine.step, moment["number"], later)
elif moment["where"] == "in DeepSpeed's save":
    Engine.step = counted(Engine.step, moment["number"], die_in_the_middle_of_a_file)
train.main(sys.argv[2:])
"""


class Moment(NamedTuple):
    """When which ranks die (None: all): `seconds` after step `number` of this start."""

    number: int
    seconds: float = 0.0
    ranks: list[int] | None = None
    where: str = "after a step"


NEVER = Moment(0, where="never")


def start(
    zygote: Zygote, num_ranks: int, config: Path, moment: Moment, folder: Path
) -> list[tuple[int, str]]:
    """One start of the run `config`: exit status and standard error of every rank."""
    arguments = [json.dumps(moment._asdict()), "--config", str(config)]
    logs = [folder / f"{rank}.err" for rank in range(num_ranks)]
    statuses = zygote.run(PRETRAIN, arguments, environments(num_ranks), logs)
    return [(status, log.read_text()) for status, log in zip(statuses, logs, strict=True)]


def environments(num_ranks: int) -> list[dict[str, str]]:
    """The variables of each rank of a job on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(num_ranks)]


def state(run: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint by file and place: weights, moments, generators."""
    choice = manifest.newest(run)
    assert choice is not None
    found = {}
    for name in choice.manifest.files:
        path = choice.directory / name
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        elif path.suffix == ".pt":
            content = pickles.load(path)
        else:
            continue
        found.update(_tensors(content, f"step {choice.manifest.step} {name}"))
    return found


def _tensors(content: Any, place: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield place, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _tensors(value, f"{place} {key}")
    elif isinstance(content, list | tuple):
        for number, value in enumerate(content):
            yield from _tensors(value, f"{place} {number}")


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not equal bit for bit."""
    names = one.keys() | other.keys()
    return sorted(
        name
        for name in names
        if name not in one
        or name not in other
        or one[name].dtype != other[name].dtype
        or not torch.equal(one[name], other[name])
    )
