"""Writing and reading back keeps every bit, in every layout, for 200 unusual networks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from models import (
    DECODER,
    DECODER_BIAS,
    MLM,
    NSP,
    POOLER,
    random_config,
    random_model,
    same_bits,
    without,
    write_vocab,
)

from clue_ds import export
from clue_ds.export.tf_files import bundle
from clue_ds.model import BertForPreTraining
from clue_ds.model.weights import StateDict, load_into
from clue_ds.presets import ModelConfig

NUM_CONFIGS, GROUPS = 200, 8


def random_state(config: ModelConfig, seed: int, draw: random.Random) -> StateDict:
    """Some have no pooler, no NSP head, no heads at all, or an untied decoder."""
    state = dict(random_model(config, seed).state_dict())
    if draw.random() < 0.3:
        state = without(state, POOLER)
    if draw.random() < 0.3:
        state = without(state, NSP)
    if draw.random() < 0.2:
        state = without(state, MLM)
    elif draw.random() < 0.3:
        state[DECODER] = torch.randn(state[DECODER].shape)
        state[DECODER_BIAS] = state["cls.predictions.bias"]
    # Bits that arithmetic would change. (NaN is refused: test_weight_files.py.)
    words = state["bert.embeddings.word_embeddings.weight"]
    words[0, 0], words[1, 0] = -0.0, 1e-45
    return state


@pytest.mark.parametrize("group", range(GROUPS))
def test_there_and_back_is_the_same_bits(group: int, tmp_path: Path) -> None:
    for seed in range(group, NUM_CONFIGS, GROUPS):
        draw = random.Random(seed)
        config = random_config(draw)
        state = random_state(config, seed, draw)
        vocab_file = write_vocab(tmp_path / "vocab.txt", config.vocab_size)
        for to in ("tf", "hf"):
            directory = export.save(config, state, vocab_file, tmp_path / f"{to}{seed}", to=to)
            source = export.open_model(directory)
            assert source.config == config, seed
            assert not source.notes
            found = source.state_dict
            assert sorted(found) == sorted(state), seed
            assert all(same_bits(found[name], state[name]) for name in state), (seed, to)


# Two CPU runs of the same fp32 arithmetic; the weights are equal, so is what comes out.
@pytest.mark.parametrize("seed", range(20))
def test_logits_after_both_trips_are_the_same(seed: int, tmp_path: Path) -> None:
    config = random_config(random.Random(seed)).replace(layer_norm_eps=1e-12)
    model = random_model(config, seed)
    vocab_file = write_vocab(tmp_path / "vocab.txt", config.vocab_size)
    first = export.save(config, model.state_dict(), vocab_file, tmp_path / "tf", to="tf")
    second = export.save(*export.load(first), vocab_file, tmp_path / "hf", to="hf")
    again = BertForPreTraining(config).eval()
    assert load_into(again, *export.load(second), second) == []
    ids = torch.randint(config.vocab_size, (2, 8))
    with torch.no_grad():
        ours, theirs = model(ids), again(ids)
    for name in ("prediction_logits", "seq_relationship_logits"):
        torch.testing.assert_close(getattr(theirs, name), getattr(ours, name), atol=1e-5, rtol=0)


def test_google_checkpoint_survives_both_trips(shared_data: Path, tmp_path: Path) -> None:
    """A real TF1 checkpoint: optimizer slots are dropped, everything else is kept bit for bit."""
    fixture = shared_data / "fixtures" / "tf_bert_ckpt"
    source = export.open_model(fixture)
    assert source.config.hidden_act == "gelu_new", "TensorFlow's gelu is the tanh form"
    assert not source.notes
    original = bundle.Reader(fixture / "bert_model.ckpt")
    there = export.save(*source[:3], tmp_path / "hf", to="hf")
    back = export.save(*export.load(there), source.vocab_file, tmp_path / "tf", to="tf")
    found = bundle.Reader(back / "bert_model.ckpt")
    slots = ("/adam_m", "/adam_v", "global_step")
    assert set(found.entries) == {n for n in original.entries if not n.endswith(slots)}
    assert len(found.entries) == 46
    for name, entry in found.entries.items():
        assert entry.shape == original.entries[name].shape
        assert found.read(name).tobytes() == original.read(name).tobytes(), name
