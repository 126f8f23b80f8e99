"""A process that has imported everything once, and forks ranks: each starts in no time.

Importing torch and DeepSpeed takes a rank five seconds of a processor; a test of what happens to
ranks takes two. Requests are lines of JSON on standard input, answers lines of JSON on standard
output. No thread runs here when it forks. A rank has the environment of its request, but what is
read during the imports was read when the process started: a test of such a variable starts a
process of its own (`with Zygote() as own`). Ranks of one process also share the seed of Python's
hashes; those of tests/test_launcher.py and tests/cluster are started by the launcher and do not.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).resolve().parent
PATIENCE_S = 300


class Zygote:
    """The caller's side."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=_environment({"PYTHONPATH": str(HERE)}),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Zygote:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def run(
        self, code: str, arguments: list[str], variables: list[dict[str, str]], logs: list[Path]
    ) -> list[int]:
        """Run `code` as the main program of as many ranks as there are `variables`; statuses.

        The environment of a rank is the caller's with its `variables`. Standard error goes to
        `logs`. Ranks that are stopped when rank 0 has ended are killed.
        """
        environments = [_environment(of_rank) for of_rank in variables]
        request = {"code": code, "argv": ["-c", *arguments], "environments": environments}
        line = json.dumps({**request, "logs": list(map(str, logs))})
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())
        except BaseException:
            # A test that is interrupted here would leave its answer to the next one.
            self._process.kill()
            self._process.wait()
            raise

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


_shared: list[Zygote] = []


def shared() -> Zygote:
    """The one of this process of pytest, which starts with the first test that needs it."""
    if not _shared or not _shared[0].lives:
        _shared[:] = [Zygote()]
    return _shared[0]


def close_shared() -> None:
    while _shared:
        _shared.pop().close()


def _environment(more: dict[str, str]) -> dict[str, str]:
    ours = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": "1"}
    return {**os.environ, **ours, **more}


def _fork(request: dict[str, Any], rank: int) -> int:
    """The pid of a new rank, or 0 in the rank itself, which then is what it would be by itself."""
    pid = os.fork()
    if pid == 0:
        log = os.open(request["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 2)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.environ.clear()
        os.environ.update(request["environments"][rank])
        sys.argv = request["argv"]
    return pid


def _wait(pids: list[int]) -> list[int]:
    """Statuses as subprocess gives them; whoever is left after PATIENCE_S is killed."""
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE_S
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline or (pids[0] in statuses and _is_stopped(pid)):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return [statuses[pid] for pid in pids]


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def main() -> None:
    """Answer requests until standard input ends."""
    from clue_ds.checkpoint.deepspeed_import import import_deepspeed
    from clue_ds.pretrain import train as train
    from clue_ds.tasks.finetune import checks, command, run  # noqa: F401
    from clue_ds.tasks.predict import command as predict_command  # noqa: F401
    from clue_ds.tasks.predict import predictor  # noqa: F401

    import_deepspeed()
    # What test modules, the first optimizer and the first engine of a process import, for two
    # seconds more.
    import pytest  # noqa: F401
    import torch._dynamo  # noqa: F401
    from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401

    assert threading.active_count() == 1
    for line in sys.stdin:
        request = json.loads(line)
        pids = []
        for rank in range(len(request["environments"])):
            pid = _fork(request, rank)
            if pid == 0:
                exec(request["code"], {"__name__": "__main__"})
                return
            pids.append(pid)
        print(json.dumps(_wait(pids)), flush=True)


if __name__ == "__main__":
    main()
