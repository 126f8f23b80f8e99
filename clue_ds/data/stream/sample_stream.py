"""`SampleStream`: batches as a pure function of the step.

What a sample is depends on its kind (samples.py). By default it is a window of seq_length - 2
consecutive tokens of one shard between [CLS] and [SEP]; the last window of a shard is shorter.
Windows go on across sentence and document ends, so nothing is cut away and only the last window of
a shard is padded: every token is in exactly one sample.

Guarantees: batch(step) depends on the corpus, seed, global batch size, length, kind, order and
masking options, never on ranks, workers or restarts. Each sample comes exactly once per epoch
(order.py), every batch is full, and any step is computed in constant time and memory. Three
compiled calls (order, rows, masks) write a batch straight into the tensors' memory, without the
GIL. Only `batch` needs torch: a process that takes `arrays` is 190 MB smaller.

Rejected: DataLoader workers (they double the CPU time of a loader that is this cheap, and its state
would depend on their number).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, get_args

import numpy as np

from clue_ds.data.corpus import Corpus, continues_bit
from clue_ds.data.counter_rng import derive
from clue_ds.data.jit import compiled
from clue_ds.data.sampling import Kind, Order, num_predictions
from clue_ds.data.stream.labelled_pairs import LabelledPairs, PairSamples
from clue_ds.data.stream.masking import MaskTable, mask_rows, ngram_draws
from clue_ds.data.stream.mixture import Mixture, corpora_of, shares_of
from clue_ds.data.stream.order import BLOCK_BYTES, CYCLE, order_table, places, samples_taken
from clue_ds.data.stream.samples import Samples
from clue_ds.data.text.special_tokens import is_special
from clue_ds.data.text.vocab import read_vocab
from clue_ds.data.verification import Checks
from clue_ds.errors import UserError, check_least
from clue_ds.vocab_file import SPECIAL_TOKENS

if TYPE_CHECKING:
    import torch

MAX_NGRAM = 8
_ORDER, _MASKS, _PAIRS = np.uint64(0), np.uint64(1), np.uint64(2)  # counters under the seed
ORDERS: tuple[str, ...] = get_args(Order)
LANES_FROM_BYTES = 8 << 30  # a machine with 16 GiB keeps less in its page cache


@compiled
def stream_keys(seed: np.uint64) -> tuple[np.uint64, np.uint64, np.uint64]:
    """The keys of the sample order, of the masks, and of sentence pairs."""
    key = np.uint64(seed)
    return derive(key, _ORDER), derive(key, _MASKS), derive(key, _PAIRS)


def _uses_lanes(corpus: Corpus | Mixture | LabelledPairs, order: str) -> bool:
    if order not in ORDERS:
        raise UserError(f"order {order!r} is none of {', '.join(ORDERS)}")
    if isinstance(corpus, LabelledPairs):
        return False  # they are in memory
    # Only the corpus decides: by the machine's memory, another machine would get another stream.
    num_bytes = sum(one.num_bytes for one in corpora_of(corpus))
    return order == "lanes" or (order == "auto" and num_bytes > LANES_FROM_BYTES)


class SampleStream:
    """Batches of masked sequences from a corpus, for any step, rank and world size.

    Raises a UserError for sizes that make no sense. An epoch has `num_samples` samples in
    `steps_per_epoch` batches (rounded up: a batch may have samples of two epochs); a row has
    `num_predictions` = P slots for masked positions.
    """

    def __init__(
        self,
        corpus: Corpus | Mixture | LabelledPairs,
        seq_length: int,
        global_batch_size: int,
        seed: int,
        whole_word: bool = True,
        mask_prob: float = 0.15,
        predictions_per_sequence: int | None = None,
        max_ngram: int = 1,
        samples: Kind = "windows",
        order: str = "auto",
    ) -> None:
        if not 3 <= seq_length < 1 << 16:
            raise UserError(f"seq_length {seq_length} must be between 3 and 65,535")
        check_least("global_batch_size", global_batch_size, 1)
        if not 0 < mask_prob < 1:
            raise UserError(f"mask_prob {mask_prob} must be between 0 and 1")
        if not 1 <= max_ngram <= MAX_NGRAM:
            raise UserError(f"max_ngram {max_ngram} must be between 1 and {MAX_NGRAM}")
        if predictions_per_sequence is not None and predictions_per_sequence < 1:
            raise UserError(f"predictions_per_sequence {predictions_per_sequence} must be positive")
        if samples not in get_args(Kind):
            kinds = ", ".join(get_args(Kind))
            raise UserError(f"samples {samples!r} is no kind of samples; give one of {kinds}")
        self.corpus = corpus
        self.seq_length = seq_length
        self.global_batch_size = global_batch_size
        self.num_predictions = predictions_per_sequence or num_predictions(seq_length, mask_prob)
        self._masks = self._mask_table(whole_word, mask_prob, max_ngram)
        self._samples: Samples | PairSamples
        if isinstance(corpus, LabelledPairs):
            self._samples = corpus.samples(seq_length)
        else:
            specials = self._masks.cls_id, self._masks.sep_id
            self._samples = Samples(corpus, samples, seq_length, *specials)
        self.num_samples = self._samples.num_samples
        self.steps_per_epoch = -(-self.num_samples // global_batch_size)
        # Compiled code returns Python integers, and takes one below 2^63 for a signed number.
        keys = map(np.uint64, stream_keys(np.uint64(seed % (1 << 64))))
        order_key, self._mask_key, self._pair_key = keys
        self.samples_per_corpus = self._samples.samples_per_corpus
        self.uses_lanes = _uses_lanes(corpus, order)
        shares = np.array([CYCLE]) if isinstance(corpus, LabelledPairs) else shares_of(corpus)
        self.order = order_table(
            num_samples=self.samples_per_corpus,
            shares=shares,
            global_batch_size=global_batch_size,
            uses_lanes=self.uses_lanes,
            block=max(1, BLOCK_BYTES // ((seq_length - 2) * corpus.token_dtype.itemsize)),
            order_key=order_key,
        )
        self._zeros = np.zeros((0, seq_length), dtype=np.int64)

    def _mask_table(self, whole_word: bool, mask_prob: float, max_ngram: int) -> MaskTable:
        vocab = read_vocab(self.corpus.vocab_file)
        pad, unk, cls, sep, mask = (vocab.index(token) for token in SPECIAL_TOKENS)
        ordinary = [token_id for token_id, token in enumerate(vocab) if not is_special(token)]
        if not ordinary:
            raise UserError(f"{self.corpus.vocab_file} holds special tokens only")
        goals = [
            min(self.num_predictions, num_predictions(length, mask_prob), max(0, length - 2))
            for length in range(self.seq_length + 1)
        ]
        wide = self.corpus.token_dtype.itemsize == 4
        return MaskTable(
            continues=continues_bit(np.uint32 if wide else np.uint16),
            whole_word=whole_word,
            ngram_draws=ngram_draws(max_ngram),
            goals=np.array(goals, dtype=np.int64),
            ordinary_ids=np.array(ordinary, dtype=np.int64),
            pad_id=pad,
            unk_id=unk,
            cls_id=cls,
            sep_id=sep,
            mask_id=mask,
        )

    def batch_size(self, world_size: int) -> int:
        """Rows per rank; a UserError unless the ranks divide the global batch evenly."""
        if self.global_batch_size % world_size:
            raise UserError(
                f"global_batch_size {self.global_batch_size} is not divisible by {world_size} ranks"
            )
        return self.global_batch_size // world_size

    def samples_by_part(self, step: int) -> list[int]:
        """The exact number of samples of each corpus of a mixture in the batches before `step`."""
        return samples_taken(step, self.order).tolist()

    def token_runs(self, first_sample: int, end_sample: int) -> Iterator[tuple[int, int, int]]:
        """The tokens of samples first_sample .. end_sample - 1: see Samples.token_runs."""
        assert isinstance(self._samples, Samples), "labelled pairs are in memory"
        return self._samples.token_runs(first_sample, end_sample)

    @property
    def checks(self) -> Checks:
        """What of the corpus this process has compared with its checksums."""
        assert isinstance(self._samples, Samples), "labelled pairs are in memory"
        return self._samples.checks

    def _zero_types(self, size: int) -> np.ndarray:
        """Zeros [size, S] shared by all batches: at length 512 new ones cost as much as masks."""
        if len(self._zeros) < size:
            self._zeros = np.zeros((size, self.seq_length), dtype=np.int64)
        return self._zeros[:size]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> dict[str, torch.Tensor]:
        """Rank `rank`'s rows of the global batch of `step`, int64.

        With B = global_batch_size // world_size: input_ids [B, S]; lengths [B]; masked_positions,
        masked_labels [B, P], where unused slots have position 0 and label -100. nsp, sop and
        labelled pairs add token_type_ids [B, S] (for other kinds every type is 0) and
        next_sentence_label [B]. In nsp and sop that is 0 when text B follows text A, 1 when it is
        of another document (nsp) or comes before A (sop), -100 when there is no B. packed adds
        cu_seqlens [B, D + 1]: where the row's sequences begin, and the row's length in all further
        entries.
        """
        from torch import from_numpy

        arrays = self.arrays(step, rank, world_size)
        if "next_sentence_label" not in arrays:
            del arrays["token_type_ids"]
        return {name: from_numpy(array) for name, array in arrays.items()}

    def arrays(self, step: int, rank: int = 0, world_size: int = 1) -> dict[str, np.ndarray]:
        """The arrays whose memory the tensors of `batch` share; imports no torch.

        They always have token_type_ids. For kinds without pairs these are zeros, whose memory all
        batches share: don't write.
        """
        size = self.batch_size(world_size)
        assert 0 <= rank < world_size and step >= 0
        shape, slots = (size, self.seq_length), (size, self.num_predictions)
        epochs, samples = np.empty((2, size), dtype=np.uint64)
        places(step, rank * size, self.order, epochs, samples)
        rows = self._samples.rows(samples, epochs, self._pair_key)
        arrays = {
            "input_ids": np.empty(shape, dtype=np.int64),
            "token_type_ids": self._zero_types(size),
            "lengths": rows.lengths,
            "masked_positions": np.empty(slots, dtype=np.int64),
            "masked_labels": np.empty(slots, dtype=np.int64),
            **rows.extras,
        }
        mask_rows(
            rows.tokens,
            rows.lengths,
            epochs,
            samples,
            self._mask_key,
            self._masks,
            arrays["input_ids"],
            arrays["masked_positions"],
            arrays["masked_labels"],
        )
        return arrays
