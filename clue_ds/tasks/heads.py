"""The heads that fine-tuning puts on the encoder. Parameters have the names of transformers.

B: sequences   S: positions   H: hidden size   C: classes
"""

from __future__ import annotations

from torch import Tensor, nn

from clue_ds.model import ops
from clue_ds.model.blocks import Dense
from clue_ds.model.encoder import BertModel
from clue_ds.model.init import initialize
from clue_ds.presets import ModelConfig


class BertForSequenceClassification(nn.Module):
    """Predicts a class for each text or pair of texts from the pooled [CLS] vector.

    The last block computes only the [CLS] position. `initialize(model, seed)` sets the weights.
    """

    def __init__(self, config: ModelConfig, num_labels: int, seed: int = 42) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config)
        self.classifier = Dense(config.hidden_size, num_labels)
        initialize(self, seed)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, C] of int64 ids [B, S]."""
        hidden = self.bert.of_lengths(input_ids, token_type_ids, lengths, first_only=True)
        pooled = self.bert.pooler(hidden[:, 0])
        pooled = ops.dropout(pooled, self.config.hidden_dropout_prob, self.training)
        return self.classifier(pooled)


class BertForMultipleChoice(BertForSequenceClassification):
    """Rates each sequence with one logit [B, 1], to be compared with those of the other choices."""

    def __init__(self, config: ModelConfig, seed: int = 42) -> None:
        super().__init__(config, 1, seed)


class BertForTokens(nn.Module):
    """Logits at every position, without the pooler, which transformers' heads for tokens lack."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config)
        del self.bert.pooler

    def hidden(
        self, input_ids: Tensor, token_type_ids: Tensor | None, lengths: Tensor | None
    ) -> Tensor:
        """The last hidden states [B, S, H] of int64 ids [B, S]."""
        return self.bert.of_lengths(input_ids, token_type_ids, lengths)


class BertForQuestionAnswering(BertForTokens):
    """Rates each position as the begin and as the end of the answer."""

    def __init__(self, config: ModelConfig, seed: int = 42) -> None:
        super().__init__(config)
        self.qa_outputs = Dense(config.hidden_size, 2)
        initialize(self, seed)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, S, 2] of int64 ids [B, S]: begin, end."""
        return self.qa_outputs(self.hidden(input_ids, token_type_ids, lengths))


class BertForTokenClassification(BertForTokens):
    """Predicts a class for every token."""

    def __init__(self, config: ModelConfig, num_labels: int, seed: int = 42) -> None:
        super().__init__(config)
        self.classifier = Dense(config.hidden_size, num_labels)
        initialize(self, seed)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, S, C] of int64 ids [B, S]."""
        hidden = self.hidden(input_ids, token_type_ids, lengths)
        hidden = ops.dropout(hidden, self.config.hidden_dropout_prob, self.training)
        return self.classifier(hidden)
