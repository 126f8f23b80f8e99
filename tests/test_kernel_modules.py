"""Modules that drop in for torch's, Megatron's and Hugging Face's."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from clue_ds import kernels


def test_fused_layer_norm_is_nn_layer_norm(kernel_device: torch.device) -> None:
    torch.manual_seed(0)
    for shape, options in (
        ((24,), {}),
        ((3, 8), {"eps": 1e-3}),
        ((24,), {"bias": False}),
        ((24,), {"elementwise_affine": False}),
    ):
        theirs = nn.LayerNorm(shape, **options).to(kernel_device)
        for parameter in theirs.parameters():
            nn.init.normal_(parameter)
        ours = kernels.FusedLayerNorm(shape, **options).to(kernel_device)
        ours.load_state_dict(theirs.state_dict())
        assert isinstance(ours, nn.LayerNorm) and str(ours)[5:] == str(theirs)
        x = torch.randn(2, 5, *shape, device=kernel_device)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_fused_scale_mask_softmax(kernel_device: torch.device) -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 5, 7, device=kernel_device)
    mask = torch.rand(2, 1, 5, 7, device=kernel_device) < 0.3
    mask[..., 0] = False
    expected = (scores * 0.5).masked_fill(mask, float("-inf")).softmax(-1)
    for fusion in (True, False):
        module = kernels.FusedScaleMaskSoftmax(scaled_masked_softmax_fusion=fusion, scale=0.5)
        torch.testing.assert_close(module(scores, mask), expected)
    by_function = kernels.FusedScaleMaskSoftmax(
        mask_func=lambda s, m: s.masked_fill(m, -10_000.0), scale=0.5
    )
    torch.testing.assert_close(by_function(scores, mask), expected)
    with pytest.raises(ValueError, match="made for torch.float16"):
        kernels.FusedScaleMaskSoftmax(input_in_fp16=True)(scores, mask)
    with pytest.raises(ValueError, match="both"):
        kernels.FusedScaleMaskSoftmax(input_in_fp16=True, input_in_bf16=True)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_hugging_face_bert_computes_the_same(activation: str, kernel_device: torch.device) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=40, max_position_embeddings=16, hidden_act=activation,
    )  # fmt: skip
    theirs = transformers.BertForMaskedLM(config).to(kernel_device).eval()
    ours = kernels.apply_kernels_to_bert(copy.deepcopy(theirs))
    fused = [m for m in ours.modules() if type(m).__name__.startswith("Fused")]
    # Embedding and head LayerNorm; per layer two dense-add-norms with theirs and one GELU.
    assert len(fused) == 2 + 2 * (2 + 2 + 1)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ids = torch.randint(0, 50, (2, 9), device=kernel_device)
    losses = [model(ids, labels=ids).loss for model in (copy.deepcopy(ours), theirs)]
    torch.testing.assert_close(*losses)
    for loss, model in zip((ours(ids, labels=ids).loss, losses[1]), (ours, theirs), strict=True):
        loss.backward()
        assert model.bert.encoder.layer[0].intermediate.dense.bias.grad is not None
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_a_network_that_is_no_bert_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential has none of BertSelfOutput"):
        kernels.apply_kernels_to_bert(nn.Sequential(nn.Linear(2, 2)))
