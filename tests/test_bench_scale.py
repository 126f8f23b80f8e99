"""Small runs of the benchmarks of large corpora: they give figures and leave no files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from clue_ds.benchmarks import scaling
from clue_ds.benchmarks.cold import cold
from clue_ds.benchmarks.scale import scale
from clue_ds.benchmarks.synthetic import write_corpus
from clue_ds.data import Corpus, SampleStream
from clue_ds.errors import UserError


@pytest.mark.parametrize("order", ["shuffle", "lanes"])
def test_a_sparse_corpus_of_100_gb_gives_batches(tmp_path: Path, order: str) -> None:
    """With 50 G tokens: sample numbers, offsets and positions are beyond 2^32."""
    write_corpus(tmp_path / "corpus", 50_000_000_000, 40, holes="everything")
    used = sum(path.stat().st_blocks for path in (tmp_path / "corpus").iterdir()) * 512
    assert used < 40_000_000  # 24 MB of it are checksums
    corpus = Corpus(tmp_path / "corpus")
    assert corpus.num_tokens == 50_000_000_000
    last = corpus.shards[-1].tokens
    assert len(last) == 1_250_000_000
    stream = SampleStream(corpus, 128, 64, seed=0, order=order)
    assert stream.num_samples == 40 * -(-1_250_000_000 // 126)
    for step in (0, stream.steps_per_epoch - 2, 10**10):
        batch = stream.batch(step)
        # All tokens are 0, [PAD], which may be masked; nearly all windows are full.
        assert (batch["lengths"] == 128).sum() >= 63
    assert SampleStream(corpus, 128, 64, seed=0).uses_lanes  # by its size


@pytest.mark.heavy
def test_a_process_that_opens_100_gb_stays_under_300_mb(tmp_path: Path) -> None:
    output = tmp_path / "scale.json"
    scale(output, tmp_path, gigatokens=50, shards=200, rounds=1)
    figures = json.loads(output.read_text())
    assert set(figures["orders"]) == {"shuffle", "lanes"}
    assert figures["num_tokens"] == 50_000_000_000
    assert figures["kinds"]["num_sentences"] > 100_000_000
    for name in ("sentences", "documents", "packed", "nsp"):
        assert figures["kinds"][name]["index_megabytes"] > 3
        assert figures["kinds"][name]["megabytes_anonymous"] < 150  # measured: 75
    for row in figures["orders"].values():
        # Measured: 180. Pages that later batches touch are page cache, which the kernel can free.
        assert row["megabytes_resident_with_first_batch"] < 300
        assert row["megabytes_resident_with_torch_as_well"] > 300  # what the arrays save
    assert [path.name for path in tmp_path.iterdir()] == ["scale.json"]


def test_cold_benchmark(tmp_path: Path) -> None:
    """Also checks that random ids are ordinary tokens and that the corpus is deleted at the end."""
    output = tmp_path / "cold.json"
    cold(output, tmp_path, gigabytes=0.02, seconds=0.3, rounds=1, batch_size=64)
    figures = json.loads(output.read_text())
    assert len(figures["contenders"]) == 3
    assert all(row["samples_per_second"] > 0 for row in figures["contenders"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["cold.json"]
    with pytest.raises(UserError, match="GB free"):
        cold(directory=tmp_path, gigabytes=10**9)
    write_corpus(tmp_path / "corpus", 1000, 2, holes="nothing")
    tokens = np.concatenate([one.tokens for one in Corpus(tmp_path / "corpus").shards])
    assert tokens.min() >= 5 and (tokens & 0x7FFF).max() < 21_128


def test_scaling_says_that_a_loss_did_not_fall_and_leaves_out_ten_steps(tmp_path: Path) -> None:
    """It was an AssertionError, called a bug of clue-ds; and the log's line of step 1 counted."""
    losses = {1: 5.0, 5: 4.5, 10: 4.0, 15: 3.9, 20: 3.8}
    times = {"seconds_per_step": 9.0, "cpu_seconds_per_step": 8.0}
    lines = [{"step": step, "loss": loss, **times} for step, loss in losses.items()]
    for line in lines[3:]:
        line |= {"seconds_per_step": 0.5, "cpu_seconds_per_step": 0.25}
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    assert scaling._seconds_per_step(tmp_path) == (0.5, 0.25)
    lines[-1]["loss"] = 5.5
    log.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"did not fall in 20 steps \(from 5.00 to 5.50\)"):
        scaling._seconds_per_step(tmp_path)
    with pytest.raises(UserError, match="--steps 15 must be at least 20"):
        scaling.scaling(tmp_path, steps=15)
