"""Fine-tune an encoder for a task, and measure it on held-out examples.

The saved directory loads as the class of transformers that the task's kind names, and holds the
epoch that was best on the held-out examples. `fit` is the call for Python: texts and labels in, a
classifier out. loop.py has the training loop, and run.py the directory of a run of
`clue-ds finetune`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from clue_ds import dist
from clue_ds.data import Tokenizer
from clue_ds.errors import UserError
from clue_ds.export import OpenedModel, hub, huggingface
from clue_ds.export.sources import opened
from clue_ds.job import watchdog
from clue_ds.model import finetuned
from clue_ds.model.weights import load_into
from clue_ds.tasks import encoded as encodings
from clue_ds.tasks import kinds, registry
from clue_ds.tasks.examples import Examples
from clue_ds.tasks.features import Text
from clue_ds.tasks.finetune import loop
from clue_ds.tasks.finetune.loop import OnEpoch, OnStep, Outcome, Recipe
from clue_ds.tasks.finetune.state import States
from clue_ds.tasks.kinds import Example, Kind
from clue_ds.tasks.task import Task

LabelledText = tuple[Text, str]
DEFAULT_RECIPE = Recipe()


class FinetuneResult(NamedTuple):
    """How well the best epoch classified the held-out examples."""

    accuracy: float
    predictions: list[str]  # a label for each example of `dev`, in its order
    labels: list[str]
    losses: list[float]  # training loss of each step


def fit(
    model: str | Path,
    train: Sequence[LabelledText],
    dev: Sequence[LabelledText],
    output: str | Path | None = None,
    recipe: Recipe = DEFAULT_RECIPE,
    *,
    from_scratch: bool = False,
    task: str | None = None,
    force: bool = False,
    on_step: OnStep | None = None,
) -> FinetuneResult:
    """Train on (text or pair of texts, label) examples and classify `dev`.

    `model`: a run directory, a checkpoint, a model directory or zip, or a name on the hub. With
    `from_scratch` only its shape and vocabulary are used and training starts from random weights,
    for comparison. `output`: the directory for the fine-tuned model, which records `task` as the
    name of its task; `force` replaces an existing model. `on_step` is called with (step, number of
    steps, loss). UserError: no examples, only one label, a label in `dev` that `train` lacks, bad
    directories.
    """
    labels = _labels(train, dev)
    kind = kinds.of(Task(task or "", "single", (), tuple(labels)))
    with opened(model) as source:
        outcome = fit_source(
            source,
            kind,
            _examples(train),
            _examples(dev),
            recipe,
            name=model,
            output=output,
            task=task,
            from_scratch=from_scratch,
            force=force,
            on_step=on_step,
        )
    return FinetuneResult(outcome.best["accuracy"], outcome.values, labels, outcome.losses)


def _examples(given: Sequence[LabelledText]) -> list[Example]:
    return [Example(number, text, label) for number, (text, label) in enumerate(given)]


def fit_source(
    source: OpenedModel,
    kind: Kind,
    train: Sequence[Example],
    dev: Sequence[Example],
    recipe: Recipe,
    *,
    name: str | Path,
    output: str | Path | None = None,
    task: str | None = None,
    from_scratch: bool = False,
    force: bool = False,
    names: dict[str, str] | None = None,
    data: dict[str, str] | None = None,
    states: States | None = None,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
) -> Outcome:
    """Fine-tune a model that is already open for a task of any kind; messages call it `name`.

    `task`: its name in the saved model. `names`: label -> what people read instead. `data`: split
    -> SHA-256 of its file, for the record. `states` and `on_epoch`: see `loop.train`.
    """
    config = source.config
    if recipe.dropout is not None:
        both = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        config = config.replace(**dict.fromkeys(both, recipe.dropout))
    huggingface.read_tokens(source.vocab_file, config.vocab_size)
    tokenizer = Tokenizer(source.vocab_file, source.lower_case)
    network = kind.network(config, recipe.seed)
    if not from_scratch:
        head = {n for n in network.state_dict() if not n.startswith("bert.")}
        state = {n: t for n, t in source.state_dict.items() if n not in head}
        missing = load_into(network, config, state, name)
        fresh = [n for n in missing if n not in head]
        if fresh and dist.rank() == 0:
            print(f"{name} has no {', '.join(fresh)}, which start from random weights", flush=True)
    network.to(dist.device())
    max_length = min(recipe.max_length, config.max_position_embeddings)
    encoded, held_out = (
        encodings.encode(kind, tokenizer, examples, max_length, where=where)
        for examples, where in ((train, "train"), (dev, "dev"))
    )
    for part, where in ((encoded, "train"), (held_out, "dev")):
        for note, count in part.notes.items() if dist.rank() == 0 else ():
            print(f"{task or name}, {where}: {count:,} {note}", flush=True)
    outcome = loop.train(
        network, kind, encoded, held_out, tokenizer.pad_id, recipe, states, on_step, on_epoch
    )
    with watchdog.current().section("save"):
        if output is not None and dist.rank() == 0:
            num_skipped = dev.num_skipped if isinstance(dev, Examples) else 0
            about = finetuned.describe(
                kind.task.labels,
                names,
                architecture=kind.architecture,
                task=task,
                max_length=max_length,
                # A path of this machine is nobody else's business.
                base=str(name) if hub.is_name(name) else Path(name).name,
                recipe=dataclasses.asdict(recipe),
                dev=outcome.best,
                data=data or {},
                options=kind.task.options,
                reads=kinds.reads(kind.task) if _is_own(kind.task) else {},
                from_scratch=from_scratch,
                examples={"train": len(train), "dev": len(dev) + num_skipped},
            )
            weights, vocab_file = network.state_dict(), source.vocab_file
            lower_case = source.lower_case
            huggingface.write(config, weights, vocab_file, output, lower_case, force, about)
        dist.barrier()
    return outcome


def _is_own(task: Task) -> bool:
    """Whether a task is from a user's YAML file. The texts of `fit` have no fields."""
    return bool(task.fields) and task.name not in registry.TASKS


def _labels(train: Sequence[LabelledText], dev: Sequence[LabelledText]) -> list[str]:
    """The labels of the training examples, sorted."""
    if not train or not dev:
        raise UserError("there are no examples to train on, or none to measure with; give both")
    labels = sorted({label for _, label in train})
    if len(labels) < 2:
        raise UserError(
            f"every training example has the label {labels[0]!r}; give two or more labels"
        )
    unknown = sorted({label for _, label in dev} - set(labels))
    if unknown:
        raise UserError(
            f"labels {unknown} are in dev but not in train, which has {labels}; give training "
            "examples of them"
        )
    return labels
