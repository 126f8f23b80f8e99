"""The environment of the ranks: our defaults, the user's variables, and `.deepspeed_env`.

Guarantees: the user's variables take precedence over our defaults; two jobs on one machine don't
use the same port; `.deepspeed_env` may contain comments and blank lines (DeepSpeed's own reader
crashes on them); a value that a remote shell would change is refused; only names on an allow-list
are printed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .contract import FIRST_PORT, NUM_PORTS, port_offset
from .errors import LaunchError
from .hosts import Host, lines_of, num_cores, num_local_devices
from .sweep import JOB_ID_VARIABLE

# Prefixes of the variables that ranks on other machines get from the user's environment.
FORWARDED = (
    *("NCCL_", "GLOO_", "TORCH_", "OMP_", "MKL_", "KMP_", "CUDA_", "TRITON_", "DS_", "UCX_"),
    *("CLUE_DS_", "HF_HOME", "HF_HUB_OFFLINE", "TOKENIZERS_", "PYTHONSAFEPATH"),
    *("DEEPSPEED_TIMEOUT", "LD_LIBRARY_PATH"),
)
NEVER_PRINTED = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|KEY|CREDENTIAL|AUTH", re.IGNORECASE)
PRINTED = (*FORWARDED, "MASTER_ADDR", "MASTER_PORT", "PDSH_SSH_ARGS_APPEND", "OMPI_ALLOW_RUN_AS")

# Variables that launchers set for one rank, which are left over in a shell that one of them started
# (`srun --mpi=pmi2 --pty bash`, a terminal in a notebook under mpirun).
OF_A_RANK = re.compile(
    r"(PMI|PMI2)_(RANK|SIZE|FD|PORT|ID|SPAWNED|JOBID)|MPI_LOCAL(RANKID|NRANKS)|MV2_COMM_WORLD_.*"
    r"|(PMIX|PRTE)_(?!MCA_|ALLOW_RUN_AS_ROOT).*|OMPI_(COMM_WORLD|FIRST|APP|NUM_APP|FILE)_.*"
    r"|OMPI_(UNIVERSE_SIZE|ARGV|COMMAND)|OMPI_MCA_(ess|pmix|orte_(hnp|local|app|ess|jobid))_.*"
    r"|SLURM_STEP(ID|MGR|_.*)|SLURM_(PROCID|LOCALID|NODEID|GTIDS|TASK_PID|SRUN_COMM_(HOST|PORT))"
    r"|(LOCAL_|GROUP_|ROLE_|CROSS_)?(RANK|WORLD_SIZE)|(LOCAL|CROSS)_SIZE|TORCHELASTIC_.*"
)

# Errors of flock on file systems that have no locks.
WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)

Variables = dict[str, str]
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# DeepSpeed puts values in double quotes, where a shell still interprets these characters.
CHANGED_BY_A_SHELL = re.compile(r'["$`\\\n!]')


def job_id() -> str:
    """A unique name for this start of a job."""
    return secrets.token_hex(8)


def defaults(ranks_per_host: int, environment: dict[str, str]) -> dict[str, str]:
    """Variables for every rank, which the user's own variables override."""
    chosen = {
        # Each rank uses its share of the cores; otherwise each of them would use all.
        "OMP_NUM_THREADS": str(max(1, num_cores() // ranks_per_host)),
        # Otherwise a folder `kernels/` in the working directory would hide packages of that name.
        "PYTHONSAFEPATH": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Whatever the locale of the other machine is.
        "PYTHONUTF8": "1",
        # Otherwise every rank that loses its connection to another prints a C++ stack trace.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if not num_local_devices(environment):
        chosen["DS_ACCELERATOR"] = "cpu"
    return chosen


def without_leftovers(environment: Variables) -> Variables:
    """The environment without the variables by which another launcher described a rank."""
    return {name: value for name, value in environment.items() if not OF_A_RANK.fullmatch(name)}


def number(environment: Variables, name: str) -> int | None:
    """The value of a variable that holds a number; None where it is missing or empty."""
    text = environment.get(name, "").strip()
    if not text:
        return None
    # A sign, an underscore or a digit of another script would be accepted by int alone.
    if not re.fullmatch("[0-9]{1,9}", text):
        raise LaunchError(f"the variable {name}={text[:80]!r} is not a number; unset it")
    return int(text)


def interface(name: str) -> dict[str, str]:
    """Variables that make NCCL and gloo use a given network interface."""
    return {"NCCL_SOCKET_IFNAME": name, "GLOO_SOCKET_IFNAME": name}


def hosts_variable(hosts: list[Host]) -> str:
    """The value of HOSTS_VARIABLE, which tells ranks the name of a host that never answers."""
    return ",".join(f"{host.name}:{host.slots}" for host in hosts)


@contextlib.contextmanager
def reserved_port(seed: str, is_here: bool = True) -> Iterator[int]:
    """A free port, reserved against other launchers on this machine while the block runs.

    `seed` determines where the search begins, so that jobs on other machines rarely try the same
    port. `is_here`: whether the port will be used on this machine and can be tested.
    """
    start = port_offset(seed)
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
    raise LaunchError(
        f"no TCP port is free from {FIRST_PORT} to {FIRST_PORT + NUM_PORTS - 1}; end the jobs "
        "that use them"
    )


def _is_locked(descriptor: int) -> bool:
    """Try to lock an open file without waiting; returns whether it worked.

    On a disk without locks it always does; `_is_free` then still finds the ports in use.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
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
    """The NAME=value lines of ~/.deepspeed_env and ./.deepspeed_env; the second overrides."""
    name = environment.get("DS_ENV_FILE") or ".deepspeed_env"
    values = {}
    for folder in dict.fromkeys((*_home(), Path.cwd())):
        path = folder / name
        if not path.is_file():
            continue
        for number, text in lines_of(path, str(path)):
            line = text.strip()
            if not line or line.startswith("#"):
                continue
            key, equals, value = line.removeprefix("export ").partition("=")
            key, value = key.strip(), value.strip()
            if not equals or not NAME.fullmatch(key):
                raise LaunchError(f"{path}, line {number}: write NAME=value")
            # Remove one pair of quotes around the whole value, as a shell would.
            if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
                value = value[1:-1]
            values[key] = value
    return values


def _home() -> list[Path]:
    """The home directory; a container may run a user without one."""
    try:
        return [Path.home()]
    except RuntimeError:
        return []


def forwarded(environment: dict[str, str]) -> dict[str, str]:
    """The variables that ranks on other machines get."""
    return {k: v for k, v in environment.items() if k.startswith(FORWARDED)}


def write_env_file(path: Path, values: dict[str, str]) -> None:
    """Write a `.deepspeed_env` that DeepSpeed 0.19.8 reads correctly."""
    for key, value in values.items():
        if CHANGED_BY_A_SHELL.search(value):
            raise LaunchError(
                f'the value of {key} contains one of " $ ` \\ ! or a line break, which a shell on '
                "the other hosts would change; remove it, or unset the variable"
            )
    text = "".join(f"{key}={value}\n" for key, value in sorted(values.items()))
    path.touch(mode=0o600)
    path.write_text(text, encoding="utf-8")


def printable(environment: dict[str, str]) -> dict[str, str]:
    """The variables that --dry-run prints: those on an allow-list that can't be secrets."""
    return {
        key: value
        for key, value in sorted(environment.items())
        if key.startswith(PRINTED)
        and not NEVER_PRINTED.search(key)
        and os.environ.get(key) != value
        and key != JOB_ID_VARIABLE
    }
