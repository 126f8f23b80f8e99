"""`clue-ds launch`: real ranks through DeepSpeed's launcher, correct exit codes, no orphans.

Processes are started by the test and found through their parent, never by scanning for a name.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ranks import make_corpus, read_log, tiny_config

from clue_ds import config as run_config
from clue_ds import dist
from clue_ds.job import diagnosis
from clue_ds.job.rendezvous import Peer
from clue_ds.launcher import commands, environment, hosts, launch, processes, sweep
from clue_ds.launcher.errors import LaunchError

LAUNCH = [sys.executable, "-m", "clue_ds.cli", "launch", "--local", "2", "--"]
PATIENCE_S = 240


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    return make_corpus(tmp_path_factory.mktemp("launcher"), sample_text)


def write_config(corpus: Path, folder: Path, steps: int) -> Path:
    path = folder / "run.yaml"
    config = tiny_config(
        corpus,
        folder / "run",
        train={"steps": steps, "warmup_steps": 2},
        checkpoint={"every": 50, "keep": 9},
    )
    run_config.save(config, path)
    return path


def wait_for(path: Path, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.1)


def ranks_of(job: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks that belong to a launcher started by the test."""
    below = psutil.Process(job.pid).children(recursive=True)
    return [p for p in below if "clue_ds.pretrain.train" in p.cmdline() and "-u" in p.cmdline()][
        -2:
    ]


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE_S)
    assert not alive


def start(arguments: list[str], folder: Path, *prefix: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*prefix, *LAUNCH, *arguments],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell that starts the tests in the background has them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_two_ranks_train_and_the_console_is_readable(corpus: Path, tmp_path: Path) -> None:
    job = start(["pretrain", "--config", str(write_config(corpus, tmp_path, steps=4))], tmp_path)
    output, errors = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, errors
    assert len(read_log(tmp_path / "run")) == 4
    lines = output.splitlines()
    assert "2 ranks on 1 host" in lines[0]
    assert "parameters in fp32, ZeRO stage 1, 2 ranks" in lines[1]
    assert [line.split()[1] for line in lines if line.startswith("step")] == [
        f"{n}/4" for n in range(1, 5)
    ]
    assert len(lines) == 11, f"DeepSpeed should be quiet: {output}"
    assert not errors


@pytest.mark.parametrize(
    "mistake",
    ["--train.global_batch_size=9", pytest.param("--train.lrr=1", marks=pytest.mark.heavy)],
)
def test_a_users_mistake_is_said_once_and_ends_with_2(
    corpus: Path, tmp_path: Path, mistake: str
) -> None:
    config = write_config(corpus, tmp_path, steps=4)
    job = start(["pretrain", "--config", str(config), mistake], tmp_path)
    _, errors = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 2
    said = "is not divisible" if "batch" in mistake else "Unrecognized options: --train.lrr"
    assert errors.count(said) == 1 and "sigkill_handler" not in errors
    assert "Traceback" not in errors


def last_step(folder: Path) -> int:
    """The step of the newest checkpoint."""
    return max(int(path.name[5:]) for path in (folder / "run" / "checkpoints").glob("step-*"))


