"""Drop-in modules for torch's, Megatron's and Hugging Face's, and the README's examples."""

from __future__ import annotations

import copy
import enum
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from clue_ds import kernels
from clue_ds.kernels import reference

README = Path(__file__).resolve().parents[1] / "kernels" / "README.md"


def run_example(heading: str, device: torch.device) -> dict[str, Any]:
    """Run the first Python block below a heading of kernels/README.md; its variables."""
    section = README.read_text("utf-8").split(f"### {heading}\n", 1)[1]
    source = re.search(r"```python\n(.*?)```", section, re.S)
    assert source is not None
    variables: dict[str, Any] = {}
    torch.manual_seed(0)
    with torch.device(device):
        exec(compile(source[1], str(README), "exec"), variables)
    return variables


def test_readmes_example_of_the_operations(kernel_device: torch.device) -> None:
    found = run_example("The operations", kernel_device)
    x, bias, residual, keep = (found[name] for name in ("x", "bias", "residual", "keep"))
    num_dropped, scale = reference.dropout_threshold(0.1)
    assert torch.equal(keep, reference.philox_keep(x.shape, num_dropped, 7).to(kernel_device))
    assert found["total"].dtype == torch.bfloat16 and found["wide_total"].dtype == torch.float32
    residual, kept = residual.float(), residual.float() + (x.float() + bias) * scale
    wide = found["wide_total"]  # of another seed: each element was kept or dropped
    error = torch.minimum((wide - kept).abs(), (wide - residual).abs())
    assert error.max().item() < 1e-5
    total = torch.where(keep, kept, residual).bfloat16()  # what the last call normalized
    expected = reference.layer_norm(total, found["weight"], found["ln_bias"], 1e-12)
    torch.testing.assert_close(found["y"], expected, rtol=2**-6, atol=2**-6)


def test_readmes_example_of_hugging_face(kernel_device: torch.device) -> None:
    found = run_example("In Hugging Face's BERT and RoBERTa", kernel_device)
    fused = [m for m in found["model"].modules() if type(m).__name__.startswith("Fused")]
    assert len(fused) == 2 + 2 * (2 + 2 + 1)  # see test_hugging_face_bert_computes_the_same
    torch.testing.assert_close(found["after"], found["before"], rtol=1e-4, atol=1e-5)


def test_readmes_example_of_megatron(kernel_device: torch.device) -> None:
    found = run_example("In Megatron-LM", kernel_device)
    expected = by_definition(found["scores"], found["mask"], 0.125)
    assert found["probabilities"].dtype == torch.bfloat16
    torch.testing.assert_close(
        found["probabilities"].double(),
        expected,
        rtol=2 * torch.finfo(torch.bfloat16).eps,
        atol=1e-5,
    )
    assert torch.count_nonzero(found["probabilities"][1, ..., 9:]) == 0


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


class AttnMaskType(enum.Enum):
    """Megatron's."""

    padding = 1
    causal = 2
    no_mask = 3


def fill(scores: Tensor, mask: Tensor) -> Tensor:
    """Megatron's attention_mask_func."""
    return scores.masked_fill(mask, -10_000.0)


def by_definition(
    scores: Tensor, mask: Tensor | None, scale: float, offset: Tensor | None = None
) -> Tensor:
    """softmax(scale * scores) in fp64, -10000 where masked; zeros if all weights underflow."""
    scaled = scores.double() * scale
    if mask is not None:
        scaled = fill(scaled, mask)
    extra = 0.0 if offset is None else offset.double().exp()[:, None, None]
    weights = scaled.exp()
    rows = weights.sum(-1, keepdim=True) + extra
    return torch.where(rows == 0, 0.0, weights / rows)


@pytest.mark.parametrize("fusion", [True, False])
def test_megatrons_constructor_call_and_mask(fusion: bool, kernel_device: torch.device) -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 5, 7, device=kernel_device)
    mask = torch.rand(2, 1, 5, 7, device=kernel_device) < 0.3
    mask[..., 0] = False
    for flags, dtype in (((True, False), torch.float16), ((False, True), torch.bfloat16)):
        # Positional, in Megatron's order.
        module = kernels.FusedScaleMaskSoftmax(
            *flags, AttnMaskType.padding, fusion, fill, True, 0.5, None
        )
        low = scores.to(dtype)
        out = module(low, mask)
        assert out.dtype == dtype
        tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-5}
        torch.testing.assert_close(out.double(), by_definition(low, mask, 0.5), **tolerance)
    plain = kernels.FusedScaleMaskSoftmax(
        False, False, AttnMaskType.no_mask, fusion, fill, False, None
    )
    expected = by_definition(scores, None, 1.0).float()
    torch.testing.assert_close(plain(scores, None), expected)
    empty = torch.ones(1, 1, 5, 7, dtype=torch.bool, device=kernel_device)
    if fusion:  # as in Megatron's kernel; after mask_func, torch's softmax is uniform
        assert torch.count_nonzero(plain(scores, empty)) == 0


