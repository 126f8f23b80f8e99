"""The sbatch files on a real Slurm of two nodes: signalled, pre-empted, continued, given up."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CLUE_DS
from jobs import PATIENCE_S, SBATCH, TIME, log_of, state, submit, wait_for_state
from ranks import read_log, tiny_config

from clue_ds import config as run_config
from clue_ds.checkpoint.masters import load_weights

NODES = ["--nodes=2", "--ntasks-per-node=1"]


def write_config(corpus: Path, folder: Path, **sections: Any) -> Path:
    usual = {
        "train": {"steps": 400, "warmup_steps": 2},
        "checkpoint": {"every": 10_000, "keep": 9},
        "log": {"every": 10, "tensorboard": False},
    }
    folder.mkdir(exist_ok=True)
    config = tiny_config(corpus, folder / "run", **{**usual, **sections})
    run_config.save(config, folder / "run.yaml")
    return folder / "run.yaml"


def wait_for_steps(run_dir: Path, num_steps: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    path = run_dir / "log.jsonl"
    while not path.is_file() or len(path.read_text().splitlines()) < num_steps // 10:
        assert time.monotonic() < deadline, f"{path} has not {num_steps} steps"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def undisturbed(
    corpus: Path, slurm: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_config(corpus, folder)
    job = submit(slurm, folder, *NODES, SBATCH / "pretrain.sbatch", "--config", config)
    wait_for_state(slurm, job, folder, "COMPLETED")
    assert "2 ranks on 1 host" in log_of(folder, job)  # two nodes, but one machine
    # Step 1 has a line of its own.
    assert [line["step"] for line in read_log(folder / "run")] == [1, *range(10, 401, 10)]
    return folder / "run"


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = load_weights(one)[1], load_weights(other)[1]
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_signalled_it_saves_requeues_and_ends_with_the_same_weights(
    corpus: Path, slurm: dict[str, str], undisturbed: Path, tmp_path: Path
) -> None:
    config = write_config(corpus, tmp_path)
    job = submit(slurm, tmp_path, *NODES, SBATCH / "pretrain.sbatch", "--config", config)
    wait_for_steps(tmp_path / "run", 50)
    # What --signal=USR1@180 does when time is nearly up.
    subprocess.run(["scancel", "--signal=USR1", job], env=slurm, check=True)
    wait_for_state(slurm, job, tmp_path, "COMPLETED")
    text = log_of(tmp_path, job)
    assert "stopped on request after step" in text
    assert f"putting job {job} back into the queue" in text
    assert "resuming after step" in text and "done:" in text
    saved = [p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert len(saved) == 2, saved
    assert_same_weights(tmp_path / "run", undisturbed)


def test_requeued_onto_fewer_nodes_it_continues(
    corpus: Path, slurm: dict[str, str], tmp_path: Path
) -> None:
    config = write_config(corpus, tmp_path)
    job = submit(slurm, tmp_path, *NODES, SBATCH / "pretrain.sbatch", "--config", config)
    wait_for_steps(tmp_path / "run", 50)
    subprocess.run(["scancel", "--signal=USR1", job], env=slurm, check=True)
    wait_for_state(slurm, job, tmp_path, "PENDING")
    fewer = ["scontrol", "update", f"JobId={job}", "NumNodes=1", "NumTasks=1"]
    subprocess.run(fewer, env=slurm, check=True)
    wait_for_state(slurm, job, tmp_path, "COMPLETED")
    text = log_of(tmp_path, job)
    assert "resuming after step" in text and "done:" in text
    assert "saved by 2 ranks under ZeRO stage 1, and 1 rank under ZeRO stage 1 continue" in text
    lines = read_log(tmp_path / "run")
    assert lines[-1]["step"] == 400 and lines[-1]["samples"] == 8 * 400


def test_an_array_continues_one_run_and_finds_it_done(
    corpus: Path, slurm: dict[str, str], undisturbed: Path, tmp_path: Path
) -> None:
    """--per node: deepspeed's launcher inside one task a node, which USR1 must not kill."""
    config = write_config(corpus, tmp_path)
    slurm = {**slurm, "LAUNCH_OPTIONS": "--per node"}
    job = submit(
        slurm, tmp_path, *NODES, "--array=1-2%1", SBATCH / "pretrain.sbatch", "--config", config
    )
    wait_for_steps(tmp_path / "run", 50)
    subprocess.run(["scancel", "--signal=USR1", f"{job}_1"], env=slurm, check=True)
    wait_for_state(slurm, f"{job}_1", tmp_path, "COMPLETED")
    wait_for_state(slurm, f"{job}_2", tmp_path, "COMPLETED")
    text = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert "the next job of the array continues" in text and "resuming after step" in text
    assert_same_weights(tmp_path / "run", undisturbed)


