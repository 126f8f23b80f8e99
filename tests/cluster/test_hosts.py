"""Two real hosts, ssh between them: `deepspeed --hostfile`, a link cut, a host killed, no orphans.

Each host is a set of namespaces on this machine; a victim is always a process that the test owns.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import CLUE_DS, HERE, OWNERS
from ranks import read_log, tiny_config

from clue_ds import config as run_config
from clue_ds.job import procfs

PATIENCE_S = 120
# So that a test takes seconds; the defaults end a job within two minutes.
QUICK = {"health": {"beat_seconds": 10}}
FOREVER = {"train": {"steps": 100_000, "warmup_steps": 2}, "checkpoint": {"every": 10_000}}


def write_config(corpus: Path, folder: Path, **sections: Any) -> Path:
    usual = {"train": {"steps": 20, "warmup_steps": 2}, "log": {"every": 10, "tensorboard": False}}
    config = tiny_config(corpus, folder / "run", **{**usual, **sections})
    run_config.save(config, folder / "run.yaml")
    return folder / "run.yaml"


def on_h1(hosts: Path, folder: Path, *command: str | Path) -> subprocess.Popen[str]:
    """Start a command on host h1."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [hosts / "on", "h1", *command],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def launch(hosts: Path, folder: Path, config: Path, *options: str) -> subprocess.Popen[str]:
    words = ["launch", "--hostfile", hosts / "hostfile", *options, "--", "pretrain"]
    return on_h1(hosts, folder, CLUE_DS, *words, "--config", config)


