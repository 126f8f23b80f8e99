"""Post-LN BERT for pretraining, with Hugging Face's parameter names and half of its arithmetic.

B: sequences   S: positions   P: predictions per sequence   H: hidden size   V: vocabulary

Guarantees: the keys of `state_dict()` equal those of transformers' BertForPreTraining (the decoder
is tied to the word embeddings), and logits and gradients agree with it to 1e-5 in fp32. Softmax,
LayerNorm statistics and the loss are computed in fp32 for every parameter type. With
`masked_positions` the MLM head, and everything in the last block after its keys and values, is
computed at those positions only.

Rejected: leaving out the pooler and the NSP head (others continue pretraining with them).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clue_ds.data.sampling import IGNORED_LABEL
from clue_ds.model import ops
from clue_ds.model.blocks import Dense
from clue_ds.model.encoder import BertModel
from clue_ds.model.init import initialize
from clue_ds.model.packed_attention import Layout
from clue_ds.presets import ModelConfig

VOCAB_MULTIPLE = 64
MAX_COMPILED_SHAPES = 64  # of one function; torch's own limit is 8


class PreTrainingOutput(NamedTuple):
    """What BertForPreTraining returns; its `forward` documents which fields are None."""

    loss: Tensor | None
    num_correct: Tensor | None
    num_predicted: Tensor | None
    prediction_logits: Tensor | None
    seq_relationship_logits: Tensor | None
    mlm_sum: Tensor | None = None
    pair_sums: Tensor | None = None


class PredictionTransform(nn.Module):
    """GELU(dense(x)), LayerNorm: [..., H] -> [..., H]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = Dense(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.approximate = config.gelu_approximation

    def forward(self, x: Tensor) -> Tensor:
        activated = ops.dense_gelu(x, self.dense.weight, self.dense.bias, self.approximate)
        norm = self.LayerNorm
        return ops.layer_norm(activated, norm.weight, norm.bias, norm.eps)


class Decoder(Dense):
    """Logits over the vocabulary, -inf for padding rows, whose gradient is then exactly 0."""

    def __init__(self, in_features: int, num_rows: int, num_real_rows: int) -> None:
        super().__init__(in_features, num_rows)
        self.num_real_rows = num_real_rows

    def forward(self, x: Tensor) -> Tensor:
        num_padding = self.out_features - self.num_real_rows
        bias = F.pad(self.bias[: self.num_real_rows], (0, num_padding), value=float("-inf"))
        return F.linear(x, self.weight, bias)


class PredictionHead(nn.Module):
    """The MLM head; decoder.weight and decoder.bias are tied by BertForPreTraining."""

    def __init__(self, config: ModelConfig, num_word_rows: int) -> None:
        super().__init__()
        self.transform = PredictionTransform(config)
        self.decoder = Decoder(config.hidden_size, num_word_rows, config.vocab_size)
        self.bias = self.decoder.bias

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden))


class PreTrainingHeads(nn.Module):
    def __init__(self, config: ModelConfig, num_word_rows: int) -> None:
        super().__init__()
        self.predictions = PredictionHead(config, num_word_rows)
        self.seq_relationship = Dense(config.hidden_size, 2)


