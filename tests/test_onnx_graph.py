"""onnxruntime computes from model.onnx what PyTorch computes, for every batch size and length."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from models import MLM, NSP, POOLER, random_model, without, write_vocab

from clue_ds import export
from clue_ds.errors import UserError
from clue_ds.model.weights import StateDict
from clue_ds.presets import ModelConfig

CONFIG = ModelConfig(
    vocab_size=60,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=32,
    hidden_act="gelu_new",
)
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def session_of(state: StateDict, tmp_path: Path) -> onnxruntime.InferenceSession:
    vocab_file = write_vocab(tmp_path / "vocab.txt", CONFIG.vocab_size)
    directory = export.save(CONFIG, state, vocab_file, tmp_path / "onnx", to="onnx")
    path = str(directory / "model.onnx")
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_onnxruntime_agrees_with_pytorch_at_every_size(tmp_path: Path) -> None:
    model = random_model(CONFIG, 0)
    session = session_of(dict(model.state_dict()), tmp_path)
    for batch, length in ((1, 1), (1, 32), (5, 3), (2, 7)):
        ids = torch.randint(CONFIG.vocab_size, (batch, length))
        types = torch.randint(2, (batch, length))
        lengths = torch.randint(1, length + 1, (batch,))
        mask = (torch.arange(length) < lengths[:, None]).long()
        feed = dict(zip(INPUTS, (t.numpy() for t in (ids, mask, types)), strict=True))
        found = dict(
            zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True)
        )
        with torch.no_grad():
            expected = model(ids, types, attention_mask=mask)
            hidden = model.bert(ids, types, attention_mask=mask)
        real = mask.bool().numpy()  # what stands in padding means nothing
        for name, value in (
            ("last_hidden_state", hidden),
            ("logits", expected.prediction_logits),
        ):
            # fp32 in another order of operations, logits up to 20.
            np.testing.assert_allclose(found[name][real], value.numpy()[real], atol=2e-5, rtol=0)
        np.testing.assert_allclose(
            found["seq_relationship_logits"], expected.seq_relationship_logits.numpy(), atol=2e-5
        )


def test_outputs_are_those_whose_weights_are_there(tmp_path: Path) -> None:
    state = without(dict(random_model(CONFIG, 0).state_dict()), MLM, NSP, POOLER)
    session = session_of(state, tmp_path)
    assert [output.name for output in session.get_outputs()] == ["last_hidden_state"]
    assert [i.name for i in session.get_inputs()] == list(INPUTS)


def test_missing_extra_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    with pytest.raises(UserError, match=r"needs onnxscript: pip install 'clue_ds\[onnx\]'"):
        session_of(dict(random_model(CONFIG, 0).state_dict()), tmp_path)
