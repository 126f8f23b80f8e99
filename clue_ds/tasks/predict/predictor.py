"""Use a trained model: fill masks, embed and compare texts, predict classes and other answers.

Guarantees: texts are tokenized as the model's corpus was; results come in the order of the texts,
however they were batched; a text that was truncated to the model's length is reported.

`predict` and `embed` only warn that some texts were truncated. To know which ones, take the two
steps separately: `encode` marks each text, `classify` and `pool` compute the results. The verb and
the server use `raws`, which is the same for every kind of task.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from clue_ds import dist
from clue_ds.data import Tokenizer
from clue_ds.errors import UserError
from clue_ds.export import OpenedModel, huggingface, opened
from clue_ds.job import watchdog
from clue_ds.model import BertForPreTraining
from clue_ds.model.encoder import BertModel
from clue_ds.model.finetuned import SINGLE_LABEL, unnamed
from clue_ds.model.weights import TASK_HEADS, lacking, load_into
from clue_ds.tasks import encoded as encodings
from clue_ds.tasks import features, kinds, registry
from clue_ds.tasks.encoded import Encoded
from clue_ds.tasks.features import Unit
from clue_ds.tasks.kinds import Answer, Example, Kind
from clue_ds.tasks.task import Task

MASK = "[MASK]"


class Prediction(NamedTuple):
    """The most probable class and the probability of every class."""

    label: str
    probabilities: dict[str, float]
    truncated: bool = False  # the model did not read the whole text


class NotFinite(UserError):
    """The model's answer to a text has NaN or infinity in it."""


def check_finite(answer: Prediction | np.ndarray, where: str) -> None:
    """Raise NotFinite, which begins with `where`, unless every number of an answer is finite."""
    values = list(answer.probabilities.values()) if isinstance(answer, Prediction) else answer
    if not np.isfinite(values).all():
        raise NotFinite(
            f"{where}: the model's answer is NaN or infinite, because its numbers overflow on this "
            "text; the model is damaged or its training diverged, so use another one"
        )


