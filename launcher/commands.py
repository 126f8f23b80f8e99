"""The exact command that starts a verb, for each way of starting ranks.

    local     deepspeed's launcher on this machine
    hostfile  deepspeed's launcher over pdsh and ssh, or over OpenMPI
    slurm     srun with one task per rank; srun with one task per node, which runs deepspeed's
              launcher (--no_ssh); or deepspeed's launcher, which calls srun itself
    mpi       mpirun

Guarantees: a command depends only on the arguments and the environment; nothing is started here.
Each way starts the same module with the same arguments, so ranks behave alike.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from . import contract
from . import environment as env
from . import hosts as machines
from .errors import LaunchError
from .hosts import Host

# Verbs that run on all ranks, and the module that a rank runs.
ON_RANKS = {
    "pretrain": "clue_ds.pretrain.train",
    "finetune": "clue_ds.tasks.finetune.command",
    "predict": "clue_ds.tasks.predict.command",
    "doctor": "clue_ds.doctor",
}
# Of those, the verbs that save and stop on request.
CAN_STOP = ("pretrain", "finetune")
# Verbs that run as one process.
ONE_PROCESS = ("shard", "export")
# Of those, the verbs whose processes share the work if MPI started several.
ALSO_OVER_MPI = ("shard",)

SWEEP = str(Path(__file__).with_name("sweep.py"))
RUN_MODULE = str(Path(__file__).with_name("run_module.py"))

# USR1 is ignored until a rank has its own handler. Otherwise it would end a Python process that is
# still importing, and deepspeed's launcher, which has no handler. exec keeps a signal ignored.
IGNORE_USR1 = """trap '' USR1; exec "$@\""""
# $SLURM_NODEID must be expanded in the task; on the command line the batch shell would expand it.
IGNORE_USR1_ON_NODE = """trap '' USR1; exec "$@" --node_rank="$SLURM_NODEID" $REST"""


@dataclass
class Options:
    """The user's options, besides where to run."""

    launcher: str | None = None
    per: str = "rank"
    interface: str | None = None
    bind_cores: bool = False
    max_restarts: int = 3


@dataclass
class Job:
    """A command and everything that is needed to run it and to end it.

    `variables` are added to the environment and `removed` are removed from it. `env_file` holds the
    variables that DeepSpeed exports to other machines. `hostfile`: whether a hostfile is written
    before the start. `sweeps` are commands that end leftover processes on other machines.
    `num_ranks` is 0 if the ranks don't report their end.
    """

    command: list[str]
    variables: dict[str, str]
    num_ranks: int
    hosts: list[Host] = field(default_factory=list)
    removed: tuple[str, ...] = ()
    env_file: dict[str, str] | None = None
    hostfile: bool = False
    sweeps: list[list[str]] = field(default_factory=list)


def module_arguments(verb: list[str]) -> list[str]:
    """`-m MODULE arguments` of a verb."""
    if verb[0] in ON_RANKS:
        return ["-m", ON_RANKS[verb[0]], *verb[1:]]
    return ["-m", "clue_ds.cli", *verb]


def _deepspeed(port: int, options: Options) -> list[str]:
    # At level error it would print the ranks' whole command line after the message of each mistake.
    quiet = ("--log_level=critical", "--no_local_rank")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *quiet]
    command.append(f"--master_port={port}")
    if options.bind_cores:
        command.append("--bind_cores_to_rank")
    return command


def _verb_by_deepspeed(verb: list[str]) -> list[str]:
    return ["--module", ON_RANKS[verb[0]], *verb[1:]]


def one_process(verb: list[str]) -> Job:
    """A verb that uses the machine's cores and devices by itself."""
    variables = {"PYTHONUTF8": "1"}
    return Job([sys.executable, *module_arguments(verb)], variables, num_ranks=0)


