"""Ends the leftover processes of a job, on this machine or, as a guard, on all its machines.

    sweep.py JOB_ID                          end every process of this user that belongs to the job
    sweep.py --guard SESSION JOB_ID FOLDER COMMANDS
                                             wait until standard input closes, then end the session,
                                             sweep this machine, run each command of the JSON list,
                                             and remove the job's folder

Guarantees: a process is ended only if it belongs to this user and was started with this job's
identifier in its environment; processes are never chosen by name. This is a separate script that is
started by its path with -S -E, so that it needs no site-packages and starts in 30 ms on a remote
machine.

Rejected: DeepSpeed's clean-up, `pkill -f`, which ends every DeepSpeed job of that interpreter.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

# Set in the environment of every process that `clue-ds launch` starts.
JOB_ID_VARIABLE = "CLUE_DS_JOB_ID"
SECONDS_BEFORE_KILL = 2.0
# A machine that doesn't answer must not delay the sweep of the others for longer.
SECONDS_FOR_A_HOST = 30.0


def processes_of(job_id: str) -> list[int]:
    """Process ids of this job on this machine, except this process."""
    wanted = f"{JOB_ID_VARIABLE}={job_id}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        # The process may have ended meanwhile, or belong to another user.
        with contextlib.suppress(OSError):
            mine = folder.stat().st_uid == os.getuid() and int(folder.name) != os.getpid()
            if mine and wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def sweep(job_id: str) -> int:
    """Send KILL to every process of the job on this machine; returns their number.

    Repeats until none is found, because a process may be starting another one at that moment.
    """
    num_ended = 0
    while found := processes_of(job_id):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        num_ended += len(found)
        time.sleep(0.1)
        if num_ended > 10_000:
            break
    return num_ended


def sweep_everywhere(job_id: str, commands: list[list[str]]) -> None:
    """Sweep this machine and, at the same time, run the commands that sweep the others."""
    started = [
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={k: v for k, v in os.environ.items() if k != JOB_ID_VARIABLE},
        )
        for command in commands
    ]
    sweep(job_id)
    deadline = time.monotonic() + SECONDS_FOR_A_HOST
    for process in started:
        try:
            process.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def guard(session: int, job_id: str, folder: str, commands: list[list[str]]) -> None:
    """Wait until the launcher has ended for any reason, then end its job and clean up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(session, number)
        except ProcessLookupError:
            break
        time.sleep(SECONDS_BEFORE_KILL)
    sweep_everywhere(job_id, commands)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1] == "--guard":
        guard(int(sys.argv[2]), sys.argv[3], sys.argv[4], json.loads(sys.argv[5]))
    else:
        sweep(sys.argv[1])