def test_preempted_by_a_higher_partition_it_saves_requeues_and_continues(
    corpus: Path, slurm: dict[str, str], undisturbed: Path, tmp_path: Path
) -> None:
    config = write_config(corpus, tmp_path)
    job = submit(slurm, tmp_path, *NODES, SBATCH / "pretrain.sbatch", "--config", config)
    wait_for_steps(tmp_path / "run", 50)
    # It needs both nodes whole, so Slurm takes them from ours.
    urgent = submit(
        slurm, tmp_path, "--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 1"
    )
    wait_for_state(slurm, urgent, tmp_path, "COMPLETED")
    wait_for_state(slurm, job, tmp_path, "COMPLETED")
    text = log_of(tmp_path, job)
    assert "stopped on request after step" in text
    assert "resuming after step" in text and "done:" in text
    assert_same_weights(tmp_path / "run", undisturbed)


def test_a_singleton_chain_continues_where_jobs_may_not_requeue(
    corpus: Path, slurm: dict[str, str], undisturbed: Path, tmp_path: Path
) -> None:
    config = write_config(corpus, tmp_path)
    options = [*NODES, "--no-requeue", "--dependency=singleton", "--job-name=chain"]
    first, second = (
        submit(slurm, tmp_path, *options, SBATCH / "pretrain.sbatch", "--config", config)
        for _ in range(2)
    )
    wait_for_steps(tmp_path / "run", 50)
    assert state(slurm, second) == "PENDING"
    subprocess.run(["scancel", "--signal=USR1", first], env=slurm, check=True)
    wait_for_state(slurm, second, tmp_path, "COMPLETED")
    assert "the same command continues" in log_of(tmp_path, first)
    assert "resuming after step" in log_of(tmp_path, second)
    assert_same_weights(tmp_path / "run", undisturbed)


