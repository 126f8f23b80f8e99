"""How the ranks of a job connect: one store at rank 0, and a roll call with a deadline.

Works under deepspeed, torchrun, mpirun and srun, and without any launcher. Guarantees: when a rank
has not connected by the deadline, every rank ends with a message that names the missing hosts; the
store listens only on rank 0's own address (on loopback for a job on one machine), not on all
addresses; gloo and NCCL use the network interface that leads to rank 0, unless another one was set.

Rejected: torch's `env://`. Its store listens on all addresses, and it waits ten minutes for a
missing rank without naming it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from clue_ds import dist
from clue_ds.errors import UserError, first_line
from clue_ds.launcher import contract

if TYPE_CHECKING:  # `clue-ds status` uses this module without it
    from torch.distributed import PrefixStore, TCPStore

START_SECONDS = 60
SIOCGIFADDR = 0x8915


class Peer(NamedTuple):
    """A rank as the others see it. `namespace`: the pid namespace in which `pid` is valid."""

    host: str
    pid: int
    namespace: str


class Meeting(NamedTuple):
    """`store`: on rank 0; `peers`: all ranks, in order; `address`: host and port of the store."""

    store: TCPStore
    prefix: str
    peers: list[Peer]
    address: tuple[str, int]

    def connect(self, timeout: timedelta) -> PrefixStore:
        """A further connection, for a thread that must not wait for another thread's calls."""
        from torch.distributed import PrefixStore, TCPStore

        host, port = self.address
        client = TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
        return PrefixStore(self.prefix, client)


# What `meet` sets where a launcher has not.
VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
)

_meeting: Meeting | None = None


def myself() -> Peer:
    """This process."""
    return Peer(socket.gethostname(), os.getpid(), os.readlink("/proc/self/ns/pid"))


def meet(seconds: float = START_SECONDS) -> Meeting:
    """Connect to all other ranks, once per process; a UserError names hosts that are missing."""
    global _meeting
    # Each time, because an earlier run in this process has taken its variables back.
    _complete_environment(seconds)
    if _meeting is None:
        _meeting = _meet(seconds)
    return _meeting


@contextlib.contextmanager
def environment_restored() -> Iterator[None]:
    """Take back in the end what `meet` has set in the block.

    A process that is started later would take itself for a rank, whose launcher is this process:
    `nohup clue-ds pretrain` in a notebook would end with its shell.
    """
    before = {name: os.environ.get(name) for name in VARIABLES}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _complete_environment(seconds: float) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT under every launcher."""
    ours = {"RANK": dist.rank(), "WORLD_SIZE": dist.world_size(), "LOCAL_RANK": dist.local_rank()}
    if "MASTER_ADDR" not in os.environ and ours["WORLD_SIZE"] > 1:
        if "SLURM_STEP_NODELIST" in os.environ:
            _slurm_master()
        else:
            _mpi_master(seconds)
    for name, value in ours.items():
        os.environ[name] = str(value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    # One rank without a launcher: `_meet` takes the port that the system gives it, because one that
    # is found free here may be taken by another job until then.
    os.environ.setdefault("MASTER_PORT", "0")
    interface = _interface_to(os.environ["MASTER_ADDR"])
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def _port_for(job: str) -> str:
    """The port of a job that was not started by `clue-ds launch`, and so was given none."""
    return str(contract.FIRST_PORT + contract.port_offset(job))


def _slurm_master() -> None:
    """For plain `srun python -m ...`: rank 0 is on the first node of the step; ask Slurm for it."""
    nodes = os.environ["SLURM_STEP_NODELIST"]
    try:
        names = _output("scontrol", "show", "hostnames", nodes).split()
        words = _output("scontrol", "-o", "show", "node", names[0]).split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"can't ask Slurm (scontrol) for the address of {nodes}: {error}; set MASTER_ADDR"
        ) from None
    found = [word.partition("=")[2] for word in words if word.startswith("NodeAddr=")]
    os.environ["MASTER_ADDR"] = found[0] if found else names[0]
    job = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    os.environ.setdefault("MASTER_PORT", _port_for(job))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _mpi_master(seconds: float) -> None:
    """For plain `mpirun python -m ...`: rank 0 broadcasts its address by MPI."""
    try:
        from mpi4py import MPI
    except ModuleNotFoundError:
        raise UserError(
            "starting ranks with mpirun needs mpi4py (run: pip install mpi4py), or the variables "
            "MASTER_ADDR and MASTER_PORT (mpirun -x MASTER_ADDR=... -x MASTER_PORT=...)"
        ) from None
    request, deadline = MPI.COMM_WORLD.Ibarrier(), time.monotonic() + seconds
    while not request.Test():
        if time.monotonic() > deadline:
            print(
                f"clue-ds: error: rank {dist.rank()} on {socket.gethostname()}: not all "
                f"{dist.world_size()} ranks of mpirun answered within {seconds:.0f} s; one of them "
                "is stopped, or hangs before it reaches this point",
                file=sys.stderr,
                flush=True,
            )
            MPI.COMM_WORLD.Abort(2)  # a normal exit would wait for that rank, too
        time.sleep(0.01)
    job = os.environ.get("PMIX_NAMESPACE") or os.environ.get("OMPI_MCA_ess_base_jobid", "")
    address = (_own_address(), _port_for(job))
    os.environ["MASTER_ADDR"], port = MPI.COMM_WORLD.bcast(address, root=0)
    os.environ.setdefault("MASTER_PORT", port)
    hosts = MPI.COMM_WORLD.allgather(socket.gethostname())
    if len(set(hosts)) == 1:
        os.environ["MASTER_ADDR"] = "127.0.0.1"


def _own_address() -> str:
    """The address of this machine that other machines see."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # sends nothing, only chooses a route
        return probe.getsockname()[0]
    return socket.gethostbyname(socket.gethostname())