class Predictor:
    """A model from a run directory, a checkpoint, a Hugging Face directory or a zip, ready for use.

    `task`: a name of `registry.TASKS` or a YAML file; default the task that the model was
    fine-tuned for. `max_length`: most tokens of a text that the model reads; default the length
    that it was fine-tuned with, then the task's, and without a task the model's own limit. The
    model runs on the GPU if there is one. UserError: not a model directory, no vocabulary, a
    different task.
    """

    def __init__(
        self,
        directory: str | Path,
        task: str | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.batch_size = batch_size
        self.device = dist.device()
        with opened(directory) as source:
            self._open(source, task)
        self.max_length = self._max_length(max_length)

    def _open(self, source: OpenedModel, task: str | None) -> None:
        self.config = source.config
        # The vocabulary must have the model's size, or ids would stand for other tokens.
        huggingface.read_tokens(source.vocab_file, source.config.vocab_size)
        self.tokenizer = Tokenizer(source.vocab_file, source.lower_case)
        self.task: Task | None = None
        self.labels: list[str] = []
        self.names: dict[str, str] = {}  # label -> what people read instead; none if they are equal
        self.finetuned = source.finetuned
        self.kind: Kind | None = None  # of a fine-tuned model
        self.network: nn.Module | None = None  # of a fine-tuned model
        self.pretrained: BertForPreTraining | None = None
        self.can_fill_mask = False
        self.missing_of_head: list[str] = []
        if any(name.startswith(TASK_HEADS) for name in source.state_dict):
            self._open_finetuned(source, task)
        elif task is not None:
            raise UserError(
                f"{self.directory} is not fine-tuned, so it has no classes for --task {task}; give "
                "a fine-tuned model, or no task"
            )
        else:
            self._open_pretrained(source)

    @property
    def classifies(self) -> bool:
        """Whether the model is fine-tuned to classify texts or pairs."""
        return self.kind is not None and self.kind.task.kind in ("single", "pair")

    def _max_length(self, given: int | None) -> int:
        positions = self.config.max_position_embeddings
        if given is None:
            trained = self.finetuned.max_length if self.finetuned is not None else None
            of_task = self.task.settings_for(self.config).max_length if self.task else positions
            return min(of_task if trained is None else trained, positions)
        if not 4 <= given <= positions:
            raise UserError(f"max_length {given} must be from 4 to the model's {positions}")
        return given

    def _open_finetuned(self, source: OpenedModel, task: str | None) -> None:
        about = source.finetuned
        assert about is not None
        if about.problem_type not in (None, SINGLE_LABEL):
            raise UserError(
                f"{self.directory} has the problem_type {about.problem_type}, so it gives no "
                "single class for a text; give a model that was fine-tuned to classify texts, or "
                "use transformers"
            )
        own = kinds.trained_task(about) if task in (None, about.task) else None
        usual = own or kinds.unnamed_task(about)
        if kinds.of(usual).has_labels:
            self.labels = list(about.labels)
            self.names = dict(zip(about.labels, about.names, strict=False))
        self._choose_task(about.task, task, about.labels == unnamed(len(about.labels)), own)
        described = self.task or usual
        # The classes are the model's, in its order.
        self.kind = kinds.of(dataclasses.replace(described, labels=tuple(self.labels)))
        if self.kind.architecture != about.architecture:
            raise UserError(
                f"{self.directory} is a {about.architecture}, but {described.name or 'this'} "
                f"needs a {self.kind.architecture}; give a model that was fine-tuned for it, or "
                "use transformers"
            )
        self.network = self.kind.network(source.config, 0)
        missing = load_into(self.network, source.config, source.state_dict, self.directory)
        if missing:
            raise UserError(
                f"{self.directory} has a classifier but no {', '.join(missing)}, so its answers "
                "would come from random weights; use the complete model, or fine-tune it again"
            )
        self.network.eval().to(self.device)
        bert = self.network.bert
        assert isinstance(bert, BertModel)
        self.bert = bert

    def _choose_task(
        self, trained_for: str | None, task: str | None, is_unnamed: bool, own: Task | None
    ) -> None:
        """Set `task`. A model from elsewhere whose labels have no names gets those of the task.

        `own`: the user's own task that the model describes.
        """
        if task is not None and (task in registry.TASKS or task != trained_for):
            self.task = registry.get(task)
        elif trained_for in registry.TASKS:
            self.task = registry.TASKS[trained_for]
        else:
            self.task = own
        if self.task is None:
            return
        if trained_for not in (None, self.task.name, *self.task.answered_by):
            raise UserError(
                f"{self.directory} is fine-tuned for {trained_for!r}, not {self.task.name!r}"
            )
        counts_agree = len(self.labels) == len(self.task.labels)
        if trained_for is None and is_unnamed and self.labels and counts_agree:
            self.labels = list(self.task.labels)
        unknown = sorted(set(self.labels) - set(self.task.labels))
        if unknown:
            raise UserError(
                f"{self.directory} has labels that {self.task.name} does not have: "
                f"{', '.join(unknown)}; give the task that it was fine-tuned for"
            )

    def _open_pretrained(self, source: OpenedModel) -> None:
        self.pretrained = BertForPreTraining(source.config)
        load_into(self.pretrained, source.config, source.state_dict, self.directory)
        self.missing_of_head = lacking(source.config, source.state_dict).get("MLM head", [])
        self.can_fill_mask = not self.missing_of_head
        self.pretrained.eval().to(self.device)
        self.bert = self.pretrained.bert

    @torch.inference_mode()
    def fill_mask(self, text: str, top_k: int = 5) -> list[list[tuple[str, float]]]:
        """For every [MASK] in `text`, the `top_k` most probable tokens with their probabilities."""
        if not self.can_fill_mask:
            lacks = f" (it lacks {', '.join(self.missing_of_head)})" if self.missing_of_head else ""
            raise UserError(
                f"{self.directory} has no masked-language-model head, or an incomplete one"
                f"{lacks}, so it can't fill in masks; give a pretrained model, not a fine-tuned "
                "one or an encoder alone"
            )
        if not 1 <= top_k <= self.config.vocab_size:
            raise UserError(f"top_k {top_k} must be from 1 to {self.config.vocab_size:,}")
        if MASK not in text:
            raise UserError(
                f"there is no {MASK} in the text {text!r}; write one for each token to fill in"
            )
        # The tokenizer treats a special token in a text as plain text, so the text between the
        # masks is encoded and the masks' ids are put in between.
        mask_id = np.array([self.tokenizer.mask_id])
        first, *others = (self.tokenizer.encode(between) for between in text.split(MASK))
        joined = [first] + [ids for other in others for ids in (mask_id, other)]
        feature = features.assemble(self.tokenizer, [np.concatenate(joined)], self.max_length)
        positions = np.flatnonzero(feature.input_ids == self.tokenizer.mask_id)
        if len(positions) != len(others):
            raise UserError(
                f"a {MASK} is beyond the {self.max_length} tokens that the model reads; "
                "shorten the text"
            )
        self._report_truncation([feature])
        inputs = self._inputs([feature])
        assert self.pretrained is not None
        out = self.pretrained(
            **inputs, masked_positions=torch.from_numpy(positions)[None].to(self.device)
        )
        probabilities, ids = out.prediction_logits[0].float().softmax(-1).topk(top_k)  # [masks, k]
        check_finite(probabilities.cpu().numpy(), f"the text {text!r}")
        return [
            [(self.tokenizer.tokens[i], p) for i, p in zip(row_ids, row, strict=True)]
            for row_ids, row in zip(ids.tolist(), probabilities.tolist(), strict=True)
        ]

    def embed(self, texts: Sequence[features.Text]) -> np.ndarray:
        """The mean of the last hidden states over each text's tokens, float32 [texts, H].

        [CLS] and [SEP] are included, as in the mean pooling of sentence-transformers.
        """
        encoded = self.encode(texts)
        self._report_truncation(encoded)
        vectors = self.pool(encoded)
        for number, vector in enumerate(vectors):
            check_finite(vector, f"text {number}")
        return vectors

    def similarity(
        self, first: Sequence[features.Text], second: Sequence[features.Text]
    ) -> np.ndarray:
        """Cosine of the embeddings of first[i] and second[i] for every i, float32 [texts]."""
        if len(first) != len(second):
            raise UserError(f"{len(first)} texts can't be compared one by one with {len(second)}")
        both = self.embed([*first, *second])
        both /= np.maximum(np.linalg.norm(both, axis=1, keepdims=True), 1e-12)
        return (both[: len(first)] * both[len(first) :]).sum(axis=1)

    def predict(self, texts: Sequence[features.Text]) -> list[Prediction]:
        """The class of every text (or pair of texts), from a fine-tuned directory."""
        encoded = self.encode(texts)
        self._report_truncation(encoded)
        predictions = self.classify(encoded)
        for number, prediction in enumerate(predictions):
            check_finite(prediction, f"text {number}")
        return predictions

    def encode(self, texts: Sequence[features.Text]) -> list[features.Features]:
        """The tokens that the model will read of every text, and whether it was truncated."""
        if isinstance(texts, str):
            raise UserError(f"give a list of texts, not the single text {texts!r}")
        return features.encode_all(self.tokenizer, texts, self.max_length)

    def classify(self, encoded: Sequence[features.Features]) -> list[Prediction]:
        """The class of every encoded text. The caller checks that the numbers are finite."""
        if self.kind is None:
            raise UserError(f"{self.directory} has no classifier; fine-tune it first")
        if not self.classifies:
            raise UserError(
                f"{self.directory} is fine-tuned for {self.kind.task.kind}, not to classify texts; "
                "call answers(examples)"
            )
        found = [
            self.kind.answer("", [unit], [raw])
            for unit, raw in zip(encoded, self.raws(encoded), strict=True)
        ]
        return [
            Prediction(answer.value, answer.details["probabilities"], unit.truncated)
            for answer, unit in zip(found, encoded, strict=True)
        ]

    def answers(self, examples: Sequence[Example], where: str = "") -> list[Answer]:
        """The answers to examples of the task, whatever its kind; UserError begins with `where`."""
        encoded = self.encode_examples(examples, where)
        raws = self.raws(encoded.units)
        return self.answers_of(encoded, raws, where)

    def encode_examples(self, examples: Sequence[Example], where: str = "") -> Encoded:
        """Examples of the task as the model reads them."""
        if self.kind is None:
            raise UserError(f"{self.directory} is not fine-tuned; fine-tune it first")
        return encodings.encode(
            self.kind, self.tokenizer, examples, self.max_length, labelled=False, where=where
        )

    def answers_of(self, encoded: Encoded, raws: Sequence[Any], where: str = "") -> list[Answer]:
        """The answers, from the `raws` of all units; NotFinite names the example."""
        assert self.kind is not None
        for number, own in enumerate(encodings.grouped(encoded, raws)):
            place = f"{where}, example" if where else "the text with id"
            for raw in own:
                check_finite(raw, f"{place} {encoded.examples[number].id!r}")
        return encodings.answers(self.kind, encoded, raws)

    @torch.inference_mode()
    def raws(self, units: Sequence[Unit]) -> list[Any]:
        """What the task's kind needs of the network's outputs for each unit (`Kind.raw`)."""
        assert self.kind is not None and self.network is not None
        result: list[Any] = [None] * len(units)
        for rows, inputs in self._batches(units):
            found = self.kind.raw(self.network(**inputs), [units[i] for i in rows])
            for row, raw in zip(rows, found, strict=True):
                result[row] = raw
        return result

    @torch.inference_mode()
    def pool(self, encoded: Sequence[features.Features]) -> np.ndarray:
        """The embedding of every encoded text, float32 [texts, H], not checked to be finite."""
        result = np.empty((len(encoded), self.config.hidden_size), dtype=np.float32)
        for rows, inputs in self._batches(encoded):
            ids, types, lengths = (
                inputs[name] for name in ("input_ids", "token_type_ids", "lengths")
            )
            hidden = self.bert.of_lengths(ids, types, lengths).float()  # [B, S, H]
            lengths = lengths[:, None]
            real = torch.arange(hidden.shape[1], device=self.device) < lengths
            mean = (hidden * real[..., None]).sum(1) / lengths
            result[rows] = mean.cpu().numpy()
        return result

    def _batches(self, units: Sequence[Unit]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """(indices into `units`, inputs) of batches of texts with similar lengths."""
        watch = watchdog.current()
        for rows in features.batches_by_length(units, self.batch_size):
            yield rows, self._inputs([units[i] for i in rows])
            watch.mark()

    def _inputs(self, units: Sequence[Unit]) -> dict[str, Tensor]:
        inputs = features.collate_units(units, self.tokenizer.pad_id)
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def _report_truncation(self, encoded: Sequence[features.Features]) -> None:
        num_truncated = sum(feature.truncated for feature in encoded)
        if num_truncated:
            warnings.warn(
                f"{num_truncated} of {len(encoded)} texts were cut to the {self.max_length} "
                "tokens that the model reads",
                stacklevel=3,
            )
