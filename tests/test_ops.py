"""The torch reference of the fused operations against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from clue_ds.kernels import reference
from clue_ds.model import ops


def test_dropout_rate_scale_and_gradient() -> None:
    torch.manual_seed(0)
    x = torch.ones(1_000_003, requires_grad=True)  # not a multiple of the 4 draws in a word
    for p in (0.1, 0.5):
        y = reference.dropout(x, p, training=True)
        num_dropped, scale = reference.dropout_threshold(p)
        rate = num_dropped / 65_536
        assert abs(rate - p) < 1e-5
        sigma = math.sqrt(rate * (1 - rate) / x.numel())
        for offset in range(4):  # each of the four draws of a word is unbiased
            dropped = (y[offset::4] == 0).double().mean().item()
            assert abs(dropped - rate) < 5 * 2 * sigma
        assert set(y.unique().tolist()) == {0.0, torch.tensor(scale).item()}
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(grad, y.detach())


def test_dropout_neighbours_are_independent() -> None:
    torch.manual_seed(0)
    keep = reference.keep_mask(torch.Size((1 << 20,)), 6_554).double()
    for shift in (1, 2, 3, 4, 312, 128 * 128):
        both = (keep[:-shift] * keep[shift:]).mean().item()
        assert abs(both - keep.mean().item() ** 2) < 5 * 0.3 / 1024, shift


def test_dropout_of_probability_one_and_zero() -> None:
    x = torch.randn(5, 7)
    assert torch.equal(reference.dropout(x, 1.0, training=True), torch.zeros_like(x))
    assert reference.dropout(x, 0.0, training=True) is x
    assert reference.dropout(x, 0.5, training=False) is x


def test_masked_softmax_equals_its_definition_for_mask_and_lengths() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 5, 7, requires_grad=True)
    mask = torch.rand(2, 1, 1, 7) < 0.3
    mask[..., 0] = False
    lengths = torch.tensor([7, 2])
    out = reference.masked_softmax(scores, mask, lengths, scale=0.5)
    masked = mask | (torch.arange(7) >= lengths[:, None])[:, None, None]
    weights = (scores * 0.5).exp() * ~masked
    torch.testing.assert_close(out, weights / weights.sum(-1, keepdim=True))


def test_masked_softmax_of_a_row_without_keys_is_zero_with_zero_gradient() -> None:
    scores = torch.randn(2, 1, 3, 4, requires_grad=True)
    out = reference.masked_softmax(scores, key_lengths=torch.tensor([0, 3]))
    out.pow(2).sum().backward()
    assert torch.equal(out[0], torch.zeros(1, 3, 4))
    assert scores.grad is not None and torch.equal(scores.grad[0], torch.zeros(1, 3, 4))
    assert out[1].sum().item() == pytest.approx(3.0)
    assert torch.isfinite(scores.grad).all()


def test_masked_softmax_shows_a_nan_in_a_kept_key() -> None:
    scores = torch.zeros(1, 1, 1, 4)
    scores[..., 1] = float("nan")
    assert reference.masked_softmax(scores, key_lengths=torch.tensor([3])).isnan().any()


def test_layer_norm_takes_bf16_rows_with_fp32_weights() -> None:
    torch.manual_seed(0)
    x = (torch.randn(6, 312) + 1_000.0).bfloat16()  # a mean that cancels
    weight, bias = torch.randn(312), torch.randn(312)
    out = reference.layer_norm(x, weight, bias, 1e-12)
    exact = F.layer_norm(x.double(), (312,), weight.double(), bias.double(), 1e-12)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=2**-8)


def test_bias_dropout_add_layer_norm_is_the_chain_of_its_parts() -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, 4, 9, 16)
    bias, weight, ln_bias = torch.randn(3, 16)
    out = reference.bias_dropout_add_layer_norm(
        x, bias, residual, weight, ln_bias, p=0.4, eps=1e-12, training=False
    )
    torch.testing.assert_close(
        out, F.layer_norm(x + bias + residual, (16,), weight, ln_bias, 1e-12)
    )


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_bias_gelu_is_gelu_of_the_sum(approximate: str) -> None:
    x, bias = torch.randn(3, 8), torch.randn(8)
    expected = F.gelu(x + bias, approximate=approximate)
    assert torch.equal(reference.bias_gelu(x, bias, approximate), expected)
    assert torch.equal(reference.bias_gelu(x + bias, None, approximate), expected)


def test_embedding_layer_norm_gives_the_padding_word_no_gradient() -> None:
    torch.manual_seed(0)
    tables = [torch.randn(n, 8, requires_grad=True) for n in (11, 6, 2)]
    weight, bias = torch.randn(8), torch.randn(8)
    ids = torch.tensor([[3, 0, 3, 7]])
    types = torch.tensor([[0, 0, 1, 1]])
    word, position, token_type = tables
    out = reference.embedding_layer_norm(
        ids, types, word, position, token_type, weight, bias, 0.0, 1e-12, True, padding_idx=0
    )
    summed = word[ids] + position[:4] + token_type[types]
    torch.testing.assert_close(out, F.layer_norm(summed, (8,), weight, bias, 1e-12))
    out.pow(2).sum().backward()
    assert word.grad is not None
    assert torch.count_nonzero(word.grad[0]) == 0 and torch.count_nonzero(word.grad[3]) > 0


def test_most_likely_is_the_first_of_the_largest() -> None:
    logits = torch.tensor([[0.5, 2.0, -1.0, 2.0], [-3.0, -2.0, -4.0, -5.0]])
    assert ops.most_likely(logits.requires_grad_()).tolist() == [1, 1]
    assert ops.most_likely(torch.tensor([1.0, math.nan, math.inf])) == 1
    compiled = torch.compile(ops.most_likely, backend="eager", fullgraph=True)
    assert compiled(logits.detach()[1:]).tolist() == [1]


def test_attention_backends_agree_with_and_without_a_mask() -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 3, 4, 6)
    key, value = torch.randn(2, 2, 3, 9, 6)
    keep = (torch.arange(9) < torch.tensor([[9], [5]]))[:, None, None]
    for mask in (None, keep):
        sdpa = ops.attention(query, key, value, mask, 0.1, False, "sdpa")
        softmax = ops.attention(query, key, value, mask, 0.1, False, "masked_softmax")
        torch.testing.assert_close(sdpa, softmax, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("has_mask", [False, True])
def test_attention_on_a_gpu_pads_heads_without_changing_a_number(has_mask: bool) -> None:
    """What runs on a GPU, on tensors of a CPU: head size 26 fits none of torch's fused kernels."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 9, 26, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    keep = (torch.arange(9) < torch.tensor([[9], [5]]))[:, None, None] if has_mask else None
    padded = ops._fused_attention(*inputs, keep, 0.0)
    plain = F.scaled_dot_product_attention(*inputs, attn_mask=keep)
    torch.testing.assert_close(padded, plain)
    upstream = torch.randn_like(plain)
    for ours, theirs in zip(
        torch.autograd.grad(padded, inputs, upstream),
        torch.autograd.grad(plain, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("p", "takes_cudnn"), [(0.0, True), (0.1, False), (0.125, True), (0.0625, True), (0.06, False)]
)
def test_cudnn_gets_only_the_dropout_rates_that_it_can_draw(
    p: float, takes_cudnn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def attention(query: torch.Tensor, *others: object, **options: object) -> torch.Tensor:
        seen.append((torch.backends.cuda.cudnn_sdp_enabled(), query.shape[-1]))
        return query

    assert torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    query = torch.empty(1, 2, 4, 26, device="meta")
    assert ops.attention(query, query, query, None, p, True, "sdpa").shape == query.shape
    assert seen == [(takes_cudnn, 32)]
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_attention_without_cudnn_compiles_in_one_piece() -> None:
    def attention(x: torch.Tensor) -> torch.Tensor:
        return ops._fused_attention(x, x, x, None, 0.1)

    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    x = torch.randn(1, 2, 4, 26)
    assert compiled(x).shape == x.shape
    torch.compiler.reset()
