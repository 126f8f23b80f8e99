"""Embeddings and encoder of post-LN BERT, for rows of a batch and for sequences laid end to end.

B: sequences   S: positions   R: positions kept by the last block   T: tokens of all sequences
H: hidden size   D: sequences in a packed row

Guarantees: the keys of `state_dict()` equal those of transformers' BertModel. Padding changes no
state of a real token, however the rows are laid out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clue_ds.errors import UserError
from clue_ds.model import ops
from clue_ds.model.blocks import BertLayer, Dense, Table
from clue_ds.model.packed_attention import Layout, choose
from clue_ds.presets import ModelConfig

BF16_TOKEN_MULTIPLE = 64  # few shapes, and little to compute in vain


class Embeddings(nn.Module):
    """Word + position + token type, LayerNorm, dropout."""

    def __init__(self, config: ModelConfig, num_word_rows: int) -> None:
        super().__init__()
        self.word_embeddings = Table(
            num_word_rows, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = Table(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = Table(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.p = config.hidden_dropout_prob

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None = None
    ) -> Tensor:
        """ids [B, S] -> [B, S, H]; without `position_ids` positions count from 0 in each row."""
        if position_ids is not None:
            # Positions start again at each sequence. The fused operation takes positions 0 to
            # S - 1 only, so the three embeddings are summed here.
            summed = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
            if token_type_ids is None:
                summed = summed + self.token_type_embeddings.weight[0]
            else:
                summed = summed + self.token_type_embeddings(token_type_ids)
            norm = self.LayerNorm
            normalized = ops.layer_norm(summed, norm.weight, norm.bias, norm.eps)
            return ops.dropout(normalized, self.p, self.training)
        return ops.embedding_layer_norm(
            input_ids,
            token_type_ids,
            self.word_embeddings.weight,
            self.position_embeddings.weight,
            self.token_type_embeddings.weight,
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            self.p,
            self.LayerNorm.eps,
            self.training,
            self.word_embeddings.padding_idx,
        )


class Encoder(nn.Module):
    def __init__(self, config: ModelConfig, backend: ops.Attention) -> None:
        super().__init__()
        blocks = (BertLayer(config, backend) for _ in range(config.num_hidden_layers))
        self.layer = nn.ModuleList(blocks)

    def forward(
        self,
        hidden: Tensor,
        keep: Tensor | None,
        rows: Tensor | None,
        layout: Layout | None = None,
    ) -> Tensor:
        for block in self.layer[:-1]:
            hidden = block(hidden, keep, None, layout)
        return self.layer[-1](hidden, keep, rows, layout)


class Pooler(nn.Module):
    """tanh(dense([CLS])): [B, H] -> [B, H]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = Dense(config.hidden_size, config.hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        return torch.tanh(self.dense(first))


class BertModel(nn.Module):
    """Embeddings, encoder and pooler; `forward` leaves the pooler to the heads."""

    def __init__(
        self,
        config: ModelConfig,
        attention: ops.Attention = "sdpa",
        padded_vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config, padded_vocab_size or config.vocab_size)
        self.encoder = Encoder(config, attention)
        self.attention: ops.Attention = attention
        self.pooler = Pooler(config)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rows: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of ids [B, S]: [B, S, H], or [B, R, H] at the positions `rows` [B, R].

        Padding is everything from `lengths` [B] on, or where `attention_mask` [B, S] is 0. With
        `cu_seqlens` [B, D + 1] (see SampleStream.batch) each sequence of a packed row is computed
        as if it were alone: its positions begin at 0, attention stays inside it, and its segment
        type is 0.
        """
        keep: Tensor | None
        seq_length = self._check_length(input_ids)
        assert lengths is None or attention_mask is None, "give lengths or attention_mask, not both"
        if cu_seqlens is not None:
            position_ids, keep = split_rows(cu_seqlens, seq_length)
            return self.encoder(self.embeddings(input_ids, None, position_ids), keep, rows)
        embedded = self.embeddings(input_ids, token_type_ids)
        if lengths is not None and self._attends_without_mask(embedded):
            return self._padded_rows(embedded, lengths, rows)
        return self.encoder(embedded, key_mask(lengths, attention_mask, seq_length), rows)

    def _attends_without_mask(self, hidden: Tensor) -> bool:
        """Whether rows of different lengths are computed as sequences laid end to end.

        On a GPU: there, a mask would keep torch from its fast kernels, and be made anew for each
        micro-batch.
        """
        head_size = self.config.hidden_size // self.config.num_attention_heads
        heads = hidden.new_empty((0, head_size), dtype=_computed_in(hidden))
        return choose(heads, self.attention) in ("triton", "flash")

    def _padded_rows(self, embedded: Tensor, lengths: Tensor, rows: Tensor | None) -> Tensor:
        """[B, S, H] -> [B, S, H], or [B, R, H] at `rows` [B, R], which lie before `lengths`.

        The padding of a row is a sequence of its own, whose results nobody uses. Shapes depend on
        B, S and R only, and nothing waits for the device.
        """
        num_rows, seq_length = embedded.shape[:2]
        firsts = seq_length * torch.arange(num_rows, device=lengths.device)
        begins = torch.stack((firsts, firsts + lengths), dim=1).flatten()
        begins = F.pad(begins, (0, 1), value=num_rows * seq_length).int()
        cu_queries, most, places = begins, seq_length, None
        if rows is not None:
            most, places = rows.shape[1], (rows + firsts[:, None]).flatten()
            # A row's own sequence has all of its queries, and its padding has none.
            ends = torch.arange(1, 2 * num_rows + 2, dtype=torch.int32, device=lengths.device)
            cu_queries = most * (ends // 2)
        layout = Layout(begins, cu_queries, seq_length, most, self.attention)
        hidden = self.encoder(embedded.flatten(0, 1), None, places, layout)
        return hidden.unflatten(0, (num_rows, most))

    def flat(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        position_ids: Tensor,
        rows: Tensor | None,
        layout: Layout,
    ) -> Tensor:
        """Hidden states of sequences laid end to end, ids [T]: [T, H], or [R, H] at `rows` [R]."""
        embedded = self.embeddings(input_ids, token_type_ids, position_ids)
        return self.encoder(embedded, None, rows, layout)

    def of_lengths(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        lengths: Tensor | None,
        first_only: bool = False,
    ) -> Tensor:
        """Hidden states [B, S, H] of ids [B, S], or [B, 1, H]: only those of each first token.

        On a CPU neither the padding after `lengths` [B] is computed (its states are 0) nor, in
        training, are the scores of a whole batch kept at once: the rows are laid end to end. On a
        GPU, finding their places would wait for the device, so the rows stay padded there.
        """
        num_rows, seq_length = len(input_ids), self._check_length(input_ids)
        on_cpu = input_ids.device.type == "cpu"
        is_full = lengths is None or (on_cpu and bool((lengths == seq_length).all()))
        drops = self.training and self.config.attention_probs_dropout_prob > 0.0
        if not on_cpu or (is_full and not drops):
            rows = torch.zeros_like(input_ids[:, :1]) if first_only else None
            return self(input_ids, token_type_ids, lengths, rows=rows)
        if lengths is None:
            lengths = torch.full((num_rows,), seq_length)
        places = torch.arange(seq_length).expand(num_rows, -1)
        keep = places < lengths[:, None]
        # One more sequence, whose results nobody uses, makes the number of tokens a round one.
        num_spare = int(-lengths.sum() % _token_multiple(self.embeddings.word_embeddings.weight))
        begins = F.pad(lengths.cumsum(0), (1, 0)).int()
        firsts = begins[:-1].long() if first_only else None
        begins = F.pad(begins, (0, 1), value=int(begins[-1]) + num_spare)
        cu_queries = begins
        if first_only:
            cu_queries = torch.arange(num_rows + 2, dtype=torch.int32).clamp(max=num_rows)
        most = 1 if first_only else seq_length
        layout = Layout(begins, cu_queries, max(seq_length, num_spare), most, self.attention)
        ids, positions = (F.pad(x[keep], (0, num_spare)) for x in (input_ids, places))
        types = None if token_type_ids is None else F.pad(token_type_ids[keep], (0, num_spare))
        hidden = self.flat(ids, types, positions, firsts, layout)
        if first_only:
            return hidden[:, None]
        padded = hidden.new_zeros(num_rows, seq_length, hidden.shape[-1])
        return padded.masked_scatter(keep[..., None], hidden)

    def _check_length(self, input_ids: Tensor) -> int:
        """The number of positions of ids [B, S], or UserError if the model has fewer."""
        seq_length = input_ids.shape[1]
        if seq_length > self.config.max_position_embeddings:
            raise UserError(
                f"sequences of {seq_length} tokens are longer than the model's "
                f"{self.config.max_position_embeddings} positions; shorten them, or train a model "
                "with a larger max_position_embeddings"
            )
        return seq_length


# -------------------------------------------------------------------------------- which data type


def _computed_in(x: Tensor) -> torch.dtype:
    """The type in which matrices are multiplied with `x`: its own, or that of autocast."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _token_multiple(weight: Tensor) -> int:
    """What the number of tokens of a batch should be a multiple of, on a CPU.

    In bf16 oneDNN generates code for every new shape of matrix, which takes longer than a small
    batch does.
    """
    return BF16_TOKEN_MULTIPLE if _computed_in(weight) == torch.bfloat16 else 1


# ------------------------------------------------------------------------------- which keys count


def key_mask(
    lengths: Tensor | None, attention_mask: Tensor | None, seq_length: int
) -> Tensor | None:
    """bool [B, 1, 1, S], True for keys that count; None when all do (attention is then cheaper).

    On a GPU it is None only when neither argument is given, because finding out whether all keys
    count would synchronize with the GPU.
    """
    if lengths is not None:
        keep = torch.arange(seq_length, device=lengths.device) < lengths[:, None]
    elif attention_mask is not None:
        keep = attention_mask.bool()
    else:
        return None
    if keep.device.type == "cpu" and bool(keep.all()):
        return None
    return keep[:, None, None, :]


def without_full_lengths(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch in host memory, without its `lengths` [B] if every row is full."""
    lengths, ids = batch.get("lengths"), batch["input_ids"]
    if lengths is None or ids.dim() == 1 or bool((lengths < ids.shape[1]).any()):
        return batch
    return {name: tensor for name, tensor in batch.items() if name != "lengths"}


def split_rows(cu_seqlens: Tensor, seq_length: int) -> tuple[Tensor, Tensor]:
    """position_ids [B, S] and attention mask of packed rows, which hold several sequences.

    The mask is bool [B, 1, S, S], True where query and key are in the same sequence. Padding counts
    as one more sequence, because softmax needs at least one key; its results are not used.
    """
    places = torch.arange(seq_length, device=cu_seqlens.device).expand(len(cu_seqlens), -1)
    # Sequence i of a row covers positions cu_seqlens[i] to cu_seqlens[i + 1] - 1, so the number of
    # ends that are not after a position is the number of its sequence.
    number = torch.searchsorted(cu_seqlens[:, 1:].contiguous(), places.contiguous(), right=True)
    # [B, 1, S, 1] == [B, 1, 1, S] -> [B, 1, S, S]
    same = number[:, None, :, None] == number[:, None, None, :]
    # Positions are counted from the start of their sequence.
    return places - cu_seqlens.gather(1, number), same
