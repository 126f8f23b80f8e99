"""Finding entities in texts: the kind `tag`.

A text becomes one sequence, or a window of it for each part of a long one (windows.py); a token
gets a tag (schemes.py), or with the option head `pointer` every pair of tokens a score for each
type (pointer.py). Answers are characters of the raw text, because tokens keep their offsets.

Guarantees: every token is read; what a tag can't say (an edge inside a token, overlapping entities,
an entity of characters that normalisation drops) is counted and never silent.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clue_ds.data import Tokenizer
from clue_ds.errors import UserError
from clue_ds.model.finetuned import ENTITY_POINTER
from clue_ds.presets import ModelConfig
from clue_ds.tasks import features, records
from clue_ds.tasks.features import Features
from clue_ds.tasks.heads import BertForTokenClassification
from clue_ds.tasks.kinds import answer_lines
from clue_ds.tasks.kinds.base import Answer, Example, Kind, Scores
from clue_ds.tasks.kinds.tag import baselines, column_files, entities, pointer, schemes, scores
from clue_ds.tasks.kinds.tag.custom import CustomTagTask, custom_task
from clue_ds.tasks.kinds.tag.entities import Entity, Label
from clue_ds.tasks.kinds.tag.schemes import IGNORED, Span
from clue_ds.tasks.kinds.tag.windows import Window, windows
from clue_ds.tasks.task import Record, Task

EDGE = "entities whose edges are not edges of tokens; the tokens are trained"
NO_TOKEN = "entities without a token (normalisation drops their characters), not trained"
OVERLAPPING = "entities that overlap a longer one, not trained: a token has one tag"
WINDOWS = "texts longer than max_length, read in several windows"
NO_WINDOW = "entities longer than a window, not trained"
COLUMNS = (("span_f1", "F1 of spans"), ("text_set_f1", "F1 of text sets"))


class Piece(NamedTuple):
    """A window of a text, mostly all of it."""

    rows: tuple[Features, ...]  # one
    size: int
    truncated: bool  # never: a long text has several windows
    window: Window
    offsets: np.ndarray  # int64 [tokens of the window, 2], characters of the text

    @property
    def owned(self) -> slice:
        """The window's own tokens, counted from its first."""
        return slice(
            self.window.own_begin - self.window.begin, self.window.own_end - self.window.begin
        )


