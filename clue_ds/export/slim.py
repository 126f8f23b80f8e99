"""Smaller and other models: rows of words that can't occur, heads, another vocabulary.

Every function takes and gives a `Source`'s parts and changes nothing in place. `Sizes` says what it
came to. Rejected: dropping rows of words that a corpus doesn't hold (another corpus does).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clue_ds.errors import UserError
from clue_ds.export.publish import read_tokens, vocab_lines
from clue_ds.export.sources import Source
from clue_ds.model.weights import (
    DECODER_WEIGHT,
    PREDICTION_BIAS,
    TIED,
    VOCAB_ROWS,
    WORD_EMBEDDINGS,
    StateDict,
    is_tied,
    tie,
    trim_vocab,
)

NEW_TOKEN_SEED = 0


class Sizes(NamedTuple):
    """What a model takes; bytes are those of its tensors in a file."""

    words: int
    parameters: int
    num_bytes: int


def sizes(source: Source, half: bool = False) -> Sizes:
    """Counts of a model as it is written: tied entries once, 4 bytes a parameter or 2."""
    state = source.state_dict
    written = [t for name, t in state.items() if name not in TIED or not is_tied(state, name)]
    count = sum(tensor.numel() for tensor in written)
    return Sizes(source.config.vocab_size, count, count * (2 if half else 4))


def table(before: Sizes, after: Sizes) -> str:
    """Both as a table, with what is left in per cent."""
    lines = [f"{'':<12}{'before':>16}{'after':>16}{'left':>9}"]
    for name, old, new in zip(("words", "parameters", "bytes"), before, after, strict=True):
        lines.append(f"{name:<12}{old:>16,}{new:>16,}{new / old:>9.1%}")
    return "\n".join(lines)


def drop_unused_rows(source: Source) -> Source:
    """Without the rows beyond vocab.txt, whose ids no tokenizer ever gives."""
    num_tokens = len(vocab_lines(source.vocab_file))
    if num_tokens > source.config.vocab_size:
        raise UserError(
            f"vocabulary {source.vocab_file} has {num_tokens:,} lines but the model has "
            f"{source.config.vocab_size:,} words; give the vocab.txt that it was trained with"
        )
    return source._replace(
        config=source.config.replace(vocab_size=num_tokens),
        state_dict=trim_vocab(source.state_dict, num_tokens),
    )


def drop_heads(source: Source) -> Source:
    """Without the MLM and NSP heads: encoder and pooler, for fine-tuning and embedding only."""
    kept = {n: t for n, t in source.state_dict.items() if not n.startswith("cls.")}
    return source._replace(state_dict=kept)


def change_vocab(source: Source, vocab_file: str | Path) -> tuple[Source, list[str]]:
    """The model with the words of another vocabulary, and the list of those that it didn't know.

    A token's row moves to its new id. A new token gets the mean of the rows of the pieces that it
    falls into (longest match first), or N(0, initializer_range) when it falls into none; its MLM
    bias is the mean of all.
    """
    old = vocab_lines(source.vocab_file)
    old = read_tokens(source.vocab_file, len(old))[: source.config.vocab_size]
    new = read_tokens(vocab_file, len(vocab_lines(vocab_file)))
    twice = [token for token, count in Counter(new).items() if count > 1]
    if twice:
        raise UserError(f"vocabulary {vocab_file} holds {', '.join(twice[:5])} more than once")
    ids = {token: i for i, token in enumerate(old)}
    unknown = [token for token in new if token not in ids]
    state: StateDict = dict(source.state_dict)
    for name in (WORD_EMBEDDINGS, DECODER_WEIGHT):
        if name in state and (name == WORD_EMBEDDINGS or not is_tied(source.state_dict, name)):
            state[name] = _move(source.state_dict[name], ids, new, source.config.initializer_range)
    if PREDICTION_BIAS in state:
        bias = state[PREDICTION_BIAS]
        rows = [bias[ids[token]] if token in ids else bias.mean() for token in new]
        state[PREDICTION_BIAS] = torch.stack(rows)
    for name in VOCAB_ROWS:
        if name in TIED and is_tied(source.state_dict, name):
            state.pop(name, None)
    config = source.config.replace(vocab_size=len(new), pad_token_id=new.index("[PAD]"))
    if not is_tied(source.state_dict, DECODER_WEIGHT):
        state["cls.predictions.decoder.bias"] = state[PREDICTION_BIAS]
    state = tie(state, vocab_file)
    moved = source._replace(config=config, state_dict=state, vocab_file=Path(vocab_file))
    return moved, unknown


def _move(table: Tensor, ids: dict[str, int], new: list[str], std: float) -> Tensor:
    """Rows [V, H] of the old tokens -> [V', H] of the new."""
    generator = torch.Generator().manual_seed(NEW_TOKEN_SEED)
    moved = table.new_empty(len(new), table.shape[1])
    for row, token in enumerate(new):
        pieces = [ids[token]] if token in ids else _pieces(token, ids)
        if pieces:
            moved[row] = table[pieces].mean(0)
        else:
            moved[row] = torch.randn(table.shape[1], generator=generator) * std
    return moved


def _pieces(token: str, ids: dict[str, int]) -> list[int]:
    """Ids of the longest known pieces that make up `token`; none when one is missing."""
    prefix = "##" if token.startswith("##") else ""
    rest, found = token.removeprefix("##"), []
    while rest:
        for end in range(len(rest), 0, -1):
            if prefix + rest[:end] in ids:
                found.append(ids[prefix + rest[:end]])
                rest, prefix = rest[end:], "##"
                break
        else:
            return []
    return found
