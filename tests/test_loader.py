"""The loader: order, resuming, exceptions in its thread, and closing; and its benchmark."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from clue_ds.benchmarks.loader import loader as bench_loader
from clue_ds.data import Corpus, Loader, SampleStream
from clue_ds.data.build.command import shard
from clue_ds.data.stream.loader import Skip
from clue_ds.data.text.vocab import learn
from clue_ds.errors import UserError


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> SampleStream:
    directory: Path = tmp_path_factory.mktemp("loader")
    (directory / "text.txt").write_text(sample_text)
    text = (str(directory / "text.txt"),)
    learn(text, output=directory / "vocab.txt", size=400)
    shard(text, output=directory / "corpus", vocab=directory / "vocab.txt", workers=1)
    return SampleStream(Corpus(directory / "corpus"), 32, 8, seed=0)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("start_step", [0, 17])
def test_batches_come_in_order(stream: SampleStream, start_step: int) -> None:
    with Loader(stream, rank=1, world_size=2, start_step=start_step) as loader:
        for step in range(start_step, start_step + 10):
            assert_equal(next(loader), stream.batch(step, 1, 2))
        assert loader.next_step == start_step + 10


def test_skipped_batches_are_never_made(stream: SampleStream) -> None:
    skips = [Skip(3, 5), Skip(6, 100)]
    numbers = [0, 1, 2, 8, 9, 10, 111, 112]
    for start_step in (0, 4):
        with Loader(stream, start_step=start_step, skips=skips) as loader:
            for number in numbers[start_step:]:
                assert_equal(next(loader), stream.batch(number))


def test_batches_for_a_gpu_are_pinned_by_a_thread_that_uses_that_gpu(
    stream: SampleStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: which calls of torch are made, in which thread (tests/gpu uses a real GPU)."""
    asked = []

    def set_device(device: torch.device) -> None:
        asked.append((threading.current_thread().name, device))

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        asked.append((threading.current_thread().name, "pinned"))
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype).copy_(tensor)

    monkeypatch.setattr(torch.accelerator, "set_device_index", set_device)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    gpu = torch.device("cuda", 1)
    with Loader(stream, device=gpu) as loader:
        batch = next(loader)
    assert_equal(batch, stream.batch(0))
    assert asked[0] == ("clue-ds-loader", gpu)
    assert set(asked[1:]) == {("clue-ds-loader", "pinned")} and len(asked) > len(batch)


def test_close_ends_thread_and_iterator(stream: SampleStream) -> None:
    loader = Loader(stream)
    next(loader)
    loader.close()
    loader.close()
    assert "clue-ds-loader" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(StopIteration):
        next(loader)


class Failing(SampleStream):
    """A stream whose third batch can't be made."""

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> dict[str, torch.Tensor]:
        if step == 2:
            raise MemoryError("no room for step 2")
        return super().batch(step, rank, world_size)


def test_exception_of_the_thread_reaches_the_caller(stream: SampleStream) -> None:
    loader = Loader(Failing(stream.corpus, 32, 8, seed=0))
    next(loader)
    next(loader)
    with pytest.raises(MemoryError, match="step 2"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)


def test_bad_world_size_is_an_error_at_once(stream: SampleStream) -> None:
    with pytest.raises(UserError, match="not divisible by 3"):
        Loader(stream, 0, 3)


def test_benchmark_runs_from_a_text_file(tmp_path: Path, sample_text: str) -> None:
    """`clue-ds bench loader --text`: the peers run, and the result records the environment."""
    (tmp_path / "text.txt").write_text(sample_text * 3)
    output = tmp_path / "results" / "loader.json"
    bench_loader(text=tmp_path / "text.txt", output=output, seq_length=32, batch_size=4, batches=2)
    figures = json.loads(output.read_text())
    assert len(figures["contenders"]) == 17  # ours: six kinds of samples, plain and whole word
    assert all(row["samples_per_second"] > 0 for row in figures["contenders"].values())
    assert len(figures["ratios"]) == 5
    version = figures["environment"]["versions"]["torch"]
    assert version.partition("+")[0] == torch.__version__.partition("+")[0]
    assert str(tmp_path) not in output.read_text()


def test_benchmark_needs_one_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one of --corpus and --text"):
        bench_loader()
    with pytest.raises(UserError, match="one of --corpus and --text"):
        bench_loader(corpus=tmp_path, text=tmp_path)