def local(verb: list[str], num_ranks: int, port: int, options: Options, user: env.Variables) -> Job:
    """`num_ranks` ranks on this machine, which listen on the loopback interface only."""
    # Otherwise DeepSpeed would look for /job/hostfile and use ssh.
    command = [*_deepspeed(port, options), "--hostfile=/dev/null"]
    removed: tuple[str, ...] = ()
    chosen = user.get("CUDA_VISIBLE_DEVICES", "")
    if chosen and machines.num_local_devices(user):
        devices = [name.strip() for name in chosen.split(",") if name.strip()]
        _check_number(f"CUDA_VISIBLE_DEVICES={chosen} lists", len(devices), num_ranks)
        devices = devices[:num_ranks]
        if not all(name.isdigit() for name in devices):
            raise LaunchError(
                f"CUDA_VISIBLE_DEVICES={chosen}: DeepSpeed takes device numbers only; write those"
            )
        # With --num_gpus DeepSpeed would ignore the choice and use the first devices.
        command.append(f"--include=localhost:{','.join(devices)}")
        removed = ("CUDA_VISIBLE_DEVICES",)
    else:
        present = machines.num_local_devices(user)
        if present and user.get("DS_ACCELERATOR") != "cpu":
            _check_number("this machine has", present, num_ranks)
        command.append(f"--num_gpus={num_ranks}")
    variables = {
        **env.defaults(num_ranks, user),
        **env.interface(options.interface or "lo"),
        "MASTER_PORT": str(port),
    }
    hosts = [Host("localhost", num_ranks)]
    return Job([*command, *_verb_by_deepspeed(verb)], variables, num_ranks, hosts, removed)


def _check_number(who: str, num_devices: int, num_ranks: int) -> None:
    if num_devices < num_ranks:
        raise LaunchError(
            f"{num_ranks} ranks need a device each, but {who} {num_devices}; give --local "
            f"{num_devices}, or set DS_ACCELERATOR=cpu to run on the CPU"
        )


def hostfile(
    verb: list[str],
    hosts: list[Host],
    address: str,
    port: int,
    options: Options,
    user: env.Variables,
    job_dir: Path,
) -> Job:
    """One rank per slot on every host of a hostfile.

    DeepSpeed and mpirun get a hostfile that we write from what we have read, because they stumble
    over byte order marks.
    """
    command = _deepspeed(port, options)
    launcher = options.launcher or "pdsh"
    command += [f"--hostfile={job_dir / 'hostfile'}", f"--launcher={launcher}"]
    # We have checked every host already; DeepSpeed's own check asks only the first.
    command += [f"--master_addr={address}", "--force_multi", "--no_ssh_check"]
    variables = env.defaults(max(host.slots for host in hosts), user)
    if options.interface:
        variables |= env.interface(options.interface)
    exported = {**variables, **env.forwarded(user), **env.read_deepspeed_env(user)}
    if launcher == "pdsh":
        appended = [user.get("PDSH_SSH_ARGS_APPEND", ""), *machines.SSH_OPTIONS]
        variables["PDSH_SSH_ARGS_APPEND"] = " ".join(appended).strip()
        verb = [verb[0], *map(_for_pdsh, verb[1:])]
    else:
        if not options.interface:
            raise LaunchError(
                "OpenMPI needs the network interface that connects the hosts, and DeepSpeed would "
                "use eth0; add --interface NAME (`ip -brief address` lists the names)"
            )
        include = [
            word
            for layer in ("btl", "oob")
            for word in ("--mca", f"{layer}_tcp_if_include", options.interface)
        ]
        command.append(f"--launcher_args={shlex.join(include)}")
        exported |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        variables |= _as_root()
    sweeps = [["ssh", *machines.SSH_OPTIONS, host.name, *_sweep_words()] for host in hosts]
    return Job(
        [*command, *_verb_by_deepspeed(verb)],
        variables,
        sum(host.slots for host in hosts),
        hosts,
        env_file=exported,
        hostfile=True,
        sweeps=sweeps,
    )


def _sweep_words() -> list[str]:
    return [sys.executable, "-S", "-E", SWEEP]


def _for_pdsh(argument: str) -> str:
    """Quote an argument for DeepSpeed's own quoting, pdsh's % and the shell of the other host."""
    argument = argument.replace("%", "%%")
    if " " not in argument:
        return shlex.quote(argument)
    if env.CHANGED_BY_A_SHELL.search(argument):  # DeepSpeed puts double quotes around it
        raise LaunchError(f"{argument!r} can't be passed over pdsh; put it into the config file")
    return argument


