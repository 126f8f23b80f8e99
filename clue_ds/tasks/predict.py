"""A trained model at work: fill masks, embed texts, predict classes.

Guarantees: the tokenizer is the one the corpus was made with; results come in the order of the
texts however they were batched; a text that was cut to the model's length is reported.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from clue_ds.data import Tokenizer
from clue_ds.errors import UserError
from clue_ds.export import Source, huggingface, open_model
from clue_ds.model import BertForPreTraining
from clue_ds.model.weights import PREDICTION_BIAS, load_into, read_config_json
from clue_ds.tasks import features
from clue_ds.tasks.heads import BertForSequenceClassification

MASK = "[MASK]"


class Prediction(NamedTuple):
    """A class and the probability of every class."""

    label: str
    probabilities: dict[str, float]


class Predictor:
    """A model from a run directory, a checkpoint or a Hugging Face directory, ready to answer.

    `task`: what the directory must have been fine-tuned for, if anything. It works on the GPU when
    there is one. UserError: not a model directory, no vocabulary, another task.
    """

    def __init__(
        self, directory: str | Path, task: str | None = None, batch_size: int = 32
    ) -> None:
        self.directory = Path(directory)
        self.batch_size = batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        source = open_model(directory)
        self.config = source.config
        # Its lines must be the model's words, or every id would mean another token.
        huggingface.read_tokens(source.vocab_file, source.config.vocab_size)
        self.tokenizer = Tokenizer(source.vocab_file, source.lower_case)
        self.labels: list[str] = []
        self.classifier: BertForSequenceClassification | None = None
        self.pretrained: BertForPreTraining | None = None
        if huggingface.CLASSIFIER_WEIGHT in source.state_dict:
            self._open_classifier(source, task)
        elif task is not None:
            raise UserError(f"{directory} is not fine-tuned, so not for {task!r} either")
        else:
            self._open_pretrained(source)

    def _open_classifier(self, source: Source, task: str | None) -> None:
        values = read_config_json(self.directory)
        trained_for = values.get("finetuning_task")
        if task not in (None, trained_for):
            raise UserError(f"{self.directory} is fine-tuned for {trained_for!r}, not {task!r}")
        num_labels = len(source.state_dict[huggingface.CLASSIFIER_WEIGHT])
        names = values.get("id2label", {})
        self.labels = [str(names.get(str(i), f"LABEL_{i}")) for i in range(num_labels)]
        self.classifier = BertForSequenceClassification(source.config, num_labels)
        load_into(self.classifier, source.config, source.state_dict, self.directory)
        self.classifier.eval().to(self.device)
        self.bert = self.classifier.bert

    def _open_pretrained(self, source: Source) -> None:
        self.has_mlm_head = PREDICTION_BIAS in source.state_dict
        self.pretrained = BertForPreTraining(source.config)
        load_into(self.pretrained, source.config, source.state_dict, self.directory)
        self.pretrained.eval().to(self.device)
        self.bert = self.pretrained.bert

    @torch.inference_mode()
    def fill_mask(self, text: str, top_k: int = 5) -> list[list[tuple[str, float]]]:
        """For every [MASK] in `text`, its `top_k` likeliest tokens with their probabilities."""
        if self.pretrained is None or not self.has_mlm_head:
            raise UserError(
                f"{self.directory} has no masked-language-model head, so it can't fill masks; "
                "give a pretrained model, not a fine-tuned one or an encoder alone"
            )
        if not 1 <= top_k <= self.config.vocab_size:
            raise UserError(f"top_k {top_k} must be from 1 to {self.config.vocab_size:,}")
        if MASK not in text:
            raise UserError(
                f"there is no {MASK} in the text {text!r}; write it where a token is wanted"
            )
        # The tokenizer treats special tokens in a text as text, so the masks go in by hand.
        mask_id = np.array([self.tokenizer.mask_id])
        pieces = [self.tokenizer.encode(part) for part in text.split(MASK)]
        joined = [pieces[0]] + [part for piece in pieces[1:] for part in (mask_id, piece)]
        feature = features.assemble(
            self.tokenizer, [np.concatenate(joined)], self.config.max_position_embeddings
        )
        positions = np.flatnonzero(feature.input_ids == self.tokenizer.mask_id)
        if len(positions) != len(pieces) - 1:
            raise UserError(
                f"a {MASK} lies beyond the {self.config.max_position_embeddings} tokens that the "
                "model reads; shorten the text"
            )
        self._report_truncation([feature])
        inputs = self._inputs([feature])
        out = self.pretrained(
            **inputs, masked_positions=torch.from_numpy(positions)[None].to(self.device)
        )
        probabilities, ids = out.prediction_logits[0].float().softmax(-1).topk(top_k)  # [masks, k]
        return [
            [(self.tokenizer.tokens[i], p) for i, p in zip(row_ids, row, strict=True)]
            for row_ids, row in zip(ids.tolist(), probabilities.tolist(), strict=True)
        ]

    @torch.inference_mode()
    def embed(self, texts: Sequence[features.Text]) -> np.ndarray:
        """Mean of the last hidden states over each text's tokens, float32 [texts, H].

        [CLS] and [SEP] count, as in sentence-transformers' mean pooling.
        """
        result = np.empty((len(texts), self.config.hidden_size), dtype=np.float32)
        for rows, inputs in self._batches(texts):
            hidden = self.bert(**inputs).float()  # [B, S, H]
            lengths = inputs["lengths"][:, None]
            real = torch.arange(hidden.shape[1], device=self.device) < lengths
            mean = (hidden * real[..., None]).sum(1) / lengths
            result[rows] = mean.cpu().numpy()
        return result

    @torch.inference_mode()
    def predict(self, texts: Sequence[features.Text]) -> list[Prediction]:
        """The class of every text (or pair of texts), from a fine-tuned directory."""
        if self.classifier is None:
            raise UserError(f"{self.directory} has no classifier; fine-tune it first")
        result: list[Prediction] = [Prediction("", {})] * len(texts)
        for rows, inputs in self._batches(texts):
            probabilities = self.classifier(**inputs).float().softmax(-1).tolist()  # [B, C]
            for row, values in zip(rows, probabilities, strict=True):
                named = dict(zip(self.labels, values, strict=True))
                result[row] = Prediction(max(named, key=named.__getitem__), named)
        return result

    def _batches(self, texts: Sequence[features.Text]) -> list[tuple[list[int], dict[str, Tensor]]]:
        """(indices into texts, inputs) of every batch, texts of like length together."""
        if isinstance(texts, str):
            raise UserError(f"give a list of texts, not the text {texts!r} alone")
        max_length = self.config.max_position_embeddings
        encoded = [features.encode(self.tokenizer, text, max_length) for text in texts]
        self._report_truncation(encoded)
        groups = features.batches_by_length(encoded, self.batch_size)
        return [(rows, self._inputs([encoded[i] for i in rows])) for rows in groups]

    def _inputs(self, encoded: Sequence[features.Features]) -> dict[str, Tensor]:
        inputs = features.collate(encoded, self.tokenizer.pad_id)
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def _report_truncation(self, encoded: Sequence[features.Features]) -> None:
        num_truncated = sum(feature.truncated for feature in encoded)
        if num_truncated:
            warnings.warn(
                f"{num_truncated} of {len(encoded)} texts were cut to the "
                f"{self.config.max_position_embeddings} tokens that the model reads",
                stacklevel=4,
            )


def predict(model: Path, fill_mask: tuple[str, ...], top_k: int = 5) -> None:
    """Fill the masks of texts with a trained model.

    Args:
        model: a run directory, one of its checkpoints, or a Hugging Face directory.
        fill_mask: texts with [MASK] where a token is wanted, each as one argument.
        top_k: candidates shown for each mask.
    """
    predictor = Predictor(model)
    console = Console()
    for text in fill_mask:
        candidates = predictor.fill_mask(text, top_k)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        table = Table()
        for number in range(1, len(candidates) + 1):
            table.add_column(MASK if len(candidates) == 1 else f"{MASK} {number}")
        for row in zip(*candidates, strict=True):
            table.add_row(*(Text(f"{token} {100 * p:5.1f}%") for token, p in row))
        console.print(table)
