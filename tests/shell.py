"""Runs commands of a page in a folder, as a reader would who copies them into a shell.

bash takes a command apart: quotes, patterns, variables. Its words then run in a fork of one process
that has imported everything (zygote.py), because a clue-ds of its own takes seconds of a processor.
`launch` is asked what it would start, and as many ranks are forked. Processes of their own are the
service, what speaks with the hub, and what is launched in earnest.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from loopback_hub import TOKEN, Hub
from zygote import Zygote

ROOT = Path(__file__).resolve().parents[1]
ON_THE_HUB = {"ORG/NAME", "clue/roberta_chinese_clue_tiny"}

RANK = """
import os, sys
os.chdir(os.environ.pop("FOLDER"))
os.dup2(2, 1)
from clue_ds.cli import main
status = main(sys.argv[1:])
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)
"""


def write_programs(folder: Path) -> Path:
    """What bash finds first: a clue-ds that writes its words down, a make that only plans, and a
    curl that fails when it is refused."""
    scripts = {
        "clue-ds": f"printf '%s\\0' \"$@\" > '{folder}/words'",
        "curl": f'exec {shutil.which("curl")} --fail --silent --show-error "$@"',
        "make": f"exec {shutil.which('make')} --dry-run --directory '{ROOT}' \"$@\" > /dev/null",
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    return folder


class Shell:
    """`smaller`: a pattern of a command -> its options that get another value, or are appended.

    `real`: the commands that are launched in earnest. `hub`: what stands for the Hugging Face hub.
    """

    def __init__(
        self,
        zygote: Zygote,
        folder: Path,
        programs: Path,
        smaller: dict[str, dict[str, str]],
        real: tuple[str, ...] = (),
        hub: Hub | None = None,
    ) -> None:
        self._zygote, self._folder, self._programs = zygote, folder, programs
        self._smaller, self._real, self._hub = smaller, real, hub
        self._service: subprocess.Popen[str] | None = None
        self._port = _free_port()  # of the service, whatever port the page has

    def run(self, command: str) -> None:
        """Run a command, and fail with what it printed unless it succeeds."""
        written = self._programs / "words"
        written.unlink(missing_ok=True)
        bash = ["bash", "-c", command.replace(":8000/", f":{self._port}/")]
        _check(self._spawn(bash, f"{self._programs}{os.pathsep}"), command)
        if not written.exists():
            return
        words = written.read_text("utf-8").split("\0")[:-1]
        for pattern, options in self._smaller.items():
            if re.search(pattern, command):
                words = _with_options(words, options)
        if command in self._real:
            _check(self._spawn(["clue-ds", *words]), command)
        elif words[0] == "launch":
            self._ranks(words[1:])
        elif words[0] == "serve":
            self._serve(_with_options(words, {"--port": str(self._port)}))
        elif ON_THE_HUB & set(words):
            assert self._hub is not None, command
            _check(self._hub.run(self._folder, "-m", "clue_ds.cli", *words, token=TOKEN), command)
        else:
            self._fork([words])

    def _environment(self, first: str = "") -> dict[str, str]:
        path = f"{first}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "CLUE_DS": "clue-ds", "OMP_NUM_THREADS": "1"}

    def _spawn(self, words: list[str], first: str = "") -> subprocess.CompletedProcess[str]:
        environment = self._environment(first)
        return subprocess.run(
            words, cwd=self._folder, env=environment, capture_output=True, text=True
        )

    def _ranks(self, words: list[str]) -> None:
        """What `launch` starts: as many ranks as it says, or one."""
        place = words.index("--")
        self._fork([["launch", "--dry-run", *words]])
        number = int(words[words.index("--local") + 1]) if "--local" in words[:place] else 1
        self._fork([words[place + 1 :]] * number)

    def _fork(self, ranks: list[list[str]]) -> None:
        variables = [{"FOLDER": str(self._folder)} for _ in ranks]
        if len(ranks) > 1:
            job = {"WORLD_SIZE": str(len(ranks)), "MASTER_ADDR": "127.0.0.1"}
            job["MASTER_PORT"] = str(_free_port())
            for rank, values in enumerate(variables):
                values |= {"RANK": str(rank), "LOCAL_RANK": str(rank), **job}
        logs = [self._programs / f"{rank}.log" for rank in range(len(ranks))]
        statuses = self._zygote.run(RANK, ranks[0], variables, logs)
        said = "\n".join(log.read_text("utf-8")[-3000:] for log in logs)
        assert statuses == [0] * len(ranks), f"clue-ds {' '.join(ranks[0])}\n{statuses}\n{said}"

    def _serve(self, words: list[str]) -> None:
        """Start the service that the next commands speak with; it is ready when this returns."""
        self.stop()
        self._service = subprocess.Popen(
            ["clue-ds", *words],
            cwd=self._folder,
            env=self._environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert self._service.stdout is not None
        said = []
        for line in self._service.stdout:
            said.append(line)
            if f":{self._port}" in line:
                return
        raise AssertionError("".join(said))

    def stop(self) -> None:
        """End the service, as an operator does."""
        if self._service is not None:
            self._service.send_signal(signal.SIGTERM)
            said, _ = self._service.communicate(timeout=60)
            assert self._service.returncode in (0, -signal.SIGTERM), said
            self._service = None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _with_options(words: list[str], options: dict[str, str]) -> list[str]:
    """The words of a command with these values; clue-ds refuses an option that is given twice."""
    words = list(words)
    for option, value in options.items():
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, value]
    return words


def _check(done: subprocess.CompletedProcess[str], command: str) -> None:
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
