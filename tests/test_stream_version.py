"""The samples and masks of this stream version never change: others need a new version."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from clue_ds.benchmarks.synthetic import write_corpus
from clue_ds.data import Corpus, SampleStream
from clue_ds.data.stream.samples import STREAM_VERSION

OPTIONS: list[dict[str, Any]] = [
    {"whole_word": False},
    {"whole_word": True, "order": "lanes"},
    {"max_ngram": 3, "samples": "sentences"},
    {"samples": "documents", "order": "lanes"},
    {"samples": "packed"},
    {"samples": "nsp"},
    {"samples": "sop", "mask_prob": 0.3},
]
# Digests of three batches by stream version. When one differs, raise STREAM_VERSION and add a row.
GOLDEN = {
    1: [
        "7ae3f405679da5b8",
        "326c08d744180dd0",
        "6af91e73f01a40c5",
        "9f53bfc39bca531e",
        "ccbe315738b425fa",
        "939e64fba173df99",
        "3ee9a9648700e788",
    ]
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    directory: Path = tmp_path_factory.mktemp("stream") / "corpus"
    write_corpus(directory, 200_000, 3, holes="nothing")
    return Corpus(directory)


def test_samples_and_masks_are_those_of_this_stream_version(corpus: Corpus) -> None:
    digests = []
    for options in OPTIONS:
        stream = SampleStream(corpus, 128, 24, seed=20_261_123, **options)
        digest = hashlib.sha256()
        for step in (0, 7, 1_000_003):
            for name, array in sorted(stream.arrays(step).items()):
                digest.update(name.encode() + array.astype("<i8").tobytes())
        digests.append(digest.hexdigest()[:16])
    assert digests == GOLDEN[STREAM_VERSION]