def wait_for_training(run_dir: Path, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not (run_dir / "log.jsonl").is_file() or not read_log(run_dir):
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline, "no step was logged"
        time.sleep(0.2)


def python_processes(hosts: Path, host: str) -> str:
    """What still runs on a host, beside its first process and sshd."""
    command = [hosts / "on", host, "ps", "-eo", "args"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return "\n".join(line for line in shown.splitlines() if "clue_ds.pretrain" in line)


def assert_nothing_left(hosts: Path, *names: str) -> None:
    deadline = time.monotonic() + 60
    while left := {name: found for name in names if (found := python_processes(hosts, name))}:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def link(hosts: Path, state: str) -> None:
    """Take h2's network away, or give it back."""
    subprocess.run([hosts / "on", "h2", "ip", "link", "set", "eth0", state], check=True)


def test_hosts_of_a_killed_run_are_removed_and_those_of_a_living_one_stay(
    hosts: Path, tmp_path: Path
) -> None:
    script = HERE / "hosts.sh"
    child = "import fcntl, os, signal, subprocess, sys; owner = open(sys.argv[1], 'w'); "
    child += "fcntl.flock(owner, fcntl.LOCK_EX); subprocess.run(sys.argv[2:], check=True); "
    child += "os.kill(os.getpid(), signal.SIGKILL)"
    named = subprocess.run([script, "name", tmp_path], capture_output=True, text=True, check=True)
    prefix = named.stdout.strip()
    command = [sys.executable, "-c", child, OWNERS / prefix, script, "up", tmp_path]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    first_process = int((tmp_path / "h1.pid").read_text())
    left = sorted(path.name for path in Path("/run/netns").glob(f"{prefix}-*"))
    assert left == [f"{prefix}-{name}" for name in ("h1", "h2", "switch")]
    subprocess.run([script, "sweep"], check=True)
    assert not list(Path("/run/netns").glob(f"{prefix}-*")) and not (OWNERS / prefix).exists()
    assert procfs.state(first_process) == "dead"  # also until its parent has noticed
    assert subprocess.run([hosts / "on", "h1", "ssh", "h2", "true"]).returncode == 0


def test_plain_deepspeed_trains_on_two_hosts(corpus: Path, hosts: Path, tmp_path: Path) -> None:
    config = write_config(corpus, tmp_path)
    # DeepSpeed exports few variables over ssh; this file is its way to the others.
    (tmp_path / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    words = ["--hostfile", str(hosts / "hostfile"), "--module", "clue_ds.pretrain.train"]
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    job = on_h1(hosts, tmp_path, deepspeed, *words, "--config", config)
    output, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, output
    assert "2 ranks on 2 hosts (h1, h2)" in output
    assert read_log(tmp_path / "run")[-1]["step"] == 20


def test_launch_says_which_host_does_not_answer(corpus: Path, hosts: Path, tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("h1 slots=1\nh2 slots=1\nh9 slots=1\n")
    words = ["launch", "--hostfile", "hostfile", "--", "pretrain", "--config", "run.yaml"]
    job = on_h1(hosts, tmp_path, CLUE_DS, *words)
    output, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 2
    assert "1 of 3 hosts can't be reached by ssh: h9" in output


def test_a_dry_run_prints_the_command_for_two_hosts(
    corpus: Path, hosts: Path, tmp_path: Path
) -> None:
    (tmp_path / ".deepspeed_env").write_text("# mine\n\nMY_PASSWORD=hidden\n")
    job = launch(hosts, tmp_path, tmp_path / "run.yaml", "--dry-run")
    output, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, output
    assert "--launcher=pdsh --master_addr=10.78.0.1" in output
    assert "hidden" not in output and "MY_PASSWORD" in output


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_launch_trains_on_two_hosts(
    corpus: Path, hosts: Path, tmp_path: Path, launcher: str
) -> None:
    config = write_config(corpus, tmp_path)
    options = ["--launcher", launcher, "--interface", "eth0"]
    job = launch(hosts, tmp_path, config, *options)
    output, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, output
    assert "2 ranks on 2 hosts (h1, h2)" in output
    assert read_log(tmp_path / "run")[-1]["step"] == 20
    assert_nothing_left(hosts, "h1", "h2")


def test_a_cut_link_ends_the_job_and_names_the_host(
    corpus: Path, hosts: Path, tmp_path: Path
) -> None:
    job = launch(hosts, tmp_path, write_config(corpus, tmp_path, **FOREVER, **QUICK))
    wait_for_training(tmp_path / "run", job)
    link(hosts, "down")
    try:
        output, _ = job.communicate(timeout=PATIENCE_S)
        assert job.returncode == 73, output
        assert "rank 1 on h2 has been silent" in output or "rank 0 on h1" in output
        assert_nothing_left(hosts, "h1", "h2")
    finally:
        link(hosts, "up")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_launcher_leaves_no_rank_on_any_host(
    corpus: Path, hosts: Path, tmp_path: Path, number: signal.Signals
) -> None:
    job = launch(hosts, tmp_path, write_config(corpus, tmp_path, **FOREVER, **QUICK))
    wait_for_training(tmp_path / "run", job)
    # nsenter waits for the launcher, which is its only child.
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[0]), number)
    output, _ = job.communicate(timeout=PATIENCE_S)
    if number == signal.SIGTERM:
        assert "stopped on request after step" in output
    assert_nothing_left(hosts, "h1", "h2")


def test_a_stopped_rank_on_the_other_host_ends_the_job(
    corpus: Path, hosts: Path, tmp_path: Path
) -> None:
    job = launch(hosts, tmp_path, write_config(corpus, tmp_path, **FOREVER, **QUICK))
    wait_for_training(tmp_path / "run", job)
    script = "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline | "
    script += "grep -q '^[^ ]*python -u -m clue_ds.pretrain.train' && kill -STOP ${p#/proc/}; done"
    subprocess.run([hosts / "on", "h2", "sh", "-c", script], stderr=subprocess.DEVNULL)
    output, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 73, output
    assert "rank 1 on h2 has been silent" in output
    assert "last known stack of rank 1 on h2" in output
    assert_nothing_left(hosts, "h1", "h2")


def test_a_killed_host_ends_the_job(corpus: Path, hosts: Path, tmp_path: Path) -> None:
    """The last test of this file: h2 does not come back."""
    job = launch(hosts, tmp_path, write_config(corpus, tmp_path, **FOREVER, **QUICK))
    wait_for_training(tmp_path / "run", job)
    os.kill(int((hosts / "h2.pid").read_text()), signal.SIGKILL)
    output, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode in (71, 73), output
    assert "rank 1 on h2" in output
    assert_nothing_left(hosts, "h1")
