"""`clue-ds launch ... -- VERB ...`: detects where it runs and starts the verb on the ranks there.

Unless an option chooses, it tests in this order whether it is a rank of mpirun or srun (it then
becomes the verb), is in a Slurm job (srun), finds DeepSpeed's hostfile /job/hostfile, or else uses
this machine.

Guarantees: the exit status is that of the ranks (see processes.py), a mistake in the hostfile gives
one message before anything runs, and --dry-run prints the command and starts nothing. Standard
library only, because it must start on a login node without torch.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

from . import commands, contract, environment, processes
from . import hosts as machines
from .commands import ALSO_OVER_MPI, ON_RANKS, ONE_PROCESS, Job, Options
from .errors import LaunchError

DEEPSPEED_HOSTFILE = Path("/job/hostfile")
# By which a launcher tells a process how many ranks there are.
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")

EXAMPLES = """\
examples:
  clue-ds launch -- pretrain --config run.yaml                  Slurm job, GPUs or CPU: detected
  clue-ds launch --local 2 -- pretrain --config run.yaml        2 ranks on this machine
  clue-ds launch --hostfile hosts -- pretrain --config run.yaml ranks on several hosts, by ssh
  clue-ds launch --slurm --requeue -- pretrain --config run.yaml   inside an sbatch file
  clue-ds launch --mpi 4 -- shard text/*.txt --vocab vocab.txt --output corpus

exit status: 0 finished; 2 a mistake in the command, config or data; 70 a rank raised an error;
71 a rank died; 72 a rank hangs; 73 a host doesn't answer; 75 saved and stopped on request (start it
again to continue); 93 too many restarts without a new checkpoint.

TERM, INT (Ctrl-C) and USR1 ask pretraining and fine-tuning to save and stop; a second TERM or INT
ends the ranks at once."""


def main(argv: list[str]) -> None:
    """Run a verb on the ranks of one machine, of several hosts, or of a batch job."""
    try:
        status = _launch(_parse(argv))
    except LaunchError as error:
        print(f"clue-ds launch: error: {error}", file=sys.stderr)
        status = 2
    if status:
        raise SystemExit(status)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="clue-ds launch",
        description="Run a verb on the ranks of one machine, of several hosts, or of a batch job.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    place = parser.add_argument_group("where to run (detected by default)")
    where = place.add_mutually_exclusive_group()
    where.add_argument(
        "--local",
        type=int,
        metavar="N",
        help="N ranks on this machine: one per GPU, or any number on a CPU",
    )
    where.add_argument(
        "--hostfile",
        type=_path,
        metavar="F",
        help="several hosts by ssh; one line per host: node-1 slots=8",
    )
    where.add_argument("--slurm", action="store_true", help="srun, inside a Slurm job")
    where.add_argument(
        "--mpi",
        type=int,
        nargs="?",
        const=0,
        metavar="N",
        help="mpirun, with N ranks on this machine or all slots of the batch job",
    )
    parser.add_argument(
        "--launcher",
        choices=("pdsh", "openmpi", "slurm"),
        help="DeepSpeed's way of starting ranks: pdsh (default) or openmpi with --hostfile; slurm "
        "in a Slurm job, where the default is srun without DeepSpeed's launcher",
    )
    parser.add_argument(
        "--per",
        choices=("rank", "node"),
        default="rank",
        help="with --slurm: one srun task per rank, or one per node that runs DeepSpeed's launcher",
    )
    parser.add_argument("--interface", metavar="NAME", help="network interface for NCCL and gloo")
    parser.add_argument("--bind-cores", action="store_true", help="bind each rank to its own cores")
    parser.add_argument(
        "--requeue",
        action="store_true",
        help="with --slurm: put the job back into the queue when the ranks saved and stopped early",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        metavar="N",
        help="with --slurm: stop after N restarts in a row without a new checkpoint (default: 3)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the command instead of running it"
    )
    parser.add_argument(
        "verb",
        nargs=argparse.REMAINDER,
        metavar="-- VERB ...",
        help=f"one of {', '.join((*ON_RANKS, *ONE_PROCESS))} with its arguments, after two dashes",
    )
    _refuse_repeated(parser, argv)
    return _check(parser, parser.parse_args(argv))


def _path(text: str) -> Path:
    """A path with `~` and `$NAME` replaced, or argparse's error where there is no such thing."""
    path = os.path.expanduser(os.path.expandvars(text))
    if path.startswith("~") or re.search(r"\$\{?\w", path):
        raise argparse.ArgumentTypeError(f"{text}: no such home or variable; write the whole path")
    return Path(path)


def _refuse_repeated(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """argparse would let the last of two equal options win without a word."""
    ours = argv[: argv.index("--")] if "--" in argv else argv
    options = [word.partition("=")[0] for word in ours if word.startswith("--")]
    twice = next((name for name in options if options.count(name) > 1), None)
    if twice is not None:
        parser.error(f"option {twice} is given twice; give it once")


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> argparse.Namespace:
    if arguments.verb[:1] == ["--"]:
        arguments.verb = arguments.verb[1:]
    known = (*ON_RANKS, *ONE_PROCESS)
    if not arguments.verb or arguments.verb[0] not in known:
        given = arguments.verb[0] if arguments.verb else "nothing"
        parser.error(f"after -- give one of: {', '.join(known)}; not {given}")
    verb = arguments.verb[0]
    if arguments.local is not None and arguments.local < 1:
        parser.error(f"--local {arguments.local}: give at least one rank")
    if verb in ONE_PROCESS:
        if arguments.hostfile is not None or (arguments.local or 1) > 1:
            parser.error(
                f"{verb} is one process, which uses all cores and devices by itself; leave out "
                "--hostfile and --local"
            )
        if arguments.mpi is not None and verb not in ALSO_OVER_MPI:
            parser.error(f"{verb} is one process; --mpi works with: {', '.join(ALSO_OVER_MPI)}")
    if arguments.launcher in ("pdsh", "openmpi") and arguments.hostfile is None:
        parser.error(f"--launcher {arguments.launcher} needs --hostfile")
    if arguments.launcher == "slurm" and (not _finds_slurm(arguments) or arguments.per == "node"):
        parser.error("--launcher slurm works in a Slurm job only, and without --per node")
    if arguments.requeue and not _finds_slurm(arguments):
        parser.error("--requeue works in a Slurm job only; use it inside an sbatch file")
    return arguments


def _says_where(arguments: argparse.Namespace) -> bool:
    """Whether an option says where to run, apart from --slurm."""
    return (arguments.local, arguments.hostfile, arguments.mpi) != (None, None, None)


def _finds_slurm(arguments: argparse.Namespace) -> bool:
    return arguments.slurm or (bool(os.environ.get("SLURM_JOB_ID")) and not _says_where(arguments))


def _is_rank(user: environment.Variables) -> bool:
    """Whether mpirun or srun has started this process as one of several ranks.

    A world of one is no launcher: an interactive shell of srun or mpirun has such variables, too.
    """
    return any((environment.number(user, name) or 1) > 1 for name in SIZES)


def _launch(arguments: argparse.Namespace) -> int:
    user = dict(os.environ)
    if _says_where(arguments):
        user = environment.without_leftovers(user)
    elif _is_rank(user):
        return _become(arguments)
    else:
        user = _without_a_world_of_one(user)
    options = Options(
        arguments.launcher,
        arguments.per,
        arguments.interface,
        arguments.bind_cores,
        arguments.max_restarts,
    )
    path = arguments.hostfile
    if _finds_slurm(arguments):
        return _in_slurm(arguments, options, user)
    if arguments.local is None and arguments.mpi is None and path is None:
        if DEEPSPEED_HOSTFILE.is_file() and arguments.verb[0] in ON_RANKS:
            path = DEEPSPEED_HOSTFILE
    if path is not None:
        return _on_hosts(arguments, path, options, user)
    return _here(arguments, options, user)


def _without_a_world_of_one(user: environment.Variables) -> environment.Variables:
    """The environment without a launcher's leftovers, unless a Slurm job will need them."""
    return user if user.get("SLURM_JOB_ID") else environment.without_leftovers(user)


def _become(arguments: argparse.Namespace) -> int:
    command = [sys.executable, "-u", *commands.module_arguments(arguments.verb)]
    if arguments.dry_run:
        print(shlex.join(command))
        return 0
    os.execv(sys.executable, command)


def _here(arguments: argparse.Namespace, options: Options, user: environment.Variables) -> int:
    verb, identifier = arguments.verb, environment.job_id()
    with environment.reserved_port(identifier) as port:
        if arguments.mpi is not None:
            job = commands.mpi(verb, arguments.mpi or None, port, options, user)
        elif verb[0] in ONE_PROCESS:
            job = commands.one_process(verb)
        else:
            num_ranks = arguments.local or machines.num_local_devices(user) or 1
            job = commands.local(verb, num_ranks, port, options, user)
        with processes.job_directory(True, identifier) as folder:
            return _run(arguments, job, user, identifier, folder)


def _on_hosts(
    arguments: argparse.Namespace, path: Path, options: Options, user: environment.Variables
) -> int:
    hosts = machines.read_hostfile(path)
    first = hosts[0].name
    is_here = first in (socket.gethostname(), socket.getfqdn(), "localhost")
    if len(hosts) == 1 and is_here:
        arguments.local = hosts[0].slots
        return _here(arguments, options, user)
    try:
        own = machines.addresses(hosts)
    except LaunchError as error:
        if not arguments.dry_run:
            raise
        print(f"# would end with: {error}")
        own = {first: []}
    address = machines.master_address(first, own[first])
    identifier = environment.job_id()
    with (
        processes.job_directory(False, identifier) as folder,
        environment.reserved_port(identifier, is_here) as port,
    ):
        job = commands.hostfile(arguments.verb, hosts, address, port, options, user, folder)
        return _run(arguments, job, user, identifier, folder)


def _in_slurm(arguments: argparse.Namespace, options: Options, user: environment.Variables) -> int:
    if not user.get("SLURM_JOB_ID"):
        raise LaunchError(
            "--slurm works inside a Slurm job only: put the command into an sbatch file such as "
            "slurm/pretrain.sbatch, or get nodes first: salloc --nodes=2 --ntasks-per-node=1"
        )
    nodes = machines.slurm_nodes(user)
    per_node = _ranks_per_node(user, len(nodes))
    identifier = environment.job_id()
    seed = f"{user['SLURM_JOB_ID']}.{user.get('SLURM_RESTART_COUNT', '0')}"
    # A batch script runs on the first node, which is where rank 0 will listen.
    is_here = user.get("SLURMD_NODENAME") == nodes[0]
    with (
        processes.job_directory(False, identifier) as folder,
        environment.reserved_port(seed, is_here) as port,
    ):
        address = machines.slurm_address(nodes[0])
        job = commands.slurm(arguments.verb, nodes, per_node, address, port, options, user, folder)
        status = _run(arguments, job, user, identifier, folder)
    if status == contract.STATUS_STOPPED and arguments.requeue:
        return _requeue(arguments.verb[0], user)
    return status


def _ranks_per_node(user: environment.Variables, num_nodes: int) -> int:
    """The number given to sbatch, or else one per GPU, or else one."""
    asked = environment.number(user, "SLURM_NTASKS_PER_NODE")
    if asked:
        return asked
    num_tasks = environment.number(user, "SLURM_NTASKS")
    if num_tasks:
        if num_tasks % num_nodes:
            raise LaunchError(
                f"{num_tasks} tasks can't be divided evenly among {num_nodes} nodes; give sbatch "
                "--nodes and --ntasks-per-node"
            )
        return num_tasks // num_nodes
    return environment.number(user, "SLURM_GPUS_ON_NODE") or 1


def _requeue(verb: str, user: environment.Variables) -> int:
    """Put this job back into the queue, except a pretraining array, whose next job continues."""
    if "SLURM_ARRAY_TASK_ID" in user and verb == "pretrain":
        print("clue-ds launch: saved; the next job of the array continues", flush=True)
        return 0
    job = user["SLURM_JOB_ID"]
    print(f"clue-ds launch: saved; putting job {job} back into the queue", flush=True)
    result = subprocess.run(
        ["scontrol", "requeue", job], capture_output=True, text=True, errors="replace"
    )
    if result.returncode:
        print(f"clue-ds launch: error: {result.stderr.strip()}", file=sys.stderr)
        return contract.STATUS_STOPPED
    return 0


def _run(
    arguments: argparse.Namespace,
    job: Job,
    user: environment.Variables,
    identifier: str,
    folder: Path,
) -> int:
    if not arguments.dry_run:
        can_stop = arguments.verb[0] in commands.CAN_STOP
        return processes.run(job, user, identifier, folder, can_stop)
    shown = environment.printable(processes.complete(job, user, identifier, folder))
    assignments = [f"{key}={shlex.quote(value)}" for key, value in shown.items()]
    print(" ".join([*assignments, shlex.join(job.command)]))
    if job.env_file is not None:
        # Names only, because the values in .deepspeed_env may be secrets.
        print(f"# exported to the hosts: {' '.join(sorted(job.env_file))}")
    return 0


if __name__ == "__main__":
    main(sys.argv[1:])
