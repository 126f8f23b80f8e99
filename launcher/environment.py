"""What the ranks find in their environment: ours, what the user set, and `.deepspeed_env`.

Guarantees: what the user set wins over our defaults; two jobs of one machine don't take the same
port; `.deepspeed_env` may have comments and blank lines (DeepSpeed's own reader crashes on them),
and a value that a remote shell would change is refused; only names from an allow-list are printed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import socket
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from .errors import LaunchError
from .hosts import Host, num_cores, num_local_devices
from .sweep import JOB_ID_VARIABLE

# The same names are in clue_ds/dist.py, which this room may not import.
JOB_DIR_VARIABLE = "CLUE_DS_JOB_DIR"  # where ranks and launcher leave each other files
HOSTS_VARIABLE = "CLUE_DS_HOSTS"  # host:ranks,host:ranks in the order of ranks
MAX_RESTARTS_VARIABLE = "CLUE_DS_MAX_RESTARTS"

# Below the ports that a kernel gives to outgoing connections.
FIRST_PORT, NUM_PORTS = 20_000, 12_000

# What a remote rank gets of the user's environment, by the beginning of a name.
FORWARDED = (
    *("NCCL_", "GLOO_", "TORCH_", "OMP_", "MKL_", "KMP_", "CUDA_", "TRITON_", "DS_", "UCX_"),
    *("CLUE_DS_", "HF_HOME", "HF_HUB_OFFLINE", "TOKENIZERS_", "PYTHONSAFEPATH"),
    *("DEEPSPEED_TIMEOUT", "LD_LIBRARY_PATH"),
)
NEVER_PRINTED = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|KEY|CREDENTIAL|AUTH", re.IGNORECASE)
PRINTED = (*FORWARDED, "MASTER_ADDR", "MASTER_PORT", "PDSH_SSH_ARGS_APPEND", "OMPI_ALLOW_RUN_AS")

Variables = dict[str, str]
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# DeepSpeed puts other values in double quotes; there a shell still replaces these.
CHANGED_BY_A_SHELL = re.compile(r'["$`\\\n!]')


def job_id() -> str:
    """A name for this start of a job that no other has."""
    return secrets.token_hex(8)


def defaults(ranks_per_host: int, environment: dict[str, str]) -> dict[str, str]:
    """Variables that every rank should have, unless the user chose otherwise."""
    chosen = {
        # Each rank takes its share of the cores; together they would otherwise take N times all.
        "OMP_NUM_THREADS": str(max(1, num_cores() // ranks_per_host)),
        # Without it a folder `kernels/` in the working directory hides packages of that name.
        "PYTHONSAFEPATH": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Otherwise every rank that loses another prints twenty lines of C++.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if not num_local_devices(environment):
        chosen["DS_ACCELERATOR"] = "cpu"
    return chosen


def interface(name: str) -> dict[str, str]:
    """Variables that make NCCL and gloo use one network interface."""
    return {"NCCL_SOCKET_IFNAME": name, "GLOO_SOCKET_IFNAME": name}


def hosts_variable(hosts: list[Host]) -> str:
    """The value of HOSTS_VARIABLE; ranks use it to name a host that never answered."""
    return ",".join(f"{host.name}:{host.slots}" for host in hosts)


@contextlib.contextmanager
def reserved_port(seed: str, is_here: bool = True) -> Iterator[int]:
    """A free port, kept from other launchers of this machine while the block runs.

    `seed`: where the search begins, so that jobs of other machines rarely meet; `is_here`: whether
    the port will be used on this machine, so that it can be tried.
    """
    start = zlib.crc32(seed.encode()) % NUM_PORTS
    if not is_here:
        yield FIRST_PORT + start
        return
    for offset in range(NUM_PORTS):
        port = FIRST_PORT + (start + offset) % NUM_PORTS
        path = Path(tempfile.gettempdir(), f"clue-ds-port-{os.getuid()}-{port}.lock")
        with path.open("w") as file:
            if _is_locked(file.fileno()) and _is_free(port):
                try:
                    yield port
                finally:
                    path.unlink(missing_ok=True)
                return
    raise LaunchError(f"no free TCP port from {FIRST_PORT} to {FIRST_PORT + NUM_PORTS - 1}")


def _is_locked(descriptor: int) -> bool:
    """Whether the lock is ours now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def read_deepspeed_env(environment: dict[str, str]) -> dict[str, str]:
    """The user's NAME=value lines from ~/.deepspeed_env and ./.deepspeed_env; the second wins."""
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    values = {}
    for path in dict.fromkeys((Path.home() / name, Path.cwd() / name)):
        if not path.is_file():
            continue
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            line = text.strip()
            if not line or line.startswith("#"):
                continue
            key, equals, value = line.removeprefix("export ").partition("=")
            key, value = key.strip(), value.strip()
            if not equals or not NAME.fullmatch(key):
                raise LaunchError(f"{path}, line {number}: write NAME=value")
            # One pair of quotes around a whole value is what a shell would take away.
            if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
                value = value[1:-1]
            values[key] = value
    return values


def forwarded(environment: dict[str, str]) -> dict[str, str]:
    """The part of an environment that goes to ranks on other machines."""
    return {k: v for k, v in environment.items() if k.startswith(FORWARDED)}


def write_env_file(path: Path, values: dict[str, str]) -> None:
    """A `.deepspeed_env` that DeepSpeed 0.19.8 reads as it was meant."""
    for key, value in values.items():
        if CHANGED_BY_A_SHELL.search(value):
            raise LaunchError(
                f'the value of {key} has one of " $ ` \\ ! or a line break in it, which a shell on '
                "the other hosts would change; take it out, or unset the variable"
            )
    text = "".join(f"{key}={value}\n" for key, value in sorted(values.items()))
    path.touch(mode=0o600)
    path.write_text(text, encoding="utf-8")


def printable(environment: dict[str, str]) -> dict[str, str]:
    """What --dry-run shows of an environment: an allow-list, and nothing that may be a secret."""
    return {
        key: value
        for key, value in sorted(environment.items())
        if key.startswith(PRINTED)
        and not NEVER_PRINTED.search(key)
        and os.environ.get(key) != value
        and key != JOB_ID_VARIABLE
    }
