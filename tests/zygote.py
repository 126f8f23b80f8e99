"""A process that has imported everything once, and forks ranks: each starts in no time.

Importing torch and DeepSpeed takes a rank six seconds of a processor; a test of what happens to
ranks takes two. Requests are lines of JSON on standard input, answers lines of JSON on standard
output. No thread runs here when it forks.
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
from typing import Any

HERE = Path(__file__).resolve().parent
PATIENCE_S = 300


class Zygote:
    """The caller's side."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(HERE)}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(
        self, code: str, arguments: list[str], variables: list[dict[str, str]], logs: list[Path]
    ) -> list[int]:
        """Run `code` as the main program of as many ranks as there are `variables`; statuses.

        Standard error goes to `logs`. Ranks that are stopped when rank 0 has ended are killed.
        """
        request = {"code": code, "argv": ["-c", *arguments], "variables": variables}
        line = json.dumps({**request, "logs": list(map(str, logs))})
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _fork(request: dict[str, Any], rank: int) -> int:
    """The pid of a new rank, or 0 in the rank itself, which then is what it would be by itself."""
    pid = os.fork()
    if pid == 0:
        log = os.open(request["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 2)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.environ.update(request["variables"][rank])
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
    # What the first optimizer and the first engine of a process import, for two seconds more.
    import torch._dynamo  # noqa: F401
    from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401

    assert threading.active_count() == 1
    for line in sys.stdin:
        request = json.loads(line)
        pids = []
        for rank in range(len(request["variables"])):
            pid = _fork(request, rank)
            if pid == 0:
                exec(request["code"], {"__name__": "__main__"})
                return
            pids.append(pid)
        print(json.dumps(_wait(pids)), flush=True)


if __name__ == "__main__":
    main()
