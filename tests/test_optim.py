"""Weight decay, frozen parameters, refused settings; test_engine.py tests the arithmetic."""

from __future__ import annotations

import pytest
import torch
from ranks import TINY_MODEL, tiny_config

from clue_ds.errors import UserError
from clue_ds.model.bert import BertForPreTraining
from clue_ds.model.pairs import BertForPairs
from clue_ds.presets import ModelConfig
from clue_ds.pretrain import optim

CPU = torch.device("cpu")
SHAPE = {key: value for key, value in TINY_MODEL.items() if key != "preset"}


@pytest.fixture
def model() -> BertForPreTraining:
    return BertForPreTraining(ModelConfig(vocab_size=50, **SHAPE))


def test_weight_decay_spares_layer_norms_and_biases(model: BertForPreTraining) -> None:
    optim.freeze_unused(model)
    optimizer = optim.build(tiny_config("c", "r").train, model, stage=1, device=CPU)
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
        optim.build(train, model, stage=stage, device=CPU)


def test_muon_gets_the_matrices_between_layers_and_nothing_else() -> None:
    model = BertForPairs(ModelConfig(vocab_size=50, **SHAPE), label_sets=[0, 0, 1])
    train = tiny_config("c", "r", train={"optimizer": "muon", "lr": 3e-3}).train
    optimizer = optim.build(train, model, stage=0, device=CPU)
    optim.set_rate(optimizer.param_groups, 2e-3)
    names = {id(p): name for name, p in model.named_parameters()}
    muon, *others = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    dense = (
        "query",
        "key",
        "value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
    expected = [name for name in names.values() if name.removesuffix(".weight").endswith(dense)]
    assert muon == [*expected, "cls.predictions.transform.dense.weight"]
    assert len(muon) == 6 * SHAPE["num_hidden_layers"] + 1
    assert sorted([*muon, *sum(others, [])]) == sorted(names.values())
    rates = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert rates == [(2e-3, 0.01), (1e-3, 0.01), (1e-3, 0.0)]
    assert [len(names) for names in optim.group_names(model, "muon")] == [
        len(group["params"]) for group in optimizer.param_groups
    ]


def test_muon_takes_the_rate_of_the_other_weights_from_adamw_lr(model: BertForPreTraining) -> None:
    train = tiny_config("c", "r", train={"optimizer": "muon", "lr": 4e-3, "adamw_lr": 1e-3}).train
    optimizer = optim.build(train, model, stage=0, device=CPU)
    optim.set_rate(optimizer.param_groups, 2e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3, 5e-4, 5e-4]


def test_adamw_lr_without_muon_is_refused() -> None:
    with pytest.raises(UserError, match="adamw_lr applies only to optimizer muon"):
        tiny_config("c", "r", train={"adamw_lr": 1e-3})
