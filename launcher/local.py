"""`clue-ds launch --local N -- pretrain ...`: ranks on this machine, by deepspeed's launcher.

Guarantees: the exit status is true (0 only when every rank said that it had finished, 2 for a
user's mistake); whatever ends this process, INT, TERM or KILL, no rank outlives it by more than
seconds; the command can be printed instead of run. Standard library only: it must start on a login
node that has no torch.

DeepSpeed 0.19.8's runner returns 0 when its child dies of a signal, and leaves all ranks behind
when it is killed itself. Hence a session of its own for the job, a file that each rank leaves when
it has finished, and a guard that kills the session when this process is gone.

Rejected: DeepSpeed's own clean-up, which kills every DeepSpeed job of the same interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

# Verbs that know about ranks, and the module that runs them.
MODULES = {"pretrain": "clue_ds.pretrain.train", "finetune": "clue_ds.tasks.grid"}

# The same names are in clue_ds/dist.py, which this file may not import.
FINISHED_DIR_VARIABLE = "CLUE_DS_FINISHED_DIR"

SECONDS_TO_END = 10.0
INTERNAL_ERROR = 1

# Reads until the write end of its stdin closes, which happens however the launcher ends; then it
# ends the session that it is told. A job that has already ended is no error.
GUARD = """
import os, signal, sys, time
session = int(sys.argv[1])
sys.stdin.buffer.read()
for number in (signal.SIGTERM, signal.SIGKILL):
    try:
        os.killpg(session, number)
    except ProcessLookupError:
        break
    time.sleep(float(sys.argv[2]))
"""

USAGE_EXAMPLE = "example: clue-ds launch --local 2 -- pretrain --config run.yaml --train.steps 100"


def main(argv: list[str]) -> None:
    """Run a verb on several ranks of this machine (`clue-ds launch --help`)."""
    arguments = _parse(argv)
    environment = job_environment(arguments.local, dict(os.environ))
    command = job_command(arguments.local, arguments.verb, environment["MASTER_PORT"])
    if arguments.dry_run:
        print(format_command(command, environment))
        return
    status = run(command, environment, arguments.local)
    if status:
        raise SystemExit(status)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="clue-ds launch",
        description="Run a verb on several ranks of this machine, by DeepSpeed's launcher.",
        epilog=USAGE_EXAMPLE,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--local",
        type=int,
        required=True,
        metavar="N",
        help="ranks on this machine: one a GPU, or as many as you like on a CPU",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the command instead of running it"
    )
    parser.add_argument(
        "verb",
        nargs=argparse.REMAINDER,
        metavar="-- VERB ...",
        help=f"what to run, after two dashes: {', '.join(MODULES)} and its arguments",
    )
    arguments = parser.parse_args(argv)
    if arguments.verb[:1] == ["--"]:
        arguments.verb = arguments.verb[1:]
    if arguments.local < 1:
        parser.error(f"--local {arguments.local}: there must be at least one rank")
    if not arguments.verb or arguments.verb[0] not in MODULES:
        given = arguments.verb[0] if arguments.verb else "nothing"
        parser.error(f"after -- give one of: {', '.join(MODULES)}; not {given}. {USAGE_EXAMPLE}")
    return arguments


def has_gpu() -> bool:
    """Whether there is an NVIDIA device; asking torch would need torch."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def job_environment(num_ranks: int, inherited: dict[str, str]) -> dict[str, str]:
    """The ranks' environment: what the user set, and defaults for what was left open."""
    defaults = {
        "MASTER_PORT": str(free_port()),
        # Each rank takes its share of the cores; together they would otherwise take N times all.
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // num_ranks)),
        # Without it a folder `kernels/` in the working directory hides packages of that name.
        "PYTHONSAFEPATH": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not has_gpu():
        defaults["DS_ACCELERATOR"] = "cpu"
    return {**defaults, **inherited}


def job_command(num_ranks: int, verb: list[str], port: str) -> list[str]:
    """The deepspeed command for `verb` and its arguments, with this interpreter."""
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        # Without it DeepSpeed looks for a hostfile of the machine's and would start ssh.
        "--hostfile=/dev/null",
        f"--num_gpus={num_ranks}",
        f"--master_port={port}",
        "--quiet",
        "--no_local_rank",
        "--module",
        MODULES[verb[0]],
        *verb[1:],
    ]


def format_command(command: list[str], environment: dict[str, str]) -> str:
    """The command as a shell line, with the variables that differ from this environment."""
    changed = {k: v for k, v in environment.items() if os.environ.get(k) != v}
    assignments = [f"{key}={shlex.quote(value)}" for key, value in sorted(changed.items())]
    return " ".join([*assignments, shlex.join(command)])


def run(command: list[str], environment: dict[str, str], num_ranks: int) -> int:
    """Run the job to its end; returns its true exit status."""
    with tempfile.TemporaryDirectory(prefix="clue-ds-launch-") as finished_dir:
        environment = {**environment, FINISHED_DIR_VARIABLE: finished_dir}
        job = subprocess.Popen(command, env=environment, start_new_session=True)
        with _guard(job.pid), _ends_on_signals(job.pid):
            status = job.wait()
        # A rank that is still there now lost its parent: nobody else will end it.
        end_session(job.pid)
        return true_status(status, len(os.listdir(finished_dir)), num_ranks)


def true_status(status: int, num_finished: int, num_ranks: int) -> int:
    """What to exit with: the launcher's status, unless it says 0 and not all ranks finished."""
    if status < 0:
        return 128 - status
    if status == 0 and num_finished != num_ranks:
        print(
            f"clue-ds launch: error: {num_ranks - num_finished} of {num_ranks} ranks ended before "
            "they had finished, though DeepSpeed's launcher reported success",
            file=sys.stderr,
        )
        return INTERNAL_ERROR
    return status


@contextlib.contextmanager
def _guard(session: int) -> Iterator[None]:
    """Have a process of its own end the session if this one can't (SIGKILL, out of memory)."""
    guard = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", GUARD, str(session), "2"],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield
    finally:
        guard.kill()
        guard.wait()
        assert guard.stdin is not None
        guard.stdin.close()


@contextlib.contextmanager
def _ends_on_signals(session: int) -> Iterator[None]:
    """INT and TERM end the job first, then this process with the shell's 128 + number."""

    def end(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        end_session(session)
        raise SystemExit(128 + number)

    before = {each: signal.signal(each, end) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_session(session: int) -> None:
    """TERM to every process of the session, KILL after SECONDS_TO_END; returns when none is left.

    The leader is a child of ours and is reaped here, or it would count as alive.
    """
    deadline = time.monotonic() + SECONDS_TO_END
    number: int = signal.SIGTERM
    while True:
        try:
            os.killpg(session, number)
        except ProcessLookupError:
            return
        time.sleep(0.1)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(session, os.WNOHANG)
        # Asked once, waited for, then forced.
        number = signal.SIGKILL if time.monotonic() > deadline else 0
