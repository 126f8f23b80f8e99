"""`clue-ds launch`: real ranks through DeepSpeed's launcher, true exit codes, no orphans.

Processes are started by the test and found through their parent, never by scanning for a name.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ranks import make_corpus, read_log, tiny_config

from clue_ds import config as run_config
from clue_ds import dist
from clue_ds.launcher import local

LAUNCH = [sys.executable, "-m", "clue_ds.cli", "launch", "--local", "2", "--"]
PATIENCE_S = 120


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
    """The ranks below a launcher that the test started."""
    below = psutil.Process(job.pid).children(recursive=True)
    return [p for p in below if "clue_ds.pretrain.train" in p.cmdline() and "-u" in p.cmdline()][
        -2:
    ]


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE_S)
    assert not alive


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*LAUNCH, *arguments], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_two_ranks_train_and_the_console_is_readable(corpus: Path, tmp_path: Path) -> None:
    job = start(["pretrain", "--config", str(write_config(corpus, tmp_path, steps=4))], tmp_path)
    output, errors = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, errors
    assert len(read_log(tmp_path / "run")) == 4
    lines = output.splitlines()
    assert "parameters in fp32, ZeRO stage 1, 2 ranks" in lines[0]
    assert [line.split()[1] for line in lines if line.startswith("step")] == [
        f"{n}/4" for n in range(1, 5)
    ]
    assert len(lines) == 7, f"DeepSpeed should be quiet: {output}"
    assert not errors


@pytest.mark.parametrize("mistake", ["--train.global_batch_size=9", "--train.lrr=1"])
def test_a_users_mistake_is_said_once_and_ends_with_2(
    corpus: Path, tmp_path: Path, mistake: str
) -> None:
    config = write_config(corpus, tmp_path, steps=4)
    job = start(["pretrain", "--config", str(config), mistake], tmp_path)
    _, errors = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 2
    said = "is not divisible" if "batch" in mistake else "Unrecognized options: --train.lrr"
    assert errors.count(said) == 1
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killing_the_launcher_leaves_no_rank(
    corpus: Path, tmp_path: Path, number: signal.Signals
) -> None:
    config = write_config(corpus, tmp_path, steps=100_000)
    job = start(["pretrain", "--config", str(config)], tmp_path)
    wait_for(tmp_path / "run" / "log.jsonl", job)
    family = psutil.Process(job.pid).children(recursive=True)
    assert len(ranks_of(job)) == 2
    job.send_signal(number)
    job.communicate(timeout=PATIENCE_S)
    assert job.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert_gone(family)


def test_a_killed_rank_fails_the_job_and_the_next_start_resumes(
    corpus: Path, tmp_path: Path
) -> None:
    config = write_config(corpus, tmp_path, steps=400)
    job = start(["pretrain", "--config", str(config)], tmp_path)
    wait_for(tmp_path / "run" / "checkpoints" / "step-00000050", job)
    family = psutil.Process(job.pid).children(recursive=True)
    ranks_of(job)[1].kill()
    job.communicate(timeout=PATIENCE_S)
    assert job.returncode not in (0, 2)
    assert_gone(family)

    again = start(["pretrain", "--config", str(config)], tmp_path)
    output, errors = again.communicate(timeout=PATIENCE_S)
    assert again.returncode == 0, errors
    assert "resuming after step" in output
    # That the losses are those of an uninterrupted run is proved in test_resume.py.
    assert [line["step"] for line in read_log(tmp_path / "run")] == list(range(1, 401))


def test_dry_run_prints_a_command_that_a_shell_reads_back(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_PORT", "OMP_NUM_THREADS", "PYTHONSAFEPATH"):
        monkeypatch.delenv(name, raising=False)
    local.main(["--local", "3", "--dry-run", "--", "pretrain", "--config", "my run.yaml"])
    words = shlex.split(capsys.readouterr().out)
    assert words[-2:] == ["--config", "my run.yaml"]
    variables = dict(word.split("=", 1) for word in words[: words.index(sys.executable)])
    cores = len(os.sched_getaffinity(0))
    assert variables["OMP_NUM_THREADS"] == str(max(1, cores // 3))
    assert variables["PYTHONSAFEPATH"] == "1"
    assert f"--master_port={variables['MASTER_PORT']}" in words
    assert "--num_gpus=3" in words and "clue_ds.pretrain.train" in words


def test_what_the_user_set_is_kept() -> None:
    mine = {"MASTER_PORT": "29999", "OMP_NUM_THREADS": "7", "DS_ACCELERATOR": "cuda"}
    environment = local.job_environment(2, mine)
    assert mine.items() <= environment.items()


@pytest.mark.parametrize(
    ("status", "num_finished", "expected"),
    [(0, 2, 0), (0, 1, 1), (0, 0, 1), (2, 0, 2), (247, 1, 247), (-9, 0, 137)],
)
def test_exit_status_is_true(status: int, num_finished: int, expected: int) -> None:
    """DeepSpeed's runner returns 0 when its child dies of a signal."""
    assert local.true_status(status, num_finished, num_ranks=2) == expected


def test_the_launcher_and_the_ranks_mean_the_same_variable() -> None:
    assert local.FINISHED_DIR_VARIABLE == dist.FINISHED_DIR_VARIABLE


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--local", "0", "--", "pretrain"], "at least one rank"),
        (["--local", "2", "--", "vocab"], "not vocab"),
        (["--local", "2"], "not nothing"),
    ],
)
def test_mistakes_say_what_to_type(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        local.main(arguments)
    assert error.value.code == 2
    assert said in capsys.readouterr().err
