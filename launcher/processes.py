"""Runs a job to its end: true exit status, signals passed on, nothing left behind on any machine.

Guarantees: status 0 only when every rank said that it had finished; whatever ends this process,
INT, TERM or KILL, no rank outlives it by more than seconds; a rank that hangs can't keep the job
once another rank has said what is wrong, or has finished.

DeepSpeed 0.19.8's runner returns 0 when its child dies of a signal, leaves all ranks behind when it
is killed itself, and waits for ever for a host that is gone. Hence a session of its own for the
job, a directory in which ranks leave word, and a guard that ends the job when this process is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from . import environment as env
from .commands import SWEEP, Job
from .sweep import JOB_ID_VARIABLE, sweep_everywhere

# What a rank's word is called; the same names are in clue_ds/dist.py.
FINISHED, STOPPED, VERDICT, STOP_REQUEST = "finished-*", "stopped-*", "verdict.json", "stop"

# Stopped on request with everything saved: start again to continue (sysexits' EX_TEMPFAIL).
STATUS_STOPPED = 75
STATUS_DIED = 71
STATUS_HANG = 72
INTERNAL_ERROR = 1
SECONDS_TO_END = 10.0
# From a verdict until ranks that didn't leave by themselves are ended.
SECONDS_AFTER_VERDICT = 8.0
# Ranks end together: one that is still there this long after the first is stuck.
SECONDS_AFTER_FIRST_END = 100.0
POLL_SECONDS = 0.2
DEADLY = (
    *(signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS),
    *(signal.SIGABRT, signal.SIGILL, signal.SIGFPE),
)
# What launchers end with when a rank died of a signal: 128 + n (srun, mpirun) or -n (DeepSpeed).
DEATHS = {status: number for number in DEADLY for status in (128 + number, 256 - number)}


@contextlib.contextmanager
def job_directory(is_local: bool, identifier: str) -> Iterator[Path]:
    """Where ranks and launcher leave each other files; other machines must see it too."""
    if is_local:
        with tempfile.TemporaryDirectory(prefix="clue-ds-launch-") as name:
            yield Path(name)
        return
    folder = Path.cwd() / ".clue-ds" / f"launch-{identifier}"
    folder.mkdir(parents=True, mode=0o700)
    try:
        yield folder
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        with contextlib.suppress(OSError):  # another job's folder is in there
            folder.parent.rmdir()


def complete(job: Job, user: env.Variables, identifier: str, folder: Path) -> env.Variables:
    """The whole environment of the job's command."""
    own = {env.JOB_DIR_VARIABLE: str(folder), JOB_ID_VARIABLE: identifier}
    if job.hosts:
        own[env.HOSTS_VARIABLE] = env.hosts_variable(job.hosts)
    if job.env_file is not None:
        # DeepSpeed joins this to two directories; an absolute path stays what it is.
        own["DS_ENV_FILE"] = str(folder / "deepspeed_env")
    kept = {k: v for k, v in user.items() if k not in job.removed}
    return {**job.variables, **kept, **_ours_first(job.variables), **own}


def _ours_first(variables: env.Variables) -> env.Variables:
    """Where rank 0 is, is this job's matter: a variable left over from another is no wish."""
    ours = ("MASTER_ADDR", "PDSH_SSH_ARGS_APPEND", env.MAX_RESTARTS_VARIABLE)
    return {k: v for k, v in variables.items() if k in ours}


def run(job: Job, user: env.Variables, identifier: str, folder: Path) -> int:
    """Run the job; returns its true exit status."""
    environment = complete(job, user, identifier, folder)
    if job.env_file is not None:
        own = {k: environment[k] for k in (env.JOB_DIR_VARIABLE, JOB_ID_VARIABLE)}
        own[env.HOSTS_VARIABLE] = environment[env.HOSTS_VARIABLE]
        env.write_env_file(folder / "deepspeed_env", {**job.env_file, **own})
    if job.hostfile:
        lines = (f"{host.name} slots={host.slots}\n" for host in job.hosts)
        (folder / "hostfile").write_text("".join(lines), encoding="utf-8")
    sweeps = [[*command, identifier] for command in job.sweeps]
    process = subprocess.Popen(job.command, env=environment, start_new_session=True)
    guarded = _guard(process.pid, identifier, folder, sweeps)
    with guarded, _signals(process.pid, identifier, sweeps, folder):
        status = _wait(process, folder)
        hangs = status is None
        if status is None or status:
            end_session(process.pid)
            sweep_everywhere(identifier, sweeps)
            status = process.wait() if status is None else status
    # A process that is still there now lost its parent: nobody else will end it.
    end_session(process.pid)
    if hangs and not (folder / VERDICT).exists():
        return _say_who_hangs(folder, job)
    return true_status(status, folder, job.num_ranks)


