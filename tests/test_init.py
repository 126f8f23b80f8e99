"""Initial weights have BERT's distribution and depend only on the seed and the shapes."""

from __future__ import annotations

import math

import torch

from clue_ds import presets
from clue_ds.model import BertForPreTraining
from clue_ds.model.init import initialize
from clue_ds.model.weights import trim_vocab

CONFIG = presets.get("roberta_tiny_clue").replace(num_hidden_layers=1)


def weights(seed: int, **changes: int) -> dict[str, torch.Tensor]:
    model = BertForPreTraining(CONFIG, **changes)
    initialize(model, seed)
    return model.state_dict()


def test_weights_depend_on_the_seed_and_on_nothing_drawn_before() -> None:
    first = weights(1)
    torch.randn(100)
    again = weights(1)
    other = weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(first[name], other[name])


def test_building_and_initialising_leave_torchs_generator_alone() -> None:
    state = torch.get_rng_state()
    weights(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_have_berts_distribution() -> None:
    for name, tensor in weights(3).items():
        if name.endswith("LayerNorm.weight"):
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        elif name.endswith("bias"):
            assert torch.count_nonzero(tensor) == 0, name
        else:
            values = tensor[1:] if "word_embeddings" in name or "decoder" in name else tensor
            sigma = CONFIG.initializer_range
            assert abs(values.mean()) < 5 * sigma / math.sqrt(values.numel()), name
            assert abs(values.std() - sigma) < 5 * sigma / math.sqrt(2 * values.numel()), name
            assert values.unique().numel() > 0.9 * values.numel(), name
    words = weights(3)["bert.embeddings.word_embeddings.weight"]
    assert torch.count_nonzero(words[CONFIG.pad_token_id]) == 0


def test_vocabulary_padding_changes_no_real_row() -> None:
    real, padded = weights(4), weights(4, padded_vocab_size=8_064)
    assert torch.count_nonzero(padded["cls.predictions.decoder.weight"][8_021:]) == 0
    trimmed = trim_vocab(padded, 8_021)
    assert all(torch.equal(real[name], trimmed[name]) for name in real)
