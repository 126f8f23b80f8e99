"""`Mixture`: several corpora read as one, each with its share of the samples.

To whatever reads it a mixture is one corpus with the shards of all its parts, in their order;
order.py gives each part its exact share and its own epochs. Parts must have one vocabulary, because
an id must mean one token. Rejected: weights that are normalised (a new part would change all
the others' shares without anyone having written that), sampling each row's part by chance (the
shares would be right on average only, and a resume would have to replay the draws).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from clue_ds.data.corpus import Corpus
from clue_ds.data.stream.order import CYCLE
from clue_ds.errors import UserError


class Mixture:
    """`corpus` and, mixed into it, the corpora of `others` with their shares of the samples.

    Shares are multiples of 1/1000 between 0 and 1; `corpus` has what they leave of 1. Raises a
    UserError for shares that don't add up and for parts with different vocabularies.
    """

    def __init__(self, corpus: Corpus, others: Mapping[str, float]) -> None:
        self.parts = [corpus, *(Corpus(directory) for directory in others)]
        self.shares = _shares(corpus, others)
        self.directory = corpus.directory
        self.vocab_file = corpus.vocab_file
        self.vocab_sha256 = corpus.vocab_sha256
        self.vocab_size = corpus.vocab_size
        self.lower_case = corpus.lower_case
        self.token_dtype = corpus.token_dtype
        self.shards = [shard for part in self.parts for shard in part.shards]
        self.records = [record for part in self.parts for record in part.records]
        self.files = [file for part in self.parts for file in part.files]
        self.num_tokens = sum(part.num_tokens for part in self.parts)
        self.num_sentences = sum(part.num_sentences for part in self.parts)
        self.num_documents = sum(part.num_documents for part in self.parts)
        content = [[part.fingerprint for part in self.parts], self.shares.tolist()]
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        self._check_parts()

    def _check_parts(self) -> None:
        for part in self.parts[1:]:
            if (part.vocab_sha256, part.lower_case) != (self.vocab_sha256, self.lower_case):
                raise UserError(
                    f"corpora of one mixture need one vocabulary and one case: {self.directory} "
                    f"has vocab.txt {self.vocab_sha256} (lower_case {self.lower_case}), "
                    f"{part.directory} has {part.vocab_sha256} (lower_case {part.lower_case}); "
                    f"make {part.directory} again with --vocab {self.vocab_file}"
                )
        for part in self.parts:
            if part.num_tokens == 0:
                raise UserError(f"corpus {part.directory} is empty; leave it out of the mixture")

    def names(self) -> list[str]:
        """A short name for each part, in their order: the directory's, numbered if it is taken."""
        names: list[str] = []
        for part in self.parts:
            name = Path(part.directory).resolve().name
            names.append(f"{name}-{len(names)}" if name in names else name)
        return names


def open_corpus(directory: str | Path, others: Mapping[str, float]) -> Corpus | Mixture:
    """The corpus in `directory`, or the mixture of it with `others` where there are any."""
    corpus = Corpus(directory)
    return Mixture(corpus, others) if others else corpus


def shares_of(corpus: Corpus | Mixture) -> np.ndarray:
    """Positions of a cycle for each part, int64 [parts]."""
    return corpus.shares if isinstance(corpus, Mixture) else np.array([CYCLE])


def parts_of(corpus: Corpus | Mixture) -> list[Corpus]:
    return corpus.parts if isinstance(corpus, Mixture) else [corpus]


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
