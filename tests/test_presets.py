"""Every published shape has the number of parameters that was published."""

from __future__ import annotations

import pytest
import torch

from clue_ds import presets
from clue_ds.errors import UserError
from clue_ds.model import BertForPreTraining

NUM_PARAMETERS = {
    "roberta_tiny_clue": 7_449_936,
    "roberta_tiny_pair": 7_449_936,
    "roberta_tiny3l312_clue": 6_277_752,
    "roberta_tiny3l768_clue": 28_410_624,
    "bert_base_clue": 92_201_472,
    "bert_base_google": 102_267_648,
    "roberta_large_clue": 312_100_864,
    "roberta_large_pair": 312_100_864,
}


def test_the_table_names_every_preset() -> None:
    assert presets.NAMES == tuple(NUM_PARAMETERS)


@pytest.mark.parametrize("name", presets.NAMES)
def test_encoder_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = BertForPreTraining(presets.get(name))
    assert sum(p.numel() for p in model.bert.parameters()) == NUM_PARAMETERS[name]
    assert f"{NUM_PARAMETERS[name]:,}" in (presets.PRESETS[name].__doc__ or "")


def test_unknown_preset_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="roberta_tiny_clue"):
        presets.get("bert_huge")


@pytest.mark.parametrize("changes", [{"num_attention_heads": 5}, {"hidden_act": "relu"}])
def test_impossible_shape_is_an_error(changes: dict) -> None:
    with pytest.raises(UserError):
        presets.get("roberta_tiny_clue").replace(**changes)