def _wait(process: subprocess.Popen[bytes], folder: Path) -> int | None:
    """The command's status; None when the job is over and the command doesn't end."""
    deadline = float("inf")
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=POLL_SECONDS)
        now = time.monotonic()
        if (folder / VERDICT).exists():
            deadline = min(deadline, now + SECONDS_AFTER_VERDICT)
        elif _ended(folder):
            deadline = min(deadline, now + SECONDS_AFTER_FIRST_END)
        if now > deadline:
            return None


def _ended(folder: Path) -> set[int]:
    """Ranks that said that they had finished, or saved and stopped."""
    paths = (*folder.glob(FINISHED), *folder.glob(STOPPED))
    return {int(path.name.rpartition("-")[2]) for path in paths}


def _say_who_hangs(folder: Path, job: Job) -> int:
    hosts = [host.name for host in job.hosts for _ in range(host.slots)]
    stuck = sorted(set(range(job.num_ranks)) - _ended(folder))
    names = ", ".join(f"rank {r}" + (f" on {hosts[r]}" if hosts else "") for r in stuck)
    print(
        f"clue-ds launch: error: {names or 'the launcher below'} did not end within "
        f"{SECONDS_AFTER_FIRST_END:.0f} s after another rank had; what was to be saved is saved",
        file=sys.stderr,
    )
    return STATUS_HANG


def true_status(status: int, folder: Path, num_ranks: int) -> int:
    """What to exit with, from the command's status and from what the ranks left in `folder`."""
    verdict = folder / VERDICT
    if verdict.is_file():
        found = json.loads(verdict.read_text(encoding="utf-8"))
        if found["kind"] != "user error":
            print(f"clue-ds launch: error: {found['summary']}", file=sys.stderr)
        return int(found["status"])
    if status < 0:
        return 128 - status
    if num_ranks and status in DEATHS:
        if len(_ended(folder)) < num_ranks:
            print(
                "clue-ds launch: error: a rank was killed or has crashed "
                f"({DEATHS[status].name}; out of memory? `dmesg` on its host tells), and no other "
                "was left to say which one",
                file=sys.stderr,
            )
            return STATUS_DIED
        # Threads of gloo, and NCCL, may abort an interpreter that takes itself apart.
        print(
            "clue-ds launch: all ranks had done their work; one then ended by "
            f"{DEATHS[status].name}",
            file=sys.stderr,
        )
        status = 0
    if status or not num_ranks:
        return status
    num_finished = len(_ended(folder))
    if num_finished != num_ranks:
        print(
            f"clue-ds launch: error: only {num_finished} of {num_ranks} ranks said that they had "
            "finished, though the launcher below reported success. A rank was killed, or the "
            "working directory is not on a disk that all hosts share",
            file=sys.stderr,
        )
        return INTERNAL_ERROR
    return STATUS_STOPPED if any(folder.glob(STOPPED)) else 0


@contextlib.contextmanager
def _guard(session: int, identifier: str, folder: Path, sweeps: list[list[str]]) -> Iterator[None]:
    """Have a process of its own end the job if this one can't (SIGKILL, out of memory)."""
    arguments = ("--guard", str(session), identifier, str(folder), json.dumps(sweeps))
    guard = subprocess.Popen(
        [sys.executable, "-S", "-E", SWEEP, *arguments],
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
def _signals(
    session: int, identifier: str, sweeps: list[list[str]], folder: Path
) -> Iterator[None]:
    """INT, TERM and HUP end the job, then this process with the shell's 128 + number.

    One that whoever started us ignores stays ignored: nohup does so with HUP. USR1 asks the ranks
    to save and stop.
    """

    def end(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)
        end_session(session)
        sweep_everywhere(identifier, sweeps)
        raise SystemExit(128 + number)

    def ask(number: int, frame: FrameType | None) -> None:
        (folder / STOP_REQUEST).touch()

    endings = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {each: end for each in endings if signal.getsignal(each) != signal.SIG_IGN}
    handlers[signal.SIGUSR1] = ask
    before = {each: signal.signal(each, handler) for each, handler in handlers.items()}
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
