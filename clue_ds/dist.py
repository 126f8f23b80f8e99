"""The rank of this process, from the environment that launchers set, its device, and small
collectives.

Guarantees: importing this module starts nothing; every function also works in a single process that
no launcher started. An error that occurs on all ranks is printed once.

Rejected: asking torch.distributed for the rank, because a wrong config must be reported before
there is a process group.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from clue_ds.errors import UserError
from clue_ds.launcher.contract import (
    FINISHED,
    JOB_DIR_VARIABLE,
    STATUS_STOPPED,
    STATUS_USER_ERROR,
    STOPPED,
)
from clue_ds.settings import variables

if TYPE_CHECKING:  # which takes a second to import
    import torch

# deepspeed and torchrun; OpenMPI; MPICH and Intel MPI.
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
WORLD_SIZE_VARIABLES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
LOCAL_RANK_VARIABLES = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
# srun. The first one exists only in tasks of a job step; a batch script has a SLURM_PROCID, too.
SLURM_VARIABLES = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")

T = TypeVar("T")

# Ranks of one job start at most this far apart; rank 0 prints an error within this time.
SECONDS_FOR_RANK_0_TO_REPORT = 10.0
# Once the ranks have met, they run together, and rank 0 finds its own error sooner.
SECONDS_AFTER_MEETING = 1.0


def _from_environment(names: tuple[str, ...], slurm: str, default: int) -> int:
    if os.environ.get(SLURM_VARIABLES[0]):
        names = (*names, slurm)
    found = (variables.number(name) for name in names)
    return next((value for value in found if value is not None), default)


def rank() -> int:
    """This process' number among all ranks, from 0."""
    return _from_environment(RANK_VARIABLES, SLURM_VARIABLES[1], 0)


def world_size() -> int:
    """Number of ranks."""
    return _from_environment(WORLD_SIZE_VARIABLES, SLURM_VARIABLES[0], 1)


def local_rank() -> int:
    """This process' number among the ranks of its machine, from 0."""
    return _from_environment(LOCAL_RANK_VARIABLES, SLURM_VARIABLES[2], 0)


def device() -> torch.device:
    """torch's accelerator (CUDA and ROCm, XPU, NPU and others), or the CPU where there is none.

    It has no number, so it is the one that this process has chosen. DeepSpeed's own variable
    DS_ACCELERATOR=cpu chooses the CPU. What an accelerator has of its own is in
    `torch.get_device_module(device)`, which is `torch.cuda` for CUDA.
    """
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    return found


def device_name(of: torch.device) -> str:
    """What its maker calls an accelerator (`NVIDIA H200`), or cpu."""
    import torch

    return "cpu" if of.type == "cpu" else torch.get_device_module(of).get_device_name(of)


def fork_random_state(of: torch.device) -> AbstractContextManager[None]:
    """What is drawn in the block, on the host and on a device, changes nothing after it."""
    import torch

    if of.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([of], device_type=of.type)


def is_launched() -> bool:
    """Whether a launcher started this process, rather than a shell."""
    names = (RANK_VARIABLES[0], JOB_DIR_VARIABLE)
    # A world of one, as in an interactive shell of srun or mpirun, is no launcher.
    return world_size() > 1 or any(os.environ.get(name) for name in names)


def has_met() -> bool:
    """Whether there is a process group; without torch, which takes a second to import, is none."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


def barrier() -> None:
    """Wait until every rank has called this."""
    if has_met():
        import torch.distributed

        # Without a device NCCL takes the current one, which is right, but warns in every run's log.
        is_nccl = torch.distributed.get_backend() == "nccl"
        devices = [torch.accelerator.current_device_index()] if is_nccl else None
        torch.distributed.barrier(device_ids=devices)


def broadcast(value: Any) -> Any:
    """Rank 0's `value` on every rank. It is pickled: small objects of this job only."""
    if not has_met():
        return value
    import torch.distributed

    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def all_reduce(values: list[float]) -> list[float]:
    """Element-wise sums over all ranks, in double precision."""
    if not has_met():
        return values
    import torch.distributed

    on_host = torch.distributed.get_backend() == "gloo"
    tensor = torch.tensor(values, dtype=torch.float64, device="cpu" if on_host else device())
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()


def all_gather(value: Any) -> list[Any]:
    """Every rank's `value` on every rank, in the order of ranks; small Python objects."""
    if not has_met():
        return [value]
    import torch.distributed

    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def agree(error: str | None) -> None:
    """Raise the UserError of the lowest rank that has one on every rank, so that no rank waits."""
    for number, message in enumerate(all_gather(error)):
        if message is not None:
            raise UserError(message if number == 0 else f"rank {number}: {message}")


def on_all_ranks(work: Callable[[], T]) -> T:
    """The result of `work` on this rank; a UserError that it raises on any rank ends all of them.

    `work` must not wait for other ranks.
    """
    results: list[T] = []
    error = None
    try:
        results.append(work())
    except UserError as refusal:
        error = str(refusal)
    agree(error)
    return results[0]


@contextmanager
def report_errors_once() -> Iterator[None]:
    """Let only rank 0 report a UserError, or a wrong command line, that occurs on every rank.

    The other ranks wait, because launchers end the job when the first rank has ended. An error that
    rank 0 does not have is reported after that, with the number of the rank. A rank that saved and
    stopped on request has nothing to report and does not wait.
    """
    try:
        yield
    except SystemExit as end:
        if rank() > 0 and end.code == STATUS_USER_ERROR:
            _wait_for_rank_0()
        raise
    except UserError as error:
        if rank() == 0:
            raise
        _wait_for_rank_0()
        prefix = "" if str(error).startswith("rank ") else f"rank {rank()}: "
        raise UserError(f"{prefix}{error}") from None


def _wait_for_rank_0() -> None:
    time.sleep(SECONDS_AFTER_MEETING if has_met() else SECONDS_FOR_RANK_0_TO_REPORT)


def job_dir() -> Path | None:
    """Directory in which ranks and `clue-ds launch` exchange files; None without that launcher."""
    directory = os.environ.get(JOB_DIR_VARIABLE)
    return Path(directory) if directory and Path(directory).is_dir() else None


def report_end(stopped: bool) -> None:
    """Tell `clue-ds launch` that this rank is done, or that it saved and stopped on request.

    Under that launcher a rank leaves a file and exits with 0: a file, because DeepSpeed's runner
    returns 0 when its child dies of a signal and MPICH loses exit statuses; 0, because srun would
    otherwise end the other ranks. Without the launcher, a rank that stopped exits with
    STATUS_STOPPED.
    """
    directory = job_dir()
    if directory is not None:
        (directory / f"{STOPPED if stopped else FINISHED}-{rank()}").touch()
    elif stopped:
        raise SystemExit(STATUS_STOPPED)