def _interface_to(address: str) -> str | None:
    """Name of the network interface that leads to `address`; None if it can't be found."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            return None
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name[:15].encode())
            with contextlib.suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
    return "lo" if own.startswith("127.") else None


def _meet(seconds: float) -> Meeting:
    from torch.distributed import DistError, PrefixStore, TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=seconds)
    rank, world_size = dist.rank(), dist.world_size()
    # torchrun's agent holds a store already. After a restart, ranks must not read old entries.
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    prefix = f"clue_ds/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if rank == 0 and not of_torchrun:
        listener = _listen(host, port)
        # The variable keeps its 0 where the system chose: a process that inherits it, such as a
        # shell command of the same notebook, then takes a port of its own.
        port = listener.getsockname()[1]
        store = TCPStore(
            host,
            port,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
    else:
        try:
            store = TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
        except DistError as error:
            raise UserError(
                f"rank {rank} on {socket.gethostname()} can't reach rank 0 at {host}:{port} within "
                f"{seconds:.0f} s. Did rank 0 start, and do both hosts share that network "
                f"(clue-ds launch --interface)? {first_line(error)}"
            ) from None
    named = PrefixStore(prefix, store)
    named.set(f"here/{rank}", json.dumps(myself()))
    if rank == 0:
        named.set("roll", json.dumps(_roll_call(named, world_size, seconds)))
    named.wait(["roll"], timedelta(seconds=seconds + 30))
    roll = json.loads(named.get("roll"))
    if isinstance(roll, str):
        raise UserError(roll)
    peers = [Peer(*json.loads(named.get(f"here/{number}"))) for number in range(world_size)]
    return Meeting(store, prefix, peers, (host, port))


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens on one address of this machine."""
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR {host} can't be resolved on {socket.gethostname()}: {error}; give an "
            "address or a name that every host knows"
        ) from None
    listener = socket.socket(address[0])
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    where: Any = address[4]
    # Debian maps a machine's own name to 127.0.1.1, where other hosts would not find it.
    if where[0].startswith("127.") and _num_hosts() > 1:
        where = ("", port)
    try:
        listener.bind(where)
    except OSError as error:
        raise UserError(
            f"rank 0 on {socket.gethostname()} can't listen on {host}:{port}: {error.strerror}. "
            "Another job may use that port, or MASTER_ADDR is not an address of this host"
        ) from None
    listener.listen(4096)
    return listener


def _hosts_of_ranks() -> list[str]:
    """The host of each rank, as `clue-ds launch` has set it; empty without that launcher."""
    hosts = []
    for entry in filter(None, os.environ.get(contract.HOSTS_VARIABLE, "").split(",")):
        name, _, slots = entry.rpartition(":")
        hosts += [name] * int(slots)
    return hosts


def _num_hosts() -> int:
    hosts = _hosts_of_ranks()
    return len(set(hosts)) if hosts else 2 if dist.world_size() > 1 else 1


def _roll_call(store: PrefixStore, world_size: int, seconds: float) -> str | None:
    """None when every rank has connected; after `seconds`, a message that names those missing."""
    deadline = time.monotonic() + seconds
    missing = list(range(world_size))
    while missing := [rank for rank in missing if not store.check([f"here/{rank}"])]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    if not missing:
        return None
    hosts = _hosts_of_ranks()
    names = [f"rank {r}" + (f" on {hosts[r]}" if r < len(hosts) else "") for r in missing[:20]]
    more = f" and {len(missing) - 20} more" if len(missing) > 20 else ""
    return (
        f"{len(missing)} of {world_size} ranks did not answer within {seconds:.0f} s: "
        f"{', '.join(names)}{more}. Look for their errors above; run `clue-ds doctor` on such a "
        "host to check it; with a slow disk, raise health.start_seconds"
    )
