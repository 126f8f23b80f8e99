"""`FlatStream`: the batches of a sample stream, laid end to end without their padding.

A micro-batch is one buffer of T tokens in which N sequences follow each other; attention is the
only operation that needs to know where they begin. The rows, their masks and their split into
micro-batches are those of `SampleStream`, and so is the divisor of the loss, so an update is that
of the padded rows up to the order of its sums.

By default T is the exact number of tokens. A GPU's allocator, and code that is made for a shape, as
oneDNN's for bf16 is on a CPU, need few different shapes: with `is_static` T is rounded up to a
multiple of 1/16 of the padded micro-batch, and the numbers of sequences and queries follow from T
and the micro-batch size (of packed rows the number of sequences is a multiple of it). A full
micro-batch always fits, so memory is bounded by that of padded rows and there is no overflow. Every
slot lies in a sequence: padding behind the last one forms sequences of its own, whose results
nobody uses.

Rejected: one capacity that most micro-batches fit into, with a second pass for the rest (DeepSpeed
wants the same number of micro-batches on every rank); moving rows between ranks or micro-batches to
fill a capacity (the loss of a micro-batch would no longer be that of its padded rows).

B: rows of a rank   D: sequences in a packed row   P: slots for predictions in a row   S: positions
G: micro-batches    T, N, R: tokens, sequences and queries of a micro-batch
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from clue_ds.data.jit import compiled
from clue_ds.data.sampling import IGNORED_LABEL
from clue_ds.data.stream.sample_stream import SampleStream

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SHAPES = 16  # the most numbers of tokens that a static micro-batch can have
ON_HOST = ("lengths", "sizes", "bounds")  # what no computation on a device reads
_BY_TOKEN = ("input_ids", "position_ids", "token_type_ids")
_BY_SEQUENCE = ("cu_seqlens", "cu_predictions")
_BY_QUERY = ("masked_positions", "masked_labels")


class FlatStream(SampleStream):
    """A SampleStream whose `batch` has no padding. `micro_batch_size`: rows of a micro-batch."""

    def __init__(
        self, *arguments: Any, micro_batch_size: int, is_static: bool, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.micro_batch_size = micro_batch_size
        self.is_static = is_static
        # A row of L tokens has at most 1 + L * density predictions.
        lengths = np.arange(1, self.seq_length + 1)
        self._density = float(((self._masks.goals[1:] - 1) / lengths).max())

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> dict[str, torch.Tensor]:
        """Rank `rank`'s rows of the global batch of `step`, its G micro-batches end to end.

        int32: input_ids and position_ids [sum of T], for pairs token_type_ids too; cu_seqlens and
        cu_predictions [sum of N + 1], where the tokens and the queries of each sequence begin in
        its micro-batch; masked_positions [sum of R], the tokens of a micro-batch that the last
        block is computed for. int64: masked_labels [sum of R], -100 where nothing is predicted;
        lengths of the real sequences; for pairs next_sentence_label [B], and then the first query
        of each row is its [CLS]. Two more stay on the host: sizes [G, 3], which are T, N and R;
        bounds [3], which are the longest sequence, the most queries of one sequence, and the
        divisor of a micro-batch's loss.
        """
        from torch import from_numpy

        arrays = self._flatten(self.arrays(step, rank, world_size))
        return {name: from_numpy(array) for name, array in arrays.items()}

    def _flatten(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        has_pairs = "next_sentence_label" in rows
        begins = rows.get("cu_seqlens")
        if begins is None:
            begins = np.stack([np.zeros_like(rows["lengths"]), rows["lengths"]], 1)
        sizes, num_spare = self._sizes(begins, rows["masked_labels"], has_pairs)
        num_tokens, num_sequences, num_queries = sizes.sum(0).tolist()
        num_offsets = num_sequences + len(sizes)
        flat = {
            "input_ids": np.empty(num_tokens, np.int32),
            "position_ids": np.empty(num_tokens, np.int32),
            "cu_seqlens": np.empty(num_offsets, np.int32),
            "cu_predictions": np.empty(num_offsets, np.int32),
            "masked_positions": np.empty(num_queries, np.int32),
            "masked_labels": np.empty(num_queries, np.int64),
        }
        types = np.empty(num_tokens if has_pairs else 0, np.int32)
        lay_end_to_end(
            rows["input_ids"],
            rows["token_type_ids"],
            begins,
            rows["masked_positions"],
            rows["masked_labels"],
            has_pairs,
            sizes,
            num_spare,
            self._masks.pad_id,
            *[*flat.values(), types],
        )
        if has_pairs:
            flat |= {"token_type_ids": types, "next_sentence_label": rows["next_sentence_label"]}
        lengths = np.diff(begins).ravel()
        most = self.num_predictions + has_pairs
        slots = self.micro_batch_size * self.num_predictions
        bounds = np.array([self.seq_length, most, slots], np.int64)
        return {**flat, "lengths": lengths[lengths > 0], "sizes": sizes, "bounds": bounds}

    def _sizes(
        self, begins: np.ndarray, labels: np.ndarray, has_pairs: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """sizes int64 [G, 3], and of the queries those that predict nothing, int64 [G]."""
        size = self.micro_batch_size
        in_rows = [begins[:, -1], (np.diff(begins) > 0).sum(1), (labels != IGNORED_LABEL).sum(1)]
        # [G, 3]
        used = np.stack([each.reshape(-1, size).sum(1) for each in in_rows], 1)
        first = size if has_pairs else 0
        if not self.is_static:
            sizes = used.copy()
            # Without any query, there would be operations on nothing.
            sizes[:, 2] = np.maximum(used[:, 2] + first, 1)
            return sizes, sizes[:, 2] - first - used[:, 2]
        full = size * self.seq_length
        unit = -(-full // SHAPES)
        sizes = np.empty_like(used)
        sizes[:, 0] = np.minimum(-(-used[:, 0] // unit) * unit, full)
        # Padding is shorter than `unit`, and each of its sequences but one takes S tokens.
        sizes[:, 1] = -(-used[:, 1] // size) * size + -(-unit // self.seq_length)
        most = np.ceil(sizes[:, 0] * self._density).astype(np.int64) + size
        sizes[:, 2] = np.minimum(most, size * self.num_predictions) + first
        return sizes, sizes[:, 2] - first - used[:, 2]


def split(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The micro-batches of a batch of FlatStream, wherever its tensors are: views of them."""
    sizes = batch["sizes"]
    cut = {name: batch[name].split(sizes[:, 0].tolist()) for name in _BY_TOKEN if name in batch}
    cut |= {name: batch[name].split((sizes[:, 1] + 1).tolist()) for name in _BY_SEQUENCE}
    cut |= {name: batch[name].split(sizes[:, 2].tolist()) for name in _BY_QUERY}
    if "next_sentence_label" in batch:
        cut["next_sentence_label"] = batch["next_sentence_label"].chunk(len(sizes))
    return [
        {**{name: parts[i] for name, parts in cut.items()}, "bounds": batch["bounds"]}
        for i in range(len(sizes))
    ]