def slurm(
    verb: list[str],
    nodes: list[str],
    ranks_per_node: int,
    address: str,
    port: int,
    options: Options,
    user: env.Variables,
    job_dir: Path,
) -> Job:
    """Ranks in a Slurm allocation, started by srun."""
    srun = ["srun", "--kill-on-bad-exit=1", "--input=none"]
    # Since Slurm 22.05 srun doesn't inherit it from sbatch.
    cores = user.get("SLURM_CPUS_PER_TASK")
    if verb[0] not in ON_RANKS:
        one = [*srun, "--nodes=1", "--ntasks=1"] + ([f"--cpus-per-task={cores}"] if cores else [])
        command = [*one, sys.executable, *module_arguments(verb)]
        return Job(command, {"PYTHONUTF8": "1"}, num_ranks=0)
    num_ranks = len(nodes) * ranks_per_node
    # srun passes its own environment to the ranks.
    variables = {**env.defaults(ranks_per_node, user), **env.read_deepspeed_env(user)}
    variables["MASTER_ADDR"] = address
    variables |= {
        "MASTER_PORT": str(port),
        contract.MAX_RESTARTS_VARIABLE: str(options.max_restarts),
    }
    if cores:
        variables["OMP_NUM_THREADS"] = cores
    if options.interface:
        variables |= env.interface(options.interface)
    hosts = [Host(node, ranks_per_node) for node in nodes]
    srun += [f"--nodes={len(nodes)}"]
    runner = [*_deepspeed(port, options), f"--master_addr={address}"]
    runner.append(f"--hostfile={job_dir / 'hostfile'}")
    if options.per == "rank":
        srun += [f"--ntasks={num_ranks}", f"--ntasks-per-node={ranks_per_node}"]
        srun += [f"--cpus-per-task={cores}"] if cores else []
        srun += ["--cpu-bind=cores"] if options.bind_cores else []
        if options.launcher == "slurm":
            runner += ["--launcher=slurm", "--force_multi", "--no_ssh_check"]
            runner += [f"--launcher_args={shlex.join(srun[1:])}", RUN_MODULE, ON_RANKS[verb[0]]]
            # DeepSpeed's reader of .deepspeed_env fails on comments.
            variables["DS_ENV_FILE"] = "/dev/null"
            removed = ("DS_ENV_FILE",)
            return Job([*runner, *verb[1:]], variables, num_ranks, hosts, removed, hostfile=True)
        rank = [sys.executable, "-u", *module_arguments(verb)]
        command = [*srun, "sh", "-c", IGNORE_USR1, "sh", *rank]
        return Job(command, variables, num_ranks, hosts)
    srun += [f"--ntasks={len(nodes)}", "--ntasks-per-node=1"]
    runner.append("--no_ssh")
    script = IGNORE_USR1_ON_NODE.replace("$REST", shlex.join(_verb_by_deepspeed(verb)))
    command = [*srun, "sh", "-c", script, "sh", *runner]
    return Job(command, variables, num_ranks, hosts, hostfile=True)


def mpi(
    verb: list[str], num_ranks: int | None, port: int, options: Options, user: env.Variables
) -> Job:
    """mpirun on this machine or, without a number, on all slots of a batch system's allocation."""
    command = ["mpirun", *(["-n", str(num_ranks)] if num_ranks else [])]
    command += ["--bind-to", "core"] if options.bind_cores else []
    variables = {**env.defaults(num_ranks or 1, user), **_as_root()}
    if num_ranks and verb[0] in ON_RANKS:
        # Otherwise mpi4py gives the ranks the address of rank 0.
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        variables |= env.interface(options.interface or "lo")
    elif options.interface:
        variables |= env.interface(options.interface)
    reported = num_ranks or 0 if verb[0] in ON_RANKS else 0
    return Job([*command, sys.executable, *module_arguments(verb)], variables, reported)


def _as_root() -> dict[str, str]:
    """Let OpenMPI run as root, which is the only user in many containers."""
    if os.geteuid():
        return {}
    return {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
