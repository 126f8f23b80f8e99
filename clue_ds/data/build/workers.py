"""Who does the work: this process, a pool of processes, or the ranks of an MPI job.

All three are an Executor that runs functions with arguments, so nothing else knows which it is.
Functions are named ("module:function") and imported where they run: the process that reads the
input is spared the compiled code and the dictionaries, 150 MiB of memory.
Under `mpirun -n N` rank 0 reads and keeps the account, and the other N - 1 ranks convert
(mpi4py.futures); every rank calls the same verb with the same arguments.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from types import FrameType
from typing import Any, TypeVar

from clue_ds.errors import UserError

Label = TypeVar("Label")
# How launchers tell a process the size of its job: Open MPI; MPICH, Intel MPI and srun --mpi=pmi2.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def mpi_size() -> int:
    """Processes of the MPI job that this one belongs to; 1 when it was started without MPI."""
    if "PMIX_RANK" in os.environ and "SLURM_NTASKS" in os.environ:
        return int(os.environ["SLURM_NTASKS"])
    return next((int(os.environ[name]) for name in _SIZES if name in os.environ), 1)


class Workers:
    """Runs tasks; without an executor, in this process."""

    def __init__(self, executor: Executor | None, num_workers: int) -> None:
        self._executor = executor
        self.num_workers = num_workers

    def run(
        self, function: str, tasks: Iterable[tuple[Label, tuple[Any, ...]]]
    ) -> Iterator[tuple[Label, Any]]:
        """(label, function(*arguments)) of each (label, arguments), as they are done.

        Of the tasks, num_workers + 1 are taken at most before one is done.
        """
        if self._executor is None:
            for label, arguments in tasks:
                yield label, _call(function, *arguments)
            return
        pending: dict[Future[Any], Label] = {}
        try:
            for label, arguments in tasks:
                pending[self._executor.submit(_call, function, *arguments)] = label
                if len(pending) > self.num_workers:
                    yield from _take_done(pending)
            while pending:
                yield from _take_done(pending)
        finally:
            for future in pending:
                future.cancel()


def _call(function: str, *arguments: Any) -> Any:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(*arguments)


def _take_done(pending: dict[Future[Any], Label]) -> Iterator[tuple[Label, Any]]:
    done, _ = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        label = pending.pop(future)
        yield label, future.result()


@contextlib.contextmanager
def open_workers(num_workers: int | None) -> Iterator[Workers | None]:
    """The workers; None on an MPI rank that has served as one, and has nothing left to do."""
    if mpi_size() > 1:
        if num_workers is not None:
            raise UserError("--workers is for one machine; under MPI, mpirun -n says how many")
        with _mpi_ranks() as workers:
            yield workers
        return
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0))
    if num_workers < 1:
        raise UserError("--workers must be positive")
    if num_workers == 1:
        yield Workers(None, 1)
        return
    with spawned(num_workers) as pool:
        yield Workers(pool, num_workers)


@contextlib.contextmanager
def spawned(
    num_processes: int, prepare: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes, each of which calls `prepare` first; none outlives this one.

    Ctrl-C ends them at once and without a word. They are spawned: forking a process that has run
    threads (torch, tokenizers, numba) can hang.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_processes, context, _begin, (prepare, arguments))
    try:
        yield pool
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(prepare: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    # Ctrl-C reaches every process of a terminal; the pool's owner hears it and tells the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with_owner, daemon=True).start()
    if prepare is not None:
        prepare(*arguments)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _end_with_owner() -> None:
    """An idle process of a pool would wait for ever for one that was killed."""
    owner = multiprocessing.parent_process()
    assert owner is not None
    multiprocessing.connection.wait([owner.sentinel])
    os._exit(1)


@contextlib.contextmanager
def _mpi_ranks() -> Iterator[Workers | None]:
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"this is one of {mpi_size()} processes of an MPI job, and mpi4py can't be loaded "
            f"({error}); install it with `pip install 'clue_ds[mpi]'`, for the MPI of this mpirun"
        ) from None
    if MPI.COMM_WORLD.Get_size() != mpi_size():
        raise UserError(
            f"mpirun started {mpi_size()} processes, and mpi4py sees "
            f"{MPI.COMM_WORLD.Get_size()}: it was loaded with another MPI library than mpirun's; "
            "use the mpirun of that library, or install mpi4py for this one"
        )
    executor: Any  # an Executor on rank 0, None on the others
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        yield None if executor is None else Workers(executor, MPI.COMM_WORLD.Get_size() - 1)
