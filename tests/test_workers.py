"""Processes and MPI ranks: the same bytes with any of them, and after a kill at any time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import zstandard

from clue_ds.data import Corpus
from clue_ds.data.build.progress import ShardProgress
from clue_ds.data.build.workers import mpi_size
from clue_ds.data.text.vocab import learn

RULES = ("--clean.duplicates", "--clean.repeated-lines", "--held-out", "0.1")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    """Some 200 KB of text with duplicates, its vocabulary, and `whole`: the corpus it makes."""
    directory = tmp_path_factory.mktemp("inputs")
    rng = random.Random(0)
    lines = [line for line in sample_text.split("\n") if line]
    documents = [f"{rng.choice(lines)}{i % 900}\n{rng.choice(lines)}\n" for i in range(1200)]
    (directory / "text.txt").write_text("\n".join(documents))
    learn((str(directory / "text.txt"),), output=directory / "vocab.txt", size=500)
    assert run(command(directory, directory / "whole", "--workers", "1")).returncode == 0
    return directory


def command(inputs: Path, output: Path, *arguments: str) -> list[str]:
    common = ["--vocab", str(inputs / "vocab.txt"), "--shard-megabytes", "0.01", *RULES]
    verb = [sys.executable, "-m", "clue_ds.cli", "shard", str(inputs / "text.txt")]
    return [*verb, *common, "--output", str(output), *arguments]


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)


def digests(corpus: Path) -> dict[str, str]:
    files = sorted(path for path in corpus.rglob("*") if path.is_file())
    return {
        str(path.relative_to(corpus)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture
def mpirun() -> list[str]:
    """The mpirun to use, as the start of a command; an MPI wheel installs one beside Python."""
    beside = Path(sys.executable).with_name("mpirun")
    program = str(beside) if beside.exists() else shutil.which("mpirun")
    if program is None:
        pytest.skip("there is no mpirun here (Debian: openmpi-bin)")
    pytest.importorskip("mpi4py")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    is_open_mpi = "Open MPI" in version.stdout
    return [program, *(["--oversubscribe", "--allow-run-as-root"] if is_open_mpi else [])]


def test_mpi_ranks_write_the_same_bytes(inputs: Path, tmp_path: Path, mpirun: list[str]) -> None:
    """One rank does everything, or rank 0 reads and others convert; an error is printed once."""
    for num_ranks in ("1", "2", "3"):
        output = tmp_path / num_ranks
        result = run([*mpirun, "-n", num_ranks, *command(inputs, output)])
        assert result.returncode == 0, result.stderr
        assert digests(output) == digests(inputs / "whole")
    again = run([*mpirun, "-n", "3", *command(inputs, output)])
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("already complete") == 1
    other = run([*mpirun, "-n", "3", *command(inputs, output, "--t2s")])
    assert other.returncode != 0
    assert other.stderr.count("t2s: False then, True now") == 1
    assert "Traceback" not in other.stderr


def test_workers_option_under_mpi_is_refused(
    inputs: Path, tmp_path: Path, mpirun: list[str]
) -> None:
    result = run([*mpirun, "-n", "2", *command(inputs, tmp_path / "c", "--workers", "2")])
    assert result.returncode != 0
    assert "under MPI, leave it out" in result.stderr


def test_size_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert mpi_size() == 1
    monkeypatch.setenv("SLURM_NTASKS", "8")  # srun without MPI: eight tasks, not one job
    assert mpi_size() == 1
    monkeypatch.setenv("PMIX_RANK", "3")
    assert mpi_size() == 8


def children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def wait_for_shards(output: Path, num: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        if len(list(output.glob(".building/converted-*.json"))) >= num:
            return
        time.sleep(0.002)


@pytest.mark.heavy
def test_memory_of_all_processes_is_bounded(inputs: Path, tmp_path: Path, sample_text: str) -> None:
    """256 MiB as one line, unpacked from 50 KiB: some five times what the processes may hold.

    Resident memory of the reader and two workers, library pages that they share counted thrice;
    rjieba adds 40 MiB a worker (`clue-ds bench shard --memory-megabytes` measures that).
    """
    packer = zstandard.ZstdCompressor().compressobj()
    text = sample_text.replace("\n", "").encode()
    with open(tmp_path / "text.zst", "wb") as file:
        for _ in range((256 << 20) // len(text)):
            file.write(packer.compress(text))
        file.write(packer.flush())
    verb = [sys.executable, "-m", "clue_ds.cli", "shard", str(tmp_path / "text.zst")]
    verb += [
        "--vocab",
        str(inputs / "vocab.txt"),
        "--output",
        str(tmp_path / "c"),
        "--words",
        "none",
    ]
    largest = 0
    with subprocess.Popen([*verb, "--workers", "2"], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                family = [psutil.Process(process.pid), *children(process)]
                largest = max(largest, sum(one.memory_info().rss for one in family))
            time.sleep(0.02)
    assert process.returncode == 0
    assert Corpus(tmp_path / "c").num_tokens > 70_000_000
    assert 200 << 20 < largest < 1 << 30  # as docs/corpus.md promises


def moments() -> Iterator[tuple[str, int]]:
    rng = random.Random(os.environ.get("KILL_SEED", "0"))
    for victim in ("a worker", "everything", "a worker of MPI", "everything of MPI"):
        yield victim, rng.randint(0, 18)


@pytest.mark.parametrize(("victim", "num_shards"), list(moments()))
def test_killed_at_any_moment(
    inputs: Path, tmp_path: Path, mpirun: list[str], victim: str, num_shards: int
) -> None:
    """After a SIGKILL at a random moment, the same command completes the same bytes."""
    output = tmp_path / "c"
    if "MPI" in victim:
        words = [*mpirun, "-n", "3", *command(inputs, output)]
    else:
        words = command(inputs, output, "--workers", "2")
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for_shards(output, num_shards, process)
        time.sleep(random.random() * 0.1)
        family = children(process)
        if "everything" in victim:
            process.kill()
        else:
            # The last one that was started: a converting process, not the reader.
            family = [c for c in family if "shard" in " ".join(c.cmdline()) or "spawn" in c.name()]
            family = family[-1:] or children(process)[-1:]
        for child in family:
            try:
                child.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        process.wait(timeout=120)
    result = run(command(inputs, output, "--workers", "1"))
    assert result.returncode == 0, result.stderr
    assert digests(output) == digests(inputs / "whole")
    Corpus(output).verify()


def test_progress_says_rate_and_time_left_from_the_first_shard_on() -> None:
    """The rate doesn't count what an earlier run had finished."""
    progress = ShardProgress(1000_000_000, None, now=0.0)
    progress.advance(500_000_000, found=True, now=0.1)
    assert progress.state(0.1) == "476.8 MiB of 953.7 MiB"
    progress.advance(100_000_000, now=40.0)
    assert progress.state(40.0) == "572.2 MiB of 953.7 MiB, 2.4 MiB/s, 0:02:40 left"
    unknown = ShardProgress(None, None, now=0.0)
    unknown.advance(100_000_000, now=20.0)
    assert unknown.state(20.0) == "95.4 MiB, 4.8 MiB/s"