def test_a_chain_gives_up_after_three_restarts_without_a_checkpoint(
    corpus: Path, slurm: dict[str, str], tmp_path: Path
) -> None:
    """The third restart in a row still trains; it dies before it has saved, and the fourth ends."""
    config = write_config(corpus, tmp_path)
    restarts = tmp_path / "run" / "restarts.json"
    restarts.parent.mkdir()
    restarts.write_text(json.dumps({"step": 0, "restarts": 2}))
    job = submit(
        slurm, tmp_path, *NODES, "--array=1-2%1", SBATCH / "pretrain.sbatch", "--config", config
    )
    wait_for_steps(tmp_path / "run", 10)
    assert json.loads(restarts.read_text()) == {"step": 0, "restarts": 3}
    # Not by scancel, of which the ranks are warned, so that they save.
    os.kill(json.loads((tmp_path / "run" / "alive.json").read_text())["pid"], signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_S
    while [state(slurm, f"{job}_{number}") for number in (1, 2)] != ["FAILED"] * 2:
        assert time.monotonic() < deadline, log_of(tmp_path, job)
        time.sleep(0.3)
    text = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert "4 restarts in a row began at step 0" in text


def test_plain_srun_needs_no_launcher(corpus: Path, slurm: dict[str, str], tmp_path: Path) -> None:
    config = write_config(corpus, tmp_path, train={"steps": 20, "warmup_steps": 2})
    command = ["srun", *NODES, sys.executable, "-m", "clue_ds.pretrain.train", "--config", config]
    subprocess.run(command, env=slurm, cwd=tmp_path, check=True, timeout=PATIENCE_S)
    assert read_log(tmp_path / "run")[-1]["step"] == 20


def test_deepspeeds_own_slurm_launcher(corpus: Path, slurm: dict[str, str], tmp_path: Path) -> None:
    """It starts scripts only, reads no comments in .deepspeed_env, and sets no RANK."""
    config = write_config(corpus, tmp_path, train={"steps": 20, "warmup_steps": 2})
    (tmp_path / ".deepspeed_env").write_text("# mine\n\nDS_ACCELERATOR=cpu\n")
    options = {**slurm, "LAUNCH_OPTIONS": "--launcher slurm --bind-cores"}
    job = submit(options, tmp_path, *NODES, SBATCH / "pretrain.sbatch", "--config", config)
    wait_for_state(slurm, job, tmp_path, "COMPLETED")
    assert "2 ranks on 1 host" in log_of(tmp_path, job)
    assert read_log(tmp_path / "run")[-1]["step"] == 20


def test_doctor_runs_on_the_nodes_of_a_job(slurm: dict[str, str], tmp_path: Path) -> None:
    doctor = f"{CLUE_DS} launch --slurm -- doctor"
    job = submit(slurm, tmp_path, *NODES, "--output=doctor-%j.log", f"--wrap={doctor}")
    # And without an sbatch file, as slurm/README.md has it.
    command = ["srun", *NODES, CLUE_DS, "launch", "--", "doctor"]
    direct = subprocess.run(
        command, env=slurm, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert direct.returncode == 0, direct.stderr
    wait_for_state(slurm, job, tmp_path, "COMPLETED")
    for text in (direct.stdout, log_of(tmp_path, job)):
        assert "finished an all-reduce: 2 ranks on 1 host" in text
        assert not re.search("^bad ", text, re.MULTILINE), text


PIPELINE = ("shard", "pretrain", "export", "finetune")


def pipeline(slurm: dict[str, str], folder: Path, **variables: str | Path) -> dict[str, str]:
    """Hand in slurm/pipeline.sh's jobs; their numbers by name."""
    # The files ask for more cores than the nodes of this Slurm have.
    options = {f"{name}_OPTIONS": "--cpus-per-task=1" for name in ("SHARD", "EXPORT", "FINETUNE")}
    result = subprocess.run(
        [SBATCH / "pipeline.sh", TIME, *NODES],
        env={**slurm, **options, **{name: str(value) for name, value in variables.items()}},
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    lines = [line.split() for line in result.stdout.splitlines()]
    return {words[0]: words[1] for words in lines if words[0] in PIPELINE}


def test_the_pipeline_goes_from_text_to_a_finetuned_model(
    corpus: Path, slurm: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    for name, count in (("train", 32), ("dev", 8)):
        lines = [{"text": f"第{n}句", "label": ("是", "否")[n % 2]} for n in range(count)]
        text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        (tmp_path / "data" / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    task = "name: parity\ntext: [text]\nlabels: [是, 否]\nepochs: 1\nmax_length: 16\n"
    (tmp_path / "parity.yaml").write_text(task, encoding="utf-8")
    variables = {
        "TEXT": corpus.parent / "te*.txt",
        "VOCAB": corpus.parent / "vocab.txt",
        "CONFIG": write_config(corpus, tmp_path, train={"steps": 20, "warmup_steps": 2}),
        "TASK": "parity.yaml",
        "DATA": "data",
    }
    jobs = pipeline(slurm, tmp_path, **variables)
    assert list(jobs) == list(PIPELINE)
    assert state(slurm, jobs["finetune"]) == "PENDING"  # it waits for the others
    for job in jobs.values():
        wait_for_state(slurm, job, tmp_path, "COMPLETED")
    assert read_log(tmp_path / "run")[-1]["step"] == 20
    assert (tmp_path / "run" / "export" / "hf" / "model.safetensors").is_file()
    assert list((tmp_path / "run" / "finetune").glob("parity/best/model/*.safetensors"))
    again = pipeline(slurm, tmp_path, **variables)
    subprocess.run(["scancel", *again.values()], env=slurm, check=True)
    assert list(again) == ["pretrain", "export", "finetune"]  # the corpus is there


def test_when_a_job_of_the_pipeline_fails_the_next_ones_are_cancelled(
    corpus: Path, slurm: dict[str, str], tmp_path: Path
) -> None:
    config = write_config(corpus, tmp_path)
    jobs = pipeline(slurm, tmp_path, TEXT="nothing.txt", VOCAB="vocab.txt", CONFIG=config)
    assert list(jobs) == ["shard", "pretrain", "export"]
    deadline = time.monotonic() + PATIENCE_S
    expected = {"shard": "FAILED", "pretrain": "CANCELLED", "export": "CANCELLED"}
    while (now := {name: state(slurm, job) for name, job in jobs.items()}) != expected:
        assert time.monotonic() < deadline, now
        time.sleep(0.3)
    assert "nothing.txt" in log_of(tmp_path, jobs["shard"])