class BertForPreTraining(nn.Module):
    """The encoder with the masked-language-model and next-sentence heads.

    `config.vocab_size` is the number of lines of vocab.txt. `padded_vocab_size` (see pad_vocab)
    adds rows in memory that are never predicted and never receive a gradient. Weights are
    initialized by `initialize(model, torch.initial_seed())`, except on the meta device.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: ops.Attention = "sdpa",
        padded_vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        num_word_rows = padded_vocab_size or config.vocab_size
        assert num_word_rows >= config.vocab_size
        self.config = config
        self.mlm_weight = 1.0  # factor of the MLM loss when the loss of sentence pairs is added
        self.bert = BertModel(config, attention, padded_vocab_size)
        self.cls = PreTrainingHeads(config, num_word_rows)
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight
        if not self.cls.predictions.bias.is_meta:
            initialize(self, torch.initial_seed())

    def compile_blocks(self, backend: str = "inductor") -> None:
        """torch.compile the embeddings, every block, and the MLM head with its loss.

        Shapes are compiled as static, because all batches of pretraining have one shape; blocks of
        the same shape share their code. Inductor needs a C++ compiler on a CPU. Call it after
        `ops.choose_kernels`.
        """
        options: dict[str, Any] = {"backend": backend, "dynamic": False}
        if backend == "inductor" and ops.uses_kernels():
            # Inductor pads the rows of what it writes (1,248 columns become 1,280), and copies
            # them before each operation of ours, which takes only rows without gaps.
            options["options"] = {"comprehensive_padding": False}
        # Training and evaluation, full rows and padded ones, and every length of a run's phases
        # need code of their own. Above the limit, torch runs the eager code without a word.
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, MAX_COMPILED_SHAPES)
        for part in (self.bert.embeddings, *self.bert.encoder.layer):
            part.compile(**options)
        self._predict = torch.compile(self._predict, **options)  # type: ignore[method-assign]

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        masked_positions: Tensor | None = None,
        masked_labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_predictions: Tensor | None = None,
        bounds: Tensor | None = None,
    ) -> PreTrainingOutput:
        """Logits, or the MLM loss, of int64 ids [B, S] (see BertModel for the other inputs).

        Without `masked_labels` it returns prediction_logits ([B, S, V], or [B, P, V] if
        `masked_positions` [B, P] are given) and seq_relationship_logits [B, 2]; the rest is None.

        With `masked_labels` [B, P] (-100 in unused slots) it returns no logits, and the pooler and
        the NSP head don't run. `loss` is the sum of the cross entropies / (B * P), a count that
        does not depend on how a batch is split over ranks; `mlm_sum` is the sum; `num_correct` and
        `num_predicted` are int64 scalars.

        With `next_sentence_label` [B] (-100: no pair) as well, pooler and NSP head run, and `loss`
        is mlm_weight times the MLM loss plus the sum of the pairs' cross entropies / B. `pair_sums`
        [3] holds that sum, the number of pairs predicted correctly, and the number of pairs.

        With `bounds` the batch is flat: sequences laid end to end, as data/flat.py makes them. The
        loss is that of the padded rows: `bounds` has B * P as its divisor.
        """
        if bounds is not None:
            assert masked_positions is not None and masked_labels is not None
            assert position_ids is not None
            assert cu_seqlens is not None and cu_predictions is not None
            longest, most, num_slots = bounds.tolist()
            layout = Layout(cu_seqlens, cu_predictions, longest, most, self.bert.attention)
            hidden = self.bert.flat(
                input_ids, token_type_ids, position_ids, masked_positions, layout
            )
            return self._flat_loss(hidden, masked_labels, layout, num_slots, next_sentence_label)
        inputs = (input_ids, token_type_ids, lengths, attention_mask)
        if masked_labels is not None:
            assert masked_positions is not None, "labels belong to masked_positions"
            if next_sentence_label is None:
                hidden = self.bert(*inputs, rows=masked_positions, cu_seqlens=cu_seqlens)
                return self._predict(hidden, masked_labels)
            # Position 0 goes before the predicted ones, because the pooler reads [CLS].
            hidden = self.bert(*inputs, rows=F.pad(masked_positions, (1, 0)))
            mlm = self._predict(hidden[:, 1:], masked_labels)
            return self._add_pairs(mlm, self.bert.pooler(hidden[:, 0]), next_sentence_label)
        # Without labels the pooler always runs, so [CLS] is kept here too.
        if masked_positions is None:
            hidden = predicted = self.bert(*inputs, cu_seqlens=cu_seqlens)
        else:
            rows = F.pad(masked_positions, (1, 0))
            hidden = self.bert(*inputs, rows=rows, cu_seqlens=cu_seqlens)
            predicted = hidden[:, 1:]
        logits = self.cls.predictions(predicted)[..., : self.config.vocab_size]
        relationship = self.cls.seq_relationship(self.bert.pooler(hidden[:, 0]))
        return PreTrainingOutput(None, None, None, logits, relationship)

    def _predict(self, hidden: Tensor, labels: Tensor) -> PreTrainingOutput:
        """The MLM head and its loss: hidden [B, P, H], labels [B, P]."""
        return self._loss(self.cls.predictions(hidden), labels)

    def _flat_loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        layout: Layout,
        num_slots: int,
        pairs: Tensor | None,
    ) -> PreTrainingOutput:
        """hidden [R, H] at the queries, labels [R], pairs [B]."""
        mlm = self._predict(hidden[None], labels[None])
        assert mlm.loss is not None
        # It was divided by the number of queries, which differs from batch to batch.
        mlm = mlm._replace(loss=mlm.loss * (len(labels) / num_slots))
        if pairs is None:
            return mlm
        # Each row is a sequence, and its first query is its [CLS].
        first = hidden.index_select(0, layout.cu_predictions[: len(pairs)])
        return self._add_pairs(mlm, self.bert.pooler(first), pairs)

    def _loss(self, logits: Tensor, labels: Tensor) -> PreTrainingOutput:
        """logits [B, P, padded V], labels [B, P]."""
        flat = logits.flatten(0, 1).float()
        targets = labels.flatten()
        summed = F.cross_entropy(flat, targets, ignore_index=IGNORED_LABEL, reduction="sum")
        with torch.no_grad():
            # At every step, also where no log line follows: inductor takes argmax in the same read
            # of the logits as the softmax, and writes no fp32 logits.
            num_correct = (ops.most_likely(flat) == targets).sum()
            num_predicted = (targets != IGNORED_LABEL).sum()
        # All P slots of a sequence count, used or not: P is fixed, so the divisor, and with it the
        # sum of gradients over micro-batches and ranks, is the same for every split of a batch.
        loss = summed / labels.numel()
        return PreTrainingOutput(loss, num_correct, num_predicted, None, None, summed.detach())

    def pair_logits(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """pooled [B, H] -> logits [B, 2]: "B follows A", "B does not follow A"."""
        return self.cls.seq_relationship(pooled)

    def _add_pairs(
        self, mlm: PreTrainingOutput, pooled: Tensor, labels: Tensor
    ) -> PreTrainingOutput:
        logits = self.pair_logits(pooled, labels).float()
        summed = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
        with torch.no_grad():
            counts = (logits.argmax(-1) == labels).sum(), (labels != IGNORED_LABEL).sum()
            sums = torch.stack([summed.detach(), *counts])
        assert mlm.loss is not None
        loss = self.mlm_weight * mlm.loss + summed / len(labels)
        return mlm._replace(loss=loss, pair_sums=sums)


def pad_vocab(config: ModelConfig) -> ModelConfig:
    """`config` with vocab_size rounded up to a multiple of 64, which makes the GEMMs faster.

    Pass the model the real config and `padded_vocab_size=pad_vocab(config).vocab_size`;
    model/weights.py converts state dicts between the two sizes.
    """
    return config.replace(vocab_size=-(-config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE)