def is_flat(batch: dict[str, Tensor]) -> bool:
    """Whether a batch is one of FlatStream."""
    return "bounds" in batch


@compiled
def lay_end_to_end(
    input_ids: np.ndarray,
    token_type_ids: np.ndarray,
    begins: np.ndarray,
    masked_positions: np.ndarray,
    masked_labels: np.ndarray,
    has_pairs: bool,
    sizes: np.ndarray,
    num_spare: np.ndarray,
    pad_id: int,
    flat_ids: np.ndarray,
    flat_positions: np.ndarray,
    cu_seqlens: np.ndarray,
    cu_predictions: np.ndarray,
    queries: np.ndarray,
    labels: np.ndarray,
    flat_types: np.ndarray,
) -> None:
    """Fill the flat arrays (see FlatStream.batch) from padded rows.

    input_ids, token_type_ids int64 [B, S]; begins int64 [B, D + 1]: where sequences of a row begin,
    and its length in all further entries; masked_positions, masked_labels int64 [B, P], unused
    slots last; num_spare int64 [G]: queries that the sizes have beyond those that are used.
    """
    num_rows, width = input_ids.shape[0] // len(sizes), input_ids.shape[1]
    num_slots = masked_labels.shape[1]
    tokens_before, offsets_before, queries_before = 0, 0, 0
    for g in range(len(sizes)):
        token, sequence, query, spare = 0, 0, 0, num_spare[g]
        for b in range(g * num_rows, (g + 1) * num_rows):
            num_used = 0
            while num_used < num_slots and masked_labels[b, num_used] != IGNORED_LABEL:
                num_used += 1
            # Slots that predict nothing ask for the row's first token, as in padded rows. No
            # sequence gets more queries than its row has slots.
            filled = min(spare, num_slots - num_used)
            spare -= filled
            leading = filled + (1 if has_pairs else 0)
            slot = 0
            for i in range(begins.shape[1] - 1):
                begin, end = begins[b, i], begins[b, i + 1]
                if begin == end:
                    break
                cu_seqlens[offsets_before + sequence] = token
                cu_predictions[offsets_before + sequence] = query
                sequence += 1
                while leading > 0:
                    queries[queries_before + query] = token
                    labels[queries_before + query] = IGNORED_LABEL
                    query += 1
                    leading -= 1
                while slot < num_used and masked_positions[b, slot] < end:
                    queries[queries_before + query] = token + masked_positions[b, slot] - begin
                    labels[queries_before + query] = masked_labels[b, slot]
                    query += 1
                    slot += 1
                for k in range(end - begin):
                    flat_ids[tokens_before + token + k] = input_ids[b, begin + k]
                    flat_positions[tokens_before + token + k] = k
                if has_pairs:
                    for k in range(end - begin):
                        flat_types[tokens_before + token + k] = token_type_ids[b, begin + k]
                token += end - begin
        while token < sizes[g, 0]:
            size = min(width, sizes[g, 0] - token)
            cu_seqlens[offsets_before + sequence] = token
            cu_predictions[offsets_before + sequence] = query
            sequence += 1
            for k in range(tokens_before + token, tokens_before + token + size):
                flat_ids[k] = pad_id
                flat_positions[k] = k - tokens_before - token
                if has_pairs:
                    flat_types[k] = 0
            token += size
        offsets_after = offsets_before + sizes[g, 1] + 1
        cu_seqlens[offsets_before + sequence : offsets_after] = token
        cu_predictions[offsets_before + sequence : offsets_after] = query
        tokens_before += token
        offsets_before = offsets_after
        queries_before += query
