"""Weight decay, frozen parameters, refused settings; test_engine.py tests the arithmetic."""

from __future__ import annotations

import pytest
import torch
from ranks import TINY_MODEL, tiny_config

from clue_ds.errors import UserError
from clue_ds.model.bert import BertForPreTraining
from clue_ds.presets import ModelConfig
from clue_ds.pretrain import optim

SHAPE = {key: value for key, value in TINY_MODEL.items() if key != "preset"}


@pytest.fixture
def model() -> BertForPreTraining:
    return BertForPreTraining(ModelConfig(vocab_size=50, **SHAPE))


def test_weight_decay_spares_layer_norms_and_biases(model: BertForPreTraining) -> None:
    optim.freeze_unused(model)
    optimizer = optim.build(tiny_config("c", "r").train, model, stage=1, fused=False)
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        if name.startswith(("bert.pooler", "cls.seq_relationship")):
            assert id(parameter) not in decays, name
        elif "LayerNorm" in name or name.endswith("bias"):
            assert decays[id(parameter)] == 0.0, name
        else:
            assert decays[id(parameter)] == 0.01, name


def test_frozen_are_exactly_the_parameters_without_a_gradient(model: BertForPreTraining) -> None:
    positions = torch.tensor([[1, 2]])
    output = model(
        torch.tensor([[2, 7, 8, 3]]), masked_positions=positions, masked_labels=positions
    )
    output.loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert optim.freeze_unused(model) == without


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_lamb_is_refused_where_parameters_are_flattened(
    model: BertForPreTraining, stage: int
) -> None:
    train = tiny_config("c", "r", train={"optimizer": "lamb"}).train
    with pytest.raises(UserError, match=f"lamb needs ZeRO stage 0, not {stage}"):
        optim.build(train, model, stage=stage, fused=False)