class Tag(Kind):
    """The kind `tag`; `task.labels` are the tags, or with the head `pointer` the types."""

    architecture = "BertForTokenClassification"
    columns: tuple[tuple[str, str], ...] = COLUMNS
    keys = CustomTagTask
    usual_fields = ("text",)
    suffixes = (*records.SUFFIXES, *column_files.SUFFIXES)

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.is_pointer = task.options.get("head") == "pointer"
        if self.is_pointer:
            self.architecture = ENTITY_POINTER
        # The main score first.
        self.columns = tuple(sorted(COLUMNS, key=lambda column: column[0] != task.metric))
        self.types = task.labels if self.is_pointer else schemes.types_of(task.labels)
        self.overlapping = task.options.get("overlapping", "refuse")

    @classmethod
    def custom(cls, given: Any, path: Path) -> Task:
        return custom_task(given)

    # ------------------------------------------------------------------------------- reading

    def records(self, path: Path) -> Iterator[tuple[str, Record]]:
        if path.suffix not in column_files.SUFFIXES:
            yield from super().records(path)
            return
        names = self.task.fields[0], self.task.label_field
        for line, record in column_files.records(path, self.types, *names):
            yield f"{path}:{line}", record

    @property
    def num_texts(self) -> int:
        return 1

    def plain(self, texts: Sequence[str], where: str) -> str:
        (text,) = texts
        records.checked(text, where)
        return text

    def text(self, record: Record, where: str) -> str:
        self.require(record, where)
        text = record[self.task.fields[0]]
        records.checked(text, where)
        return text

    def label(self, record: Record, text: str, where: str, notes: Counter[str]) -> Label | None:
        name = self.task.label_field
        if name not in record:
            raise UserError(
                f"{where}: no field {name!r} (has {', '.join(record)}), and no tags; "
                "a file without entities is only good for clue-ds predict"
            )
        found = entities.parse(record[name], text, self.types, where)
        crossing = entities.overlaps(found)
        if crossing and self.overlapping == "refuse":
            one, other = (entities.describe(entity, text) for entity in crossing[0])
            raise UserError(
                f"{where}: {one} and {other} overlap, and a token has one tag; correct the line, "
                "or write in the task's YAML file `overlapping: skip` (train only the longer one) "
                "or `head: pointer` with `overlapping: keep` (find both)"
            )
        return entities.label_of(found, text)

    # -------------------------------------------------------------------------------- inputs

    def encode(self, tokenizer: Tokenizer, text: str, max_length: int) -> list[Piece]:
        ids, offsets = tokenizer.encode_with_offsets(text)
        pieces = []
        for window in windows(len(ids), max_length - 2):
            part = slice(window.begin, window.end)
            row = features.assemble(tokenizer, [ids[part]], max_length)
            pieces.append(Piece((row,), len(row.input_ids), False, window, offsets[part]))
        return pieces

    def targets(self, text: str, label: Label, units: Sequence[Piece]) -> list[np.ndarray]:
        """For each window: the tag ids of its tokens, int64 [tokens], IGNORED where a token belongs
        to another window. With the head `pointer` the entities whose middle belongs to it, int64
        [entities, 3]: type, first and last position in the row."""
        offsets = _offsets(units)
        covered = [schemes.covered(offsets, entity) for entity in self._trained(label)]
        spans = [span for span in covered if span is not None]
        if self.is_pointer:
            return self._pointers(spans, units)
        tags = schemes.encode(len(offsets), _apart(spans), self.task.labels)
        return [_owned_tags(tags, unit) for unit in units]

    def notes(self, text: str, label: Label, units: Sequence[Piece]) -> dict[str, int]:
        offsets, kept = _offsets(units), self._trained(label)
        counts = Counter({WINDOWS: int(len(units) > 1)})
        counts[OVERLAPPING] = len(entities.entities_of(label)) - len(kept)
        for entity in kept:
            span = schemes.covered(offsets, entity)
            if span is None:
                counts[NO_TOKEN] += 1
                continue
            counts[EDGE] += schemes.entity_of(span, offsets) != entity
            belongs = [_belongs(span.first, span.last, unit.window) for unit in units]
            counts[NO_WINDOW] += self.is_pointer and not any(belongs)
        return +counts

    def _trained(self, label: Label) -> list[Entity]:
        """The entities of a label; of those that overlap the longest, unless all are kept."""
        found = entities.entities_of(label)
        return found if self.overlapping == "keep" else entities.without_overlaps(found)

    def _pointers(self, spans: Sequence[Span], units: Sequence[Piece]) -> list[np.ndarray]:
        found = []
        for unit in units:
            shift = 1 - unit.window.begin  # position 0 is [CLS]
            rows = [
                (self.types.index(span.type), span.first + shift, span.last + shift)
                for span in spans
                if _belongs(span.first, span.last, unit.window)
            ]
            found.append(np.array(rows, dtype=np.int64).reshape(-1, 3))
        return found

    # ------------------------------------------------------------------------------- network

    def network(self, config: ModelConfig, seed: int) -> nn.Module:
        if self.is_pointer:
            return pointer.BertForEntityPointer(config, len(self.types), seed)
        return BertForTokenClassification(config, len(self.task.labels), seed)

    def loss(
        self, outputs: Tensor, units: Sequence[Piece], targets: Sequence[np.ndarray]
    ) -> Tensor:
        if self.is_pointer:
            truth = torch.zeros(outputs.shape, dtype=torch.bool)
            for row, target in enumerate(targets):
                kind, first, last = torch.from_numpy(target).unbind(-1)
                truth[row, kind, first, last] = True
            return pointer.loss(outputs, truth.to(outputs.device))
        tags = torch.full(outputs.shape[:2], IGNORED)
        for row, target in enumerate(targets):
            tags[row, 1 : 1 + len(target)] = torch.from_numpy(target)
        flat, wanted = outputs.float().flatten(0, 1), tags.flatten().to(outputs.device)
        summed = F.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum")
        return summed / max(1, self.count(units, targets))

    def count(self, units: Sequence[Piece], targets: Sequence[np.ndarray]) -> int:
        if self.is_pointer:
            return len(units)
        return sum(unit.window.own_end - unit.window.own_begin for unit in units)

    # ------------------------------------------------------------------------------- answers

    def raw(self, outputs: Tensor, units: Sequence[Piece]) -> list[np.ndarray]:
        """For each window float32 [own tokens, 2]: tag id and probability; with the head `pointer`
        [entities, 4]: type, first and last token of the text, score."""
        if self.is_pointer:
            return [_pointed(out, unit) for out, unit in zip(outputs.float(), units, strict=True)]
        probabilities, ids = outputs.float().softmax(-1).max(-1)  # [B, S]
        both = torch.stack([ids.float(), probabilities], dim=-1).cpu().numpy()
        return [
            one[1 : 1 + len(unit.offsets)][unit.owned]
            for one, unit in zip(both, units, strict=True)
        ]

    def answer(self, text: str, units: Sequence[Piece], raws: Sequence[np.ndarray]) -> Answer:
        offsets, raw = _offsets(units), np.concatenate(raws)
        if self.is_pointer:
            scored = self._pointed_entities(offsets, raw)
        else:
            spans = schemes.decode(raw[:, 0].astype(int).tolist(), self.task.labels)
            scored = {
                schemes.entity_of(span, offsets): float(raw[span.first : span.last + 1, 1].mean())
                for span in spans
            }
        found = entities.ordered(scored)
        value = entities.label_of(found, text)
        listed = [
            {
                "type": one.type,
                "text": text[one.start : one.end],
                "start": one.start,
                "end": one.end,
                "score": round(scored[one], 6),
            }
            for one in found
        ]
        return Answer(value, {"label": value, "entities": listed})

    def _pointed_entities(self, offsets: np.ndarray, raw: np.ndarray) -> dict[Entity, float]:
        """Entities with probabilities; unless overlapping ones are kept, the most probable stay."""
        kept: dict[Entity, float] = {}
        for kind, first, last, score in sorted(raw.tolist(), key=lambda row: -row[3]):
            entity = schemes.entity_of(Span(self.types[int(kind)], int(first), int(last)), offsets)
            if self.overlapping == "keep" or not entities.touches(entity, kept):
                kept.setdefault(entity, 1 / (1 + float(np.exp(-score))))
        return kept

    def shown(self, text: str) -> str:
        return repr(text[:40])

    # -------------------------------------------------------------------------------- scores

    def scores(self, examples: Sequence[Example], values: Sequence[Label]) -> Scores:
        return scores.scores([_label(e) for e in examples], values, self.types)

    def baselines(self, train: Sequence[Example], dev: Sequence[Example]) -> dict[str, Scores]:
        known = baselines.lexicon([_label(e) for e in train])
        texts = [str(e.text) for e in dev]
        return {
            baselines.MAJORITY: self.scores(dev, [{} for _ in dev]),
            baselines.LEXICON: self.scores(dev, [baselines.look_up(t, known) for t in texts]),
        }

    def result(
        self, train: Sequence[Example], dev: Sequence[Example], values: Sequence[Label]
    ) -> dict[str, Any]:
        counts = scores.by_type([_label(e) for e in dev], values, self.types)
        return {
            "types": {kind: {"f1": count.f1, **count._asdict()} for kind, count in counts.items()}
        }

    # ----------------------------------------------------------------------------- submission

    def submission(self, examples: Sequence[Example], values: Sequence[Label]) -> str:
        rows = [{"id": number, "label": value} for number, value in enumerate(values)]
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def check(
        self, content: bytes, examples: Sequence[Example], where: str, is_scored: bool
    ) -> tuple[list[Any], list[str]]:
        def wrong_label(number: int, label: Any) -> str | None:
            if number >= len(examples):
                return None  # the number of lines is wrong, which is a mistake of its own
            try:
                entities.parse(label, str(examples[number].text), self.types, "label")
            except UserError as error:
                return str(error)
            return None

        ids = [example.id for example in examples]
        return answer_lines.check(content, ids, where, is_scored, wrong_label)


