"""Runs a job to its end: correct exit status, signals forwarded, no process left on any machine.

Guarantees: the status is 0 only when every rank reported that it finished. INT and TERM let ranks
that can save do so, and this process waits for them; a second one ends the job at once. Whatever
ends this process, KILL too, no rank outlives it by more than seconds. A rank that hangs can't keep
the job alive once another rank has reported a failure or has finished.

DeepSpeed 0.19.8's runner returns 0 when its child is killed by a signal, leaves all ranks running
when it is killed itself, and waits forever for a host that is gone. Therefore a job gets its own
session, a directory where ranks leave reports, and a guard process that ends the job when this
process is gone.
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

from . import contract
from . import environment as env
from .commands import SWEEP, Job
from .sweep import JOB_ID_VARIABLE, sweep_everywhere

INTERNAL_ERROR = 1
SECONDS_TO_END = 10.0
# From a verdict until ranks that haven't ended by themselves are killed.
SECONDS_AFTER_VERDICT = 8.0
# Ranks end together: one that still runs this long after the first has ended is stuck.
SECONDS_AFTER_FIRST_END = 100.0
POLL_SECONDS = 0.2
DEADLY = (
    *(signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS),
    *(signal.SIGABRT, signal.SIGILL, signal.SIGFPE),
)
# Exit status of launchers when a signal killed a rank: 128 + n (srun, mpirun) or -n (DeepSpeed).
DEATHS = {status: number for number in DEADLY for status in (128 + number, 256 - number)}


@contextlib.contextmanager
def job_directory(is_local: bool, identifier: str) -> Iterator[Path]:
    """A directory in which ranks and launcher exchange files; other machines must see it too."""
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
        with contextlib.suppress(OSError):  # it may hold another job's folder
            folder.parent.rmdir()


def complete(job: Job, user: env.Variables, identifier: str, folder: Path) -> env.Variables:
    """The complete environment of the job's command."""
    own = {contract.JOB_DIR_VARIABLE: str(folder), JOB_ID_VARIABLE: identifier}
    if job.hosts:
        own[contract.HOSTS_VARIABLE] = env.hosts_variable(job.hosts)
    if job.env_file is not None:
        # DeepSpeed joins this with two directories, which leaves an absolute path unchanged.
        own["DS_ENV_FILE"] = str(folder / "deepspeed_env")
    kept = {k: v for k, v in user.items() if k not in job.removed}
    return {**job.variables, **kept, **_ours_first(job.variables), **own}


def _ours_first(variables: env.Variables) -> env.Variables:
    """Variables of this job that override the user's, whose values are left from another job."""
    ours = ("MASTER_ADDR", "PDSH_SSH_ARGS_APPEND", "PYTHONUTF8", contract.MAX_RESTARTS_VARIABLE)
    return {k: v for k, v in variables.items() if k in ours}


def run(
    job: Job, user: env.Variables, identifier: str, folder: Path, can_stop: bool = False
) -> int:
    """Run the job; returns its exit status. `can_stop`: its ranks can save and stop on request."""
    environment = complete(job, user, identifier, folder)
    if job.env_file is not None:
        own = {k: environment[k] for k in (contract.JOB_DIR_VARIABLE, JOB_ID_VARIABLE)}
        own[contract.HOSTS_VARIABLE] = environment[contract.HOSTS_VARIABLE]
        env.write_env_file(folder / "deepspeed_env", {**job.env_file, **own})
    if job.hostfile:
        lines = (f"{host.name} slots={host.slots}\n" for host in job.hosts)
        (folder / "hostfile").write_text("".join(lines), encoding="utf-8")
    sweeps = [[*command, identifier] for command in job.sweeps]
    process = subprocess.Popen(job.command, env=environment, start_new_session=True)
    guarded = _guard(process.pid, identifier, folder, sweeps)
    with guarded, _signals(process.pid, identifier, sweeps, folder, can_stop):
        status = _wait(process, folder)
        hangs = status is None
        if status is None or status:
            (folder / contract.END_FILE).touch()
            end_session(process.pid)
            sweep_everywhere(identifier, sweeps)
            status = process.wait() if status is None else status
    # Processes that still run have lost their parent, so nobody else would end them.
    end_session(process.pid)
    if hangs and not (folder / contract.VERDICT_FILE).exists():
        return _say_who_hangs(folder, job)
    return true_status(status, folder, job.num_ranks)


def _wait(process: subprocess.Popen[bytes], folder: Path) -> int | None:
    """The command's status; None when the job is over but the command doesn't end."""
    deadline = float("inf")
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=POLL_SECONDS)
        now = time.monotonic()
        if (folder / contract.VERDICT_FILE).exists():
            deadline = min(deadline, now + SECONDS_AFTER_VERDICT)
        elif _ended(folder):
            deadline = min(deadline, now + SECONDS_AFTER_FIRST_END)
        if now > deadline:
            return None


