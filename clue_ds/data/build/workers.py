"""Where tasks run: in this process, in a pool of processes, or on the ranks of an MPI job.

`Workers` hides which of the three it is. A task names its function ("module:function"), which is
imported where it runs, so the process that reads the input doesn't load the compiled code and the
dictionaries, 150 MiB of memory.
Under `mpirun -n N` rank 0 reads the input and keeps the records, and the other N - 1 ranks convert
(mpi4py.futures). Every rank calls the same verb with the same arguments.
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
from clue_ds.settings import variables

Label = TypeVar("Label")
# Environment variables that hold the size of the job: those of Open MPI, of MPICH, Intel MPI and
# srun --mpi=pmi2, and of MVAPICH2.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def mpi_size() -> int:
    """Number of processes of this MPI job; 1 when this process was started without MPI."""
    names = ("SLURM_NTASKS", *_SIZES) if os.environ.get("PMIX_RANK") else _SIZES
    found = (variables.number(name) for name in names)
    return next((value for value in found if value is not None), 1)


class Workers:
    """Runs tasks in an executor, or in this process if there is none."""

    def __init__(self, executor: Executor | None, num_workers: int) -> None:
        self._executor = executor
        self.num_workers = num_workers

    def run(
        self, function: str, tasks: Iterable[tuple[Label, tuple[Any, ...]]]
    ) -> Iterator[tuple[Label, Any]]:
        """Run `function` for each (label, arguments); yield (label, result) as tasks finish.

        At most num_workers + 1 tasks are taken from `tasks` before one of them is finished.
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
    """The workers; None on an MPI rank that was a worker and whose work is done."""
    if mpi_size() > 1:
        if num_workers is not None:
            raise UserError(
                "--workers is for one machine; under MPI, leave it out and set the number of "
                "processes with mpirun -n"
            )
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
    """A pool of processes, each of which first calls `prepare`; none of them outlives this process.

    Ctrl-C ends them at once and without a traceback. They are spawned, because a process that was
    forked from one with threads (torch, tokenizers, numba) can hang.
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
    # A terminal sends Ctrl-C to all its processes. The pool's owner handles it and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with_owner, daemon=True).start()
    if prepare is not None:
        prepare(*arguments)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _end_with_owner() -> None:
    """End this process when the pool's owner ends, because a killed owner can't stop its pool."""
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
            f"this is one of {mpi_size()} processes of an MPI job, but mpi4py can't be imported "
            f"({error}); install it for the MPI library of this mpirun with "
            "`pip install 'clue_ds[mpi]'`"
        ) from None
    if MPI.COMM_WORLD.Get_size() != mpi_size():
        raise UserError(
            f"mpirun started {mpi_size()} processes, but mpi4py sees "
            f"{MPI.COMM_WORLD.Get_size()}, because it uses another MPI library than mpirun; use "
            "the mpirun of that library, or install mpi4py for this one"
        )
    executor: Any  # an Executor on rank 0, None on the others
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        yield None if executor is None else Workers(executor, MPI.COMM_WORLD.Get_size() - 1)
