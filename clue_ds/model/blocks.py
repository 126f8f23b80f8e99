"""One block of the encoder, whose parameters have Hugging Face's names.

B: sequences   S: positions   R: positions that are needed (`rows`), S or fewer   T: S or R
H: hidden size   N: heads   D: head size, H / N
In a flat batch, whose sequences lie end to end, T is the number of tokens and R that of queries.

A block computes query, key and value in one GEMM and reads its children's parameters itself: the
nn.Linear and nn.LayerNorm modules below only hold parameters, and their own forward doesn't run
(ZeRO-3 notices these reads in the first step and gathers the parameters for them). Where only some
positions of the last block are needed, everything after its keys and values is computed for those
alone, which gives the same numbers for a fifth of the work.

Rejected: storing Q, K and V as one parameter (every checkpoint would need a conversion, and
optimizers like Muon would treat it as one matrix).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clue_ds.model import ops
from clue_ds.model.packed_attention import Layout, packed_attention
from clue_ds.presets import ModelConfig


class Dense(nn.Linear):
    """nn.Linear without torch's random initialization, because `initialize` fills the weights."""

    def reset_parameters(self) -> None:
        pass


class Table(nn.Embedding):
    """nn.Embedding without torch's random initialization."""

    def reset_parameters(self) -> None:
        pass


class SelfAttention(nn.Module):
    """The parameters of query, key and value."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.query = Dense(config.hidden_size, config.hidden_size)
        self.key = Dense(config.hidden_size, config.hidden_size)
        self.value = Dense(config.hidden_size, config.hidden_size)


class DenseAddNorm(nn.Module):
    """A projection, dropout, residual addition and LayerNorm."""

    def __init__(self, in_features: int, config: ModelConfig) -> None:
        super().__init__()
        self.dense = Dense(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.p = config.hidden_dropout_prob

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return ops.dense_dropout_add_layer_norm(
            x,
            self.dense.weight,
            self.dense.bias,
            residual,
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            self.p,
            self.LayerNorm.eps,
            self.training,
        )


class DenseGelu(nn.Module):
    """A projection followed by GELU."""

    def __init__(self, in_features: int, out_features: int, config: ModelConfig) -> None:
        super().__init__()
        self.dense = Dense(in_features, out_features)
        self.approximate = config.gelu_approximation

    def forward(self, x: Tensor) -> Tensor:
        return ops.dense_gelu(x, self.dense.weight, self.dense.bias, self.approximate)


class Attention(nn.Module):
    """Multi-head self-attention with its output projection and LayerNorm."""

    def __init__(self, config: ModelConfig, backend: ops.Attention) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = DenseAddNorm(config.hidden_size, config)
        self.num_heads = config.num_attention_heads
        self.p = config.attention_probs_dropout_prob
        self.backend: ops.Attention = backend

    def _project(self, x: Tensor, *projections: nn.Linear) -> tuple[Tensor, ...]:
        """x [B, T, H] through several projections in one GEMM -> each [B, N, T, D]."""
        weight = torch.cat([p.weight for p in projections])
        bias = torch.cat([p.bias for p in projections])
        heads = F.linear(x, weight, bias).unflatten(-1, (len(projections), self.num_heads, -1))
        return heads.permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, hidden: Tensor, keep: Tensor | None, rows: Tensor | None) -> Tensor:
        """hidden [B, S, H] -> [B, S, H], or [B, R, H] at the positions `rows` [B, R].

        `keep` is [B, 1, 1, S], or [B, 1, S, S] for packed rows, where the keys that a query may
        attend to depend on the query.
        """
        here = self.self
        if rows is None:
            residual = hidden
            query, key, value = self._project(hidden, here.query, here.key, here.value)
        else:
            # Queries at the needed positions only; keys and values at all of them.
            residual = take_rows(hidden, rows)
            (query,) = self._project(residual, here.query)
            key, value = self._project(hidden, here.key, here.value)
            if keep is not None and keep.shape[2] > 1:
                # A mask per query: keep the rows of those queries, [B, 1, S, S] -> [B, 1, R, S].
                keep = take_rows(keep.squeeze(1), rows)[:, None]
        context = ops.attention(query, key, value, keep, self.p, self.training, self.backend)
        return self.output(context.transpose(1, 2).flatten(2), residual)

    def flat(self, hidden: Tensor, layout: Layout, rows: Tensor | None) -> Tensor:
        """hidden [T, H] of sequences laid end to end -> [T, H], or [R, H] at tokens `rows` [R]."""
        here = self.self
        if rows is None:
            residual, query = hidden, None
            tokens = self._project_flat(hidden, here.query, here.key, here.value)
        else:
            residual = hidden.index_select(0, rows)
            # Not [:, 0], whose gradient would be copied into a buffer of zeros.
            query = self._project_flat(residual, here.query).squeeze(1)
            tokens = self._project_flat(hidden, here.key, here.value)
        context = packed_attention(tokens, layout, self.p, self.training, query)
        return self.output(context.flatten(1), residual)

    def _project_flat(self, x: Tensor, *projections: nn.Linear) -> Tensor:
        """x [T, H] through k projections in one GEMM -> [T, k, N, D]."""
        weight = torch.cat([p.weight for p in projections])
        bias = torch.cat([p.bias for p in projections])
        return F.linear(x, weight, bias).unflatten(-1, (len(projections), self.num_heads, -1))


class BertLayer(nn.Module):
    """One block: attention, then the feed-forward network, each with add and LayerNorm."""

    def __init__(self, config: ModelConfig, backend: ops.Attention) -> None:
        super().__init__()
        self.attention = Attention(config, backend)
        self.intermediate = DenseGelu(config.hidden_size, config.intermediate_size, config)
        self.output = DenseAddNorm(config.intermediate_size, config)

    def forward(
        self,
        hidden: Tensor,
        keep: Tensor | None,
        rows: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """hidden [B, S, H] -> [B, S, H], or [B, R, H] at the positions `rows` [B, R].

        With a `layout` of sequences laid end to end: hidden [T, H] -> [T, H], or [R, H] at `rows`.
        """
        if layout is None:
            attended = self.attention(hidden, keep, rows)
        else:
            attended = self.attention.flat(hidden, layout, rows)
        return self.output(self.intermediate(attended), attended)


def take_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """hidden [B, S, H] at rows [B, R] -> [B, R, H]."""
    return hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