def _ended(folder: Path) -> set[int]:
    """Ranks that reported that they finished, or saved and stopped."""
    paths = (*folder.glob(f"{contract.FINISHED}-*"), *folder.glob(f"{contract.STOPPED}-*"))
    return {int(path.name.rpartition("-")[2]) for path in paths}


def _say_who_hangs(folder: Path, job: Job) -> int:
    hosts = [host.name for host in job.hosts for _ in range(host.slots)]
    stuck = sorted(set(range(job.num_ranks)) - _ended(folder))
    names = ", ".join(f"rank {r}" + (f" on {hosts[r]}" if hosts else "") for r in stuck)
    print(
        f"clue-ds launch: error: {names or 'the launcher of the ranks'} did not end within "
        f"{SECONDS_AFTER_FIRST_END:.0f} s after another rank had; everything that had to be saved "
        "has been saved",
        file=sys.stderr,
    )
    return contract.STATUS_HANG


def true_status(status: int, folder: Path, num_ranks: int) -> int:
    """The exit status of the job, from the command's status and the ranks' files in `folder`."""
    verdict = folder / contract.VERDICT_FILE
    if verdict.is_file():
        found = json.loads(verdict.read_text(encoding="utf-8"))
        if found["kind"] != "user error":
            print(f"clue-ds launch: error: {found['summary']}", file=sys.stderr)
        return int(found["status"])
    if status < 0:
        return 128 - status
    if num_ranks and status in DEATHS:
        if len(_ended(folder)) < num_ranks:
            number = DEATHS[status]
            cause = (
                "a mapped file, such as a shard of the corpus, was cut off, or its disk failed"
                if number == signal.SIGBUS
                else "out of memory? see `dmesg` on its host"
            )
            print(
                "clue-ds launch: error: a rank was killed or has crashed "
                f"({number.name}; {cause}), and no other rank was left to report which one",
                file=sys.stderr,
            )
            return contract.STATUS_DIED
        # gloo's threads and NCCL may abort a Python process while it shuts down.
        print(
            f"clue-ds launch: all ranks had finished; one was then ended by {DEATHS[status].name}",
            file=sys.stderr,
        )
        status = 0
    if status or not num_ranks:
        return status
    num_finished = len(_ended(folder))
    if num_finished != num_ranks:
        print(
            f"clue-ds launch: error: only {num_finished} of {num_ranks} ranks reported that they "
            "finished, although the launcher of the ranks returned success. A rank was killed, or "
            "the working directory is not on a disk that all hosts share",
            file=sys.stderr,
        )
        return INTERNAL_ERROR
    return contract.STATUS_STOPPED if any(folder.glob(f"{contract.STOPPED}-*")) else 0


@contextlib.contextmanager
def _guard(session: int, identifier: str, folder: Path, sweeps: list[list[str]]) -> Iterator[None]:
    """Start a process that ends the job if this one can't (SIGKILL, out of memory)."""
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
    session: int, identifier: str, sweeps: list[list[str]], folder: Path, can_stop: bool
) -> Iterator[None]:
    """INT, TERM and HUP end the job, then this process with the shell's status, 128 + number.

    If the ranks can save and stop, USR1 and the first INT or TERM ask them to, and only the second
    INT or TERM ends the job. A signal that was ignored at the start stays ignored (nohup ignores
    HUP).
    """

    def end(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)
        (folder / contract.END_FILE).touch()
        end_session(session)
        sweep_everywhere(identifier, sweeps)
        raise SystemExit(128 + number)

    def ask(number: int, frame: FrameType | None) -> None:
        (folder / contract.STOP_FILE).touch()

    def ask_first(number: int, frame: FrameType | None) -> None:
        for each in softly:
            signal.signal(each, end)
        ask(number, frame)
        with contextlib.suppress(OSError):  # Ctrl-C may have ended the reader of our output
            print(
                f"clue-ds launch: {signal.Signals(number).name} received: the ranks save and stop; "
                "a second signal ends them at once, without saving",
                file=sys.stderr,
                flush=True,
            )

    endings = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {each: end for each in endings if signal.getsignal(each) != signal.SIG_IGN}
    softly = [each for each in handlers if can_stop and each != signal.SIGHUP]
    handlers |= {each: ask_first for each in softly}
    handlers[signal.SIGUSR1] = ask
    before = {each: signal.signal(each, handler) for each, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_session(session: int) -> None:
    """Send TERM to every process of the session, KILL after SECONDS_TO_END; wait for the last one.

    The session's leader is our child and is reaped here; otherwise it would count as running.
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
        # TERM is sent once; 0 only tests for processes, until it is time for KILL.
        number = signal.SIGKILL if time.monotonic() > deadline else 0
