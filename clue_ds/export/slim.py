"""Smaller models and other vocabularies: drop unused rows or heads, or switch to another vocab.txt.

Every function takes an `OpenedModel` and returns another one; nothing changes in place. `Sizes` are
the counts before and after. Rejected: dropping the rows of words that a corpus doesn't contain,
because another corpus does.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clue_ds.errors import UserError
from clue_ds.export.publish import read_tokens
from clue_ds.export.sources import OpenedModel
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
from clue_ds.vocab_file import vocab_lines

NEW_TOKEN_SEED = 0


class Sizes(NamedTuple):
    """The size of a model; bytes are those of its tensors in a file."""

    words: int
    parameters: int
    num_bytes: int


def sizes(model: OpenedModel, half: bool = False) -> Sizes:
    """The size of a model as it is written: tied entries once, 4 bytes per parameter or 2."""
    state = model.state_dict
    written = [t for name, t in state.items() if name not in TIED or not is_tied(state, name)]
    count = sum(tensor.numel() for tensor in written)
    return Sizes(model.config.vocab_size, count, count * (2 if half else 4))


def table(before: Sizes, after: Sizes) -> str:
    """Both as a table, with the share that is left."""
    lines = [f"{'':<12}{'before':>16}{'after':>16}{'left':>9}"]
    for name, old, new in zip(("words", "parameters", "bytes"), before, after, strict=True):
        lines.append(f"{name:<12}{old:>16,}{new:>16,}{new / old:>9.1%}")
    return "\n".join(lines)


def drop_unused_rows(model: OpenedModel) -> OpenedModel:
    """The model without the embedding rows beyond vocab.txt, whose ids no tokenizer produces."""
    num_tokens = len(vocab_lines(model.vocab_file))
    if num_tokens > model.config.vocab_size:
        raise UserError(
            f"vocabulary {model.vocab_file} has {num_tokens:,} tokens but the model has "
            f"{model.config.vocab_size:,} words; give the vocabulary that it was trained with"
        )
    return model._replace(
        config=model.config.replace(vocab_size=num_tokens),
        state_dict=trim_vocab(model.state_dict, num_tokens),
    )


def drop_heads(model: OpenedModel) -> OpenedModel:
    """The model without the MLM and NSP heads, for fine-tuning and embedding only."""
    kept = {n: t for n, t in model.state_dict.items() if not n.startswith("cls.")}
    return model._replace(state_dict=kept)


def change_vocab(model: OpenedModel, vocab_file: str | Path) -> tuple[OpenedModel, list[str]]:
    """The model with another vocabulary, and the list of tokens that are new to it.

    A known token's row moves to its new id. A new token gets the mean of the rows of the subwords
    that WordPiece splits it into (longest match first), or draws from N(0, initializer_range) if it
    can't be split into known ones; its MLM bias is the mean of all biases.
    """
    old = vocab_lines(model.vocab_file)
    old = read_tokens(model.vocab_file, len(old))[: model.config.vocab_size]
    new = read_tokens(vocab_file, len(vocab_lines(vocab_file)))
    twice = [token for token, count in Counter(new).items() if count > 1 and token]
    if twice:
        raise UserError(f"vocabulary {vocab_file} holds {', '.join(twice[:5])} more than once")
    ids = {token: i for i, token in enumerate(old)}
    unknown = [token for token in new if token not in ids]
    state: StateDict = dict(model.state_dict)
    for name in (WORD_EMBEDDINGS, DECODER_WEIGHT):
        if name in state and (name == WORD_EMBEDDINGS or not is_tied(model.state_dict, name)):
            state[name] = _move(model.state_dict[name], ids, new, model.config.initializer_range)
    if PREDICTION_BIAS in state:
        bias = state[PREDICTION_BIAS]
        rows = [bias[ids[token]] if token in ids else bias.mean() for token in new]
        state[PREDICTION_BIAS] = torch.stack(rows)
    for name in VOCAB_ROWS:
        if name in TIED and is_tied(model.state_dict, name):
            state.pop(name, None)
    config = model.config.replace(vocab_size=len(new), pad_token_id=new.index("[PAD]"))
    if not is_tied(model.state_dict, DECODER_WEIGHT):
        state["cls.predictions.decoder.bias"] = state[PREDICTION_BIAS]
    state = tie(state, vocab_file)
    moved = model._replace(config=config, state_dict=state, vocab_file=Path(vocab_file))
    return moved, unknown


def _move(table: Tensor, ids: dict[str, int], new: list[str], std: float) -> Tensor:
    """Rows [V, H] of the old tokens -> [V', H] of the new."""
    generator = torch.Generator().manual_seed(NEW_TOKEN_SEED)
    moved = table.new_empty(len(new), table.shape[1])
    for row, token in enumerate(new):
        subwords = [ids[token]] if token in ids else _subwords(token, ids)
        if subwords:
            moved[row] = table[subwords].mean(0)
        else:
            moved[row] = torch.randn(table.shape[1], generator=generator) * std
    return moved


def _subwords(token: str, ids: dict[str, int]) -> list[int]:
    """Ids of the longest known subwords that make up `token`; none when one of them is unknown."""
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