@pytest.mark.parametrize("fusion", [True, False])
def test_megatrons_causal_masks_and_windows(fusion: bool, kernel_device: torch.device) -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 6, 6, device=kernel_device)
    padding = torch.zeros(2, 1, 1, 6, dtype=torch.bool, device=kernel_device)
    padding[1, ..., 4:] = True
    later = torch.ones(6, 6, dtype=torch.bool, device=kernel_device).triu(1)
    module = kernels.FusedScaleMaskSoftmax(
        attn_mask_type=AttnMaskType.causal, scaled_masked_softmax_fusion=fusion, mask_func=fill
    )
    for mask, hidden in ((None, later), (later, later), (padding, later | padding)):
        expected = by_definition(scores, hidden, 1.0).float()
        torch.testing.assert_close(module(scores, mask), expected)
    one = scores[:, :, :1]
    torch.testing.assert_close(module(one, None), by_definition(one, None, 1.0).float())
    with pytest.raises(ValueError, match="as many keys as queries, not 6 for 3"):
        module(scores[:, :, :3], None)
    windowed = kernels.FusedScaleMaskSoftmax(
        scaled_masked_softmax_fusion=fusion, mask_func=fill, window_size=(2, 0)
    )
    hidden = later | torch.ones_like(later).tril(-3)
    for few in (6, 2):  # only the last queries, as with cached keys
        expected = by_definition(scores[:, :, -few:], hidden[-few:], 1.0).float()
        torch.testing.assert_close(windowed(scores[:, :, -few:], None), expected)


def test_megatrons_softmax_offset_counts_in_the_sum(kernel_device: torch.device) -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 4, 5, device=kernel_device)
    offset = torch.randn(3, device=kernel_device)
    module = kernels.FusedScaleMaskSoftmax(scale=0.5)
    expected = by_definition(scores, None, 0.5, offset).float()
    torch.testing.assert_close(module(scores, None, offset), expected)


def test_megatrons_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="both"):
        kernels.FusedScaleMaskSoftmax(input_in_fp16=True, input_in_bf16=True)
    with pytest.raises(ValueError, match="softmax_in_fp32 must be True"):
        kernels.FusedScaleMaskSoftmax(softmax_in_fp32=False, scale=0.5)


def bert(model: type[nn.Module], activation: str = "gelu") -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=40, max_position_embeddings=16, hidden_act=activation,
    )  # fmt: skip
    return model(config).eval()


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The pretraining or MLM loss; for a plain BertModel, a sum that depends on all results."""
    types = (ids % 2).long()
    keep = torch.ones_like(ids)
    keep[1, 6:] = 0
    if isinstance(model, transformers.BertModel):
        out = model(ids, attention_mask=keep, token_type_ids=types)
        return out.last_hidden_state.pow(3).sum() + out.pooler_output.sum()
    labels = {"labels": ids}
    if isinstance(model, transformers.BertForPreTraining):
        labels["next_sentence_label"] = types[:, 0]
    return model(ids, attention_mask=keep, token_type_ids=types, **labels).loss


@pytest.mark.parametrize(
    ("kind", "activation", "num_norms"),
    [
        (transformers.BertModel, "gelu", 1),
        (transformers.BertForMaskedLM, "gelu_new", 2),  # embeddings and the head's transform
        (transformers.BertForPreTraining, "gelu", 2),
        (transformers.RobertaForMaskedLM, "gelu", 2),
    ],
)
def test_hugging_face_bert_computes_the_same(
    kind: type[nn.Module], activation: str, num_norms: int, kernel_device: torch.device
) -> None:
    theirs = bert(kind, activation).to(kernel_device)
    ours = kernels.apply_kernels_to_bert(copy.deepcopy(theirs))
    fused = [m for m in ours.modules() if type(m).__name__.startswith("Fused")]
    # Each layer has two dense-add-norms, their two LayerNorms, and one GELU.
    assert len(fused) == num_norms + 2 * (2 + 2 + 1)
    assert isinstance(ours, kind) and ours.state_dict().keys() == theirs.state_dict().keys()
    copied = copy.deepcopy(ours)
    ids = torch.randint(2, 50, (2, 9), device=kernel_device)
    losses = [loss_of(model, ids) for model in (ours, theirs, copied)]
    torch.testing.assert_close(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    for loss in losses[:2]:
        loss.backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_a_network_that_is_no_bert_is_refused() -> None:
    with pytest.raises(
        ValueError, match="Sequential is no BERT or RoBERTa of transformers: it has none of Bert"
    ):
        kernels.apply_kernels_to_bert(nn.Sequential(nn.Linear(2, 2)))
