"""Which machines a job may use: a hostfile, a Slurm allocation, or this machine.

Guarantees: a hostfile that is missing or empty, repeats a host, or has a line that DeepSpeed can't
read is an error with the line's number (DeepSpeed would start one local process and return 0).
Every host must answer ssh before a rank is started on any of them.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .errors import LaunchError

HOSTFILE_LINE = re.compile(r"(?P<host>\S+)\s+slots=(?P<slots>[0-9]{1,6})\s*(#.*)?")
HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
EXAMPLE = "a line looks like: node-1 slots=8"
SECONDS_FOR_SSH = 10
# Never ask for a password, which nobody could enter; end the session 10 s after a link breaks.
SSH_OPTIONS = (
    *("-o", "BatchMode=yes", "-o", f"ConnectTimeout={SECONDS_FOR_SSH}"),
    *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=2"),
)


class Host(NamedTuple):
    """A machine and the number of ranks that it runs."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of an MPI-style hostfile, in its order."""
    if not path.is_file():
        reason = "is a directory" if path.is_dir() else "does not exist"
        raise LaunchError(f"hostfile {path} {reason}; {EXAMPLE}")
    hosts: dict[str, Host] = {}
    for number, text in lines_of(path, f"hostfile {path}"):
        line = text.strip()
        if not line or line.startswith("#"):
            continue
        where = f"hostfile {path}, line {number}"
        match = HOSTFILE_LINE.fullmatch(line)
        if match is None:
            raise LaunchError(f"{where}: {line[:100]!r} is not a valid line; {EXAMPLE}")
        host = Host(match["host"], int(match["slots"]))
        if "@" in host.name:
            user, _, name = host.name.rpartition("@")
            raise LaunchError(
                f"{where}: {host.name[:100]!r} names a user, which a hostfile can't; write "
                f"{name[:100]} here, and these two lines in ~/.ssh/config: `Host {name[:100]}`, "
                f"`User {user[:100]}`"
            )
        if not HOST_NAME.fullmatch(host.name):
            raise LaunchError(f"{where}: {host.name[:100]!r} is not a host name; {EXAMPLE}")
        if host.slots < 1:
            raise LaunchError(
                f"{where}: {host.name} has no slots; give it one per rank, or delete it"
            )
        if host.name in hosts:
            raise LaunchError(
                f"{where}: {host.name} appears twice; keep one line with all its slots"
            )
        hosts[host.name] = host
    if not hosts:
        raise LaunchError(f"hostfile {path} names no host; {EXAMPLE}")
    if len(hosts) > 1:
        _refuse_loopback(path, list(hosts))
    return list(hosts.values())


def lines_of(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """The numbered lines of a small UTF-8 file; a byte order mark at its beginning is skipped."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError:
            raise LaunchError(
                f"{name}, line {number}: not UTF-8 text (a comment in another encoding?); save the "
                "file as UTF-8"
            ) from None


def _refuse_loopback(path: Path, names: list[str]) -> None:
    for name in names:
        if name == "localhost" or name.startswith("127."):
            raise LaunchError(
                f"hostfile {path}: {name} is a different machine on every host; write the name by "
                "which the other hosts reach it"
            )


def addresses(hosts: list[Host]) -> dict[str, list[str]]:
    """The addresses of each host, from `hostname -I` over ssh on all hosts at once.

    LaunchError lists every host that doesn't answer, with the message of ssh.
    """
    asked = {}
    for host in hosts:
        # Files instead of pipes, because a full pipe would block a host that prints a lot.
        files = tuple(tempfile.TemporaryFile("w+", errors="replace") for _ in range(2))
        command = ["ssh", *SSH_OPTIONS, host.name, "hostname", "-I"]
        stdin, (stdout, stderr) = subprocess.DEVNULL, files
        asked[host.name] = (
            subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr),
            files,
        )
    found, silent = {}, []
    for name, (process, (stdout, stderr)) in asked.items():
        try:
            status = process.wait(timeout=2 * SECONDS_FOR_SSH)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        stdout.seek(0)
        stderr.seek(0)
        if status == 0:
            found[name] = stdout.read().split()
        else:
            said = stderr.read(10_000).strip().splitlines() or [f"ssh ended with {status}"]
            silent.append(f"{name}: {said[-1]}")
    if silent:
        raise LaunchError(
            f"{len(silent)} of {len(hosts)} hosts can't be reached by ssh: {'; '.join(silent)}. "
            "`ssh HOST hostname` must work without a password from here"
        )
    return found


def master_address(host: str, own: list[str]) -> str:
    """An address of `host` that the other hosts can use; `own` are all its addresses."""
    try:
        resolved = socket.gethostbyname(host)
    except OSError:
        resolved = ""
    # Debian maps a machine's own name to 127.0.1.1, which other hosts can't use.
    if resolved in own or not own:
        return resolved or host
    return next((a for a in own if ipaddress.ip_address(a).version == 4), own[0])


def slurm_nodes(environment: dict[str, str]) -> list[str]:
    """The names of the nodes of this allocation, in Slurm's order."""
    names = environment.get("SLURM_JOB_NODELIST", "")
    return _ask_slurm("show", "hostnames", names).split()


def slurm_address(node: str) -> str:
    """A node's address according to Slurm, because its name need not resolve."""
    match = re.search(r"NodeAddr=(\S+)", _ask_slurm("-o", "show", "node", node))
    return match[1] if match else node


def _ask_slurm(*arguments: str) -> str:
    command = ["scontrol", *arguments]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=True
        ).stdout
    except FileNotFoundError:
        raise LaunchError(
            "this looks like a Slurm job, but scontrol is not in PATH; add Slurm's commands to it"
        ) from None
    except subprocess.CalledProcessError as error:
        raise LaunchError(f"{' '.join(command)} failed: {error.stderr.strip()}") from None


def num_local_devices(environment: dict[str, str]) -> int:
    """The number of GPUs that this process may use, found without torch."""
    present = len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if not present or visible is None:
        return present
    return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