def test_term_to_the_launcher_lets_the_ranks_save_and_a_second_signal_ends_them(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    config = write_config(corpus, tmp_path, steps=100_000)
    job = start(["pretrain", "--config", str(config), "--checkpoint.every=100000"], tmp_path)
    wait_for(tmp_path / "run" / "log.jsonl", job)
    family = psutil.Process(job.pid).children(recursive=True)
    job.send_signal(signal.SIGTERM)
    output, errors = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 75, errors
    assert f"stopped on request after step {last_step(tmp_path)};" in output
    assert errors.count("SIGTERM received: the ranks save and stop") == 1
    assert_gone(family)

    job = start(["pretrain", "--config", str(config)], tmp_path)
    wait_for(tmp_path / "run" / "checkpoints" / "step-00000200", job)
    family = psutil.Process(job.pid).children(recursive=True)
    ranks_of(job)[1].suspend()  # this job can't save any more
    job.send_signal(signal.SIGINT)
    assert job.stderr is not None
    while "SIGINT received" not in (line := job.stderr.readline()):
        assert line and job.poll() is None
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 128 + signal.SIGTERM
    assert_gone(family)
    assert not list(tmp_path.glob("clue-ds-launch-*"))


@pytest.mark.heavy
def test_killing_the_launcher_leaves_no_rank_and_no_folder(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    config = write_config(corpus, tmp_path, steps=100_000)
    job = start(["pretrain", "--config", str(config)], tmp_path)
    wait_for(tmp_path / "run" / "log.jsonl", job)
    family = psutil.Process(job.pid).children(recursive=True)
    assert len(ranks_of(job)) == 2
    assert list(tmp_path.glob("clue-ds-launch-*"))
    job.kill()
    job.communicate(timeout=PATIENCE_S)
    assert_gone(family)
    assert not list(tmp_path.glob("clue-ds-launch-*"))


def test_a_killed_rank_fails_the_job_and_the_next_start_resumes_and_outlives_its_terminal(
    corpus: Path, tmp_path: Path
) -> None:
    config = write_config(corpus, tmp_path, steps=400)
    job = start(["pretrain", "--config", str(config)], tmp_path)
    wait_for(tmp_path / "run" / "checkpoints" / "step-00000050", job)
    family = psutil.Process(job.pid).children(recursive=True)
    ranks_of(job)[1].kill()
    _, errors = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 71
    assert "rank 1 on " in errors and "was killed" in errors
    assert_gone(family)

    again = start(["pretrain", "--config", str(config)], tmp_path, "nohup")
    wait_for(tmp_path / "run" / "checkpoints" / "step-00000200", again)
    again.send_signal(signal.SIGHUP)
    output, errors = again.communicate(timeout=PATIENCE_S)
    assert again.returncode == 0, errors
    assert "resuming after step" in output
    # That the losses are those of an uninterrupted run is proved in test_resume.py.
    assert [line["step"] for line in read_log(tmp_path / "run")] == list(range(1, 401))


@pytest.mark.heavy
def test_two_jobs_of_one_user_run_beside_each_other(corpus: Path, tmp_path: Path) -> None:
    jobs = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        config = write_config(corpus, tmp_path / name, steps=4)
        jobs.append(start(["pretrain", "--config", str(config)], tmp_path))
    for job in jobs:
        _, errors = job.communicate(timeout=2 * PATIENCE_S)
        assert job.returncode == 0, errors
    assert all(len(read_log(tmp_path / name / "run")) == 4 for name in ("one", "other"))


def test_dry_run_prints_a_command_that_a_shell_reads_back(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_PORT", "OMP_NUM_THREADS", "PYTHONSAFEPATH"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_TOKEN", "NCCL_AUTH_KEY", "MY_SETTING"):
        monkeypatch.setenv(name, "hidden")
    launch.main(["--local", "3", "--dry-run", "--", "pretrain", "--config", "my run.yaml"])
    output = capsys.readouterr().out
    assert "hidden" not in output
    words = shlex.split(output)
    assert words[-2:] == ["--config", "my run.yaml"]
    variables = dict(word.split("=", 1) for word in words[: words.index(sys.executable)])
    cores = len(os.sched_getaffinity(0))
    assert variables["OMP_NUM_THREADS"] == str(max(1, cores // 3))
    assert variables["PYTHONSAFEPATH"] == "1"
    assert f"--master_port={variables['MASTER_PORT']}" in words
    assert "--num_gpus=3" in words and "clue_ds.pretrain.train" in words


def local_environment(user: dict[str, str]) -> dict[str, str]:
    job = commands.local(["pretrain"], 2, 29_000, commands.Options(), user)
    return processes.complete(job, user, "id", Path("folder"))


def test_what_the_user_set_is_kept_but_not_where_rank_0_was_in_another_job() -> None:
    mine = {"OMP_NUM_THREADS": "7", "DS_ACCELERATOR": "cuda", "GLOO_SOCKET_IFNAME": "eth7"}
    environment = local_environment({**mine, "PDSH_SSH_ARGS_APPEND": "-v"})
    assert mine.items() <= environment.items()
    assert local_environment({"PYTHONUTF8": "0"})["PYTHONUTF8"] == "1"
    assert environment["NCCL_SOCKET_IFNAME"] == "lo"


@pytest.mark.parametrize(
    ("status", "finished", "stopped", "expected"),
    [
        (0, 2, 0, 0),
        (0, 1, 0, 1),
        (0, 0, 0, 1),
        (0, 0, 2, 75),
        (2, 0, 0, 2),
        (247, 1, 0, 71),
        (250, 2, 0, 0),
        (134, 0, 2, 75),
        (139, 0, 0, 71),
        (143, 0, 0, 143),
        (-9, 0, 0, 137),
    ],
)
def test_exit_status_is_true(
    status: int, finished: int, stopped: int, expected: int, tmp_path: Path
) -> None:
    """DeepSpeed's runner returns 0 when its child dies of a signal."""
    for number in range(finished):
        (tmp_path / f"finished-{number}").touch()
    for number in range(stopped):
        (tmp_path / f"stopped-{number}").touch()
    assert processes.true_status(status, tmp_path, num_ranks=2) == expected


def test_a_rank_that_never_ends_is_ended_after_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "SECONDS_AFTER_FIRST_END", 1.0)
    command = ["sh", "-c", f"touch {tmp_path}/finished-0; exec sleep 1000"]
    both = [hosts.Host("h1", 1), hosts.Host("h2", 1)]
    job = commands.Job(command, {}, num_ranks=2, hosts=both)
    assert processes.run(job, dict(os.environ), "a-stuck-job", tmp_path) == 72
    assert "rank 1 on h2 did not end within 1 s" in capsys.readouterr().err


def test_a_verdict_of_the_ranks_decides_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(dist.JOB_DIR_VARIABLE, str(tmp_path))
    peers = [Peer("h1", 1, ""), Peer("h2", 2, "")]
    assert diagnosis.write(diagnosis.make("unreachable", "is silent", [1], peers, {}))
    assert not diagnosis.write(diagnosis.make("died", "too late", [0], peers, {}))
    assert processes.true_status(247, tmp_path, num_ranks=2) == 73
    assert "rank 1 on h2 is silent" in capsys.readouterr().err


def test_a_dry_run_prints_the_command_though_no_host_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts").write_text("no-such-host-1 slots=8\nno-such-host-2 slots=8\n")
    monkeypatch.chdir(tmp_path)
    words = ["--hostfile", "hosts", "--dry-run", "--", "pretrain", "--config", "run.yaml"]
    launch.main(words)
    output = capsys.readouterr().out
    assert "# would end with: 2 of 2 hosts can't be reached by ssh" in output
    assert "--launcher=pdsh --master_addr=no-such-host-1" in output
    with pytest.raises(SystemExit, match="2"):
        launch.main([word for word in words if word != "--dry-run"])


def test_a_hostfile_that_names_only_this_machine_needs_no_ssh(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    hostfile = str(tmp_path / "hosts")
    launch.main(["--hostfile", hostfile, "--dry-run", "--", "pretrain", "--config", "run.yaml"])
    assert "--num_gpus=2" in capsys.readouterr().out


LEFTOVERS = {
    "srun --mpi=pmi2 --pty bash": {"PMI_RANK": "0", "PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "1"},
    "a terminal under mpirun": {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"},
    "srun": {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"},
    "torchrun": {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"},
}


@pytest.mark.parametrize("place", LEFTOVERS)
def test_what_the_user_says_wins_over_leftovers_of_a_launcher(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = LEFTOVERS[place]
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    launch.main(["--local", "2", "--dry-run", "--", "pretrain"])
    assert "--num_gpus=2" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("no-such-host-1 slots=8\nno-such-host-2 slots=8\n")
    launch.main(["--hostfile", "hosts", "--dry-run", "--", "pretrain"])
    assert "--launcher=pdsh" in capsys.readouterr().out
    # The ranks don't see them; what the user set for mpirun and the number of the job stay.
    mine = {"OMPI_MCA_btl": "tcp", "MPICH_X": "1", "SLURM_JOB_ID": "7", "SIZE": "2"}
    kept = environment.without_leftovers(left | mine)
    assert kept == {**mine, **{k: v for k, v in left.items() if k in mine}}


@pytest.mark.parametrize("place", ["srun --mpi=pmi2 --pty bash", "a terminal under mpirun"])
def test_a_world_of_one_is_no_launcher(
    place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in LEFTOVERS[place].items():
        monkeypatch.setenv(name, value)
    launch.main(["--dry-run", "--", "pretrain", "--config", "run.yaml"])
    is_one = place.startswith("srun")
    assert ("deepspeed.launcher.runner" in capsys.readouterr().out) == is_one
    assert dist.is_launched() is not is_one


def test_an_empty_variable_counts_as_missing_and_a_wrong_one_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "PMI_SIZE", "RANK"):
        monkeypatch.setenv(name, "")
    launch.main(["--dry-run", "--", "pretrain"])
    assert "deepspeed.launcher.runner" in capsys.readouterr().out
    assert launch._ranks_per_node({"SLURM_NTASKS_PER_NODE": "", "SLURM_NTASKS": ""}, 2) == 1
    with pytest.raises(LaunchError, match="SLURM_NTASKS='two' is not a number"):
        launch._ranks_per_node({"SLURM_NTASKS": "two"}, 2)


def test_a_list_of_devices_that_is_too_short_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "num_local_devices", lambda user: 2)
    options = commands.Options()
    listed = {"CUDA_VISIBLE_DEVICES": "0, 5,"}
    job = commands.local(["pretrain"], 2, 29_000, options, listed)
    assert "--include=localhost:0,5" in job.command
    with pytest.raises(LaunchError, match="3 ranks need a device each, .* lists 2; give --local 2"):
        commands.local(["pretrain"], 3, 29_000, options, listed)
    with pytest.raises(LaunchError, match="this machine has 2"):
        commands.local(["pretrain"], 3, 29_000, options, {})
    commands.local(["pretrain"], 3, 29_000, options, {"DS_ACCELERATOR": "cpu"})


def test_two_jobs_never_get_the_same_port() -> None:
    with environment.reserved_port("job") as first, environment.reserved_port("job") as second:
        assert first != second
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first))
        taken.listen()
        with environment.reserved_port("job") as third:
            assert third != first


BAD_HOSTFILES = {
    "missing": (None, "does not exist"),
    "empty": ("# nobody\n\n", "names no host"),
    "twice": ("h1 slots=1\nh2 slots=1\nh1 slots=1\n", "line 3: h1 appears twice"),
    "no slots": ("h1\n", "line 1: 'h1' is not a valid line"),
    "misspelled": ("h1 slot=2\n", "is not a valid line"),
    "zero": ("h1 slots=0\n", "has no slots"),
    "an option": ("-oProxyCommand=x slots=1\n", "is not a host name"),
    "user": ("me@h1 slots=1\n", "`Host h1`, `User me`"),
    "encoding": ("h1 slots=1\n# 甲\n".encode("gb18030"), "line 2: not UTF-8 text"),
    "loopback": ("localhost slots=1\nh2 slots=1\n", "a different machine on every host"),
}


@pytest.mark.parametrize("case", BAD_HOSTFILES)
def test_a_bad_hostfile_ends_the_job_before_deepspeed_trains_alone(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, said = BAD_HOSTFILES[case]
    path = tmp_path / "hosts"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit) as error:
        launch.main(["--hostfile", str(path), "--", "pretrain", "--config", "run.yaml"])
    assert error.value.code == 2
    assert said in capsys.readouterr().err


def test_hostfile_order_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    text = "\ufeff# 我们的\r\nnode-2 slots=8   # new\r\n\r\nnode-1 slots=4\r\n"
    path.write_text(text, encoding="utf-8")
    assert hosts.read_hostfile(path) == [("node-2", 8), ("node-1", 4)]


def test_deepspeed_env_may_have_comments_and_quotes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".deepspeed_env").write_text("NCCL_DEBUG=WARN\nA=1\n")
    (tmp_path / ".deepspeed_env").write_text("# mine\n\nexport A='two words'\nB=x=y\n")
    values = environment.read_deepspeed_env({})
    assert values == {"NCCL_DEBUG": "WARN", "A": "two words", "B": "x=y"}
    environment.write_env_file(tmp_path / "written", values)
    # As DeepSpeed 0.19.8 reads it.
    lines = (tmp_path / "written").read_text().splitlines()
    assert dict(line.split("=", maxsplit=1) for line in lines) == values
    with pytest.raises(LaunchError, match="the value of A"):
        environment.write_env_file(tmp_path / "written", {"A": "$(reboot)"})
    (tmp_path / ".deepspeed_env").write_text("just words\n")
    with pytest.raises(LaunchError, match="line 1: write NAME=value"):
        environment.read_deepspeed_env({})


def test_a_dry_run_prints_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"NCCL_DEBUG": "WARN", "AWS_SECRET": "a", "HF_HOME": "h", "HF_TOKEN": "t"}
    values |= {"TORCH_API_KEY": "k", "PASSWORD": "p"}
    assert environment.printable(values) == {"NCCL_DEBUG": "WARN", "HF_HOME": "h"}


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_CPUS_PER_TASK": "4",
}


def test_the_srun_command_has_one_task_a_rank_or_a_node(tmp_path: Path) -> None:
    verb = ["pretrain", "--config", "a b.yaml"]
    options = commands.Options()
    job = commands.slurm(verb, ["n1", "n2"], 2, "10.0.0.1", 20_001, options, SLURM, tmp_path)
    assert job.command[0] == "srun" and job.num_ranks == 4
    assert {"--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=4"} <= set(
        job.command
    )
    assert job.command[-4:] == ["-m", "clue_ds.pretrain.train", "--config", "a b.yaml"]
    assert job.variables["MASTER_ADDR"] == "10.0.0.1"
    assert job.variables["OMP_NUM_THREADS"] == "4"
    options.per = "node"
    job = commands.slurm(verb, ["n1", "n2"], 2, "10.0.0.1", 20_001, options, SLURM, tmp_path)
    assert {"--ntasks=2", "--ntasks-per-node=1", "--no_ssh"} <= set(job.command)
    assert any('--node_rank="$SLURM_NODEID"' in word for word in job.command)


def test_sweep_ends_a_job_by_its_identifier_and_nothing_else() -> None:
    def sleeper(identifier: str) -> subprocess.Popen[bytes]:
        variables = {**os.environ, sweep.JOB_ID_VARIABLE: identifier}
        return subprocess.Popen(["sleep", "60"], env=variables, start_new_session=True)

    ours, others = sleeper("a-job"), sleeper("a-job-of-another")
    subprocess.run([sys.executable, "-S", "-E", commands.SWEEP, "a-job"], check=True)
    assert ours.wait(timeout=PATIENCE_S) == -signal.SIGKILL
    assert others.poll() is None
    others.kill()
    others.wait()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--local", "0", "--", "pretrain"], "at least one rank"),
        (["--local", "2", "--", "vocab"], "not vocab"),
        (["--local", "2"], "not nothing"),
        (["--local", "2", "--local=3", "--", "pretrain"], "option --local is given twice"),
        (["--hostfile", "$NO_SUCH_VARIABLE/h", "--", "pretrain"], "write the whole path"),
    ],
)
def test_mistakes_say_what_to_type(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        launch.main(arguments)
    assert error.value.code == 2
    assert said in capsys.readouterr().err
