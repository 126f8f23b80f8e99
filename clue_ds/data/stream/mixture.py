"""`Mixture`: several corpora read as one, each with its share of the samples.

To its readers a mixture is one corpus that has the shards of all its corpora, in their order.
order.py gives each corpus its exact share of the stream, and its own epochs. All of them must have
one vocabulary, because an id must mean one token.

Rejected: weights that are normalised (adding a corpus would change all the others' shares without
anyone having asked for it); drawing the corpus of each row by chance (the shares would be right on
average only, and a resumed run would have to replay the draws).
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from clue_ds.data.corpus import Corpus
from clue_ds.data.stream.order import CYCLE
from clue_ds.errors import UserError


class Mixture:
    """`corpus` and, mixed into it, the corpora of `others` with their shares of the samples.

    Shares are multiples of 1/1000 between 0 and 1; `corpus` has what they leave of 1. Raises a
    UserError for other shares, for shares that leave nothing, for an empty corpus, and for corpora
    whose vocabularies differ.
    """

    def __init__(self, corpus: Corpus, others: Mapping[str, float]) -> None:
        self.corpora = [corpus, *(Corpus(directory) for directory in others)]
        self.shares = _shares(corpus, others)
        self.directory = corpus.directory
        self.vocab_file = corpus.vocab_file
        self.vocab_sha256 = corpus.vocab_sha256
        self.vocab_size = corpus.vocab_size
        self.lower_case = corpus.lower_case
        self.token_dtype = corpus.token_dtype
        self.shards = [shard for one in self.corpora for shard in one.shards]
        self.records = [record for one in self.corpora for record in one.records]
        self.files = [file for one in self.corpora for file in one.files]
        self.num_tokens = sum(one.num_tokens for one in self.corpora)
        self.num_sentences = sum(one.num_sentences for one in self.corpora)
        self.num_documents = sum(one.num_documents for one in self.corpora)
        content = [[one.fingerprint for one in self.corpora], self.shares.tolist()]
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        self._check()

    def _check(self) -> None:
        for one in self.corpora[1:]:
            if (one.vocab_sha256, one.lower_case) != (self.vocab_sha256, self.lower_case):
                raise UserError(
                    f"corpora of a mixture need one vocab.txt and one lower_case: {self.directory} "
                    f"has vocab.txt {self.vocab_sha256} (lower_case {self.lower_case}), "
                    f"{one.directory} has {one.vocab_sha256} (lower_case {one.lower_case}); "
                    f"make {one.directory} again with --vocab {shlex.quote(str(self.vocab_file))}"
                )
        for one in self.corpora:
            if one.num_tokens == 0:
                raise UserError(f"corpus {one.directory} is empty; leave it out of the mixture")


def names_of(directories: Iterable[str | Path]) -> list[str]:
    """A short name for each corpus, in order: its directory's, with a number if it is taken."""
    names: list[str] = []
    for directory in directories:
        name = Path(directory).resolve().name
        names.append(f"{name}-{len(names)}" if name in names else name)
    return names


def open_corpus(directory: str | Path, others: Mapping[str, float]) -> Corpus | Mixture:
    """The corpus in `directory`, or the mixture of it with `others` where there are any."""
    corpus = Corpus(directory)
    return Mixture(corpus, others) if others else corpus


def shares_of(corpus: Corpus | Mixture) -> np.ndarray:
    """The positions that each corpus has in a cycle, int64 [corpora]."""
    return corpus.shares if isinstance(corpus, Mixture) else np.array([CYCLE])


def corpora_of(corpus: Corpus | Mixture) -> list[Corpus]:
    """The corpora of a mixture, or the corpus itself."""
    return corpus.corpora if isinstance(corpus, Mixture) else [corpus]


def _shares(corpus: Corpus, others: Mapping[str, float]) -> np.ndarray:
    shares = []
    for directory, share in others.items():
        thousandths = round(share * CYCLE)
        if not 0 < thousandths < CYCLE or abs(share * CYCLE - thousandths) > 1e-6:
            raise UserError(
                f"data.mixture: the share {share} of {directory} must be a multiple of "
                f"{1 / CYCLE} between 0 and 1"
            )
        shares.append(thousandths)
    rest = CYCLE - sum(shares)
    if rest <= 0:
        raise UserError(
            f"data.mixture: shares add up to {sum(shares) / CYCLE}, which leaves nothing for "
            f"{corpus.directory}, the corpus they are mixed into; they must add up to less than 1"
        )
    return np.array([rest, *shares], dtype=np.int64)