def _label(example: Example) -> Label:
    assert example.label is not None, "only labelled examples are scored"
    return example.label


def _offsets(units: Sequence[Piece]) -> np.ndarray:
    """The offsets of all tokens of a text, int64 [tokens, 2], from the windows that own them."""
    return np.concatenate([unit.offsets[unit.owned] for unit in units])


def _apart(spans: Sequence[Span]) -> list[Span]:
    """Spans without a token of one before: two entities may have edges inside the same token."""
    kept: list[Span] = []
    for span in spans:
        first = max(span.first, kept[-1].last + 1 if kept else 0)
        if first <= span.last:
            kept.append(span._replace(first=first))
    return kept


def _owned_tags(tags: np.ndarray, unit: Piece) -> np.ndarray:
    window = unit.window
    target = np.full(window.end - window.begin, IGNORED)
    target[unit.owned] = tags[window.own_begin : window.own_end]
    return target


def _belongs(first: int, last: int, window: Window) -> bool:
    """Whether the window holds a span and owns its middle; that is so for at most one window."""
    holds = window.begin <= first and last < window.end
    return holds and window.own_begin <= (first + last) // 2 < window.own_end


def _pointed(scores: Tensor, unit: Piece) -> np.ndarray:
    """The spans of a window with scores [C, S, S] above 0, float32 [entities, 4]."""
    window = unit.window
    if not torch.isfinite(scores).all():
        return np.full((1, 4), np.nan, dtype=np.float32)  # the caller refuses it
    found = (scores > 0).nonzero()
    values = scores[tuple(found.unbind(-1))]
    rows = torch.cat([found.float(), values[:, None]], dim=-1).cpu().numpy()
    rows[:, 1:3] += window.begin - 1  # position 0 is [CLS]
    belongs = [_belongs(int(row[1]), int(row[2]), window) for row in rows]
    return rows[np.array(belongs, dtype=bool)]
