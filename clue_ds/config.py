"""One run, described in one typed object: a YAML file plus overrides on the command line.

Guarantees: an unknown key, a wrong type and a number out of range are errors that name the key and,
for a misspelled one, the key that was probably meant; what `save` writes, `load` reads back equal.
pydantic checks, tyro makes the command line and its help from the same descriptions. Numbers that
follow from others (gradient_accumulation_steps, predictions_per_sequence) are methods, not fields.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from clue_ds import presets
from clue_ds.data import sampling
from clue_ds.errors import UserError, existing_file
from clue_ds.presets import Attention, HiddenAct, Kernels, ModelConfig


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


AnySection = TypeVar("AnySection", bound=Section)


class ModelSection(Section):
    """Which network, and where its weights come from."""

    preset: str = Field("roberta_tiny_clue", description="shape: " + ", ".join(presets.NAMES))
    num_hidden_layers: int | None = Field(None, ge=1, description="instead of the preset's")
    hidden_size: int | None = Field(None, ge=1, description="instead of the preset's")
    num_attention_heads: int | None = Field(None, ge=1, description="instead of the preset's")
    intermediate_size: int | None = Field(None, ge=1, description="instead of the preset's")
    max_position_embeddings: int | None = Field(None, ge=2, description="instead of the preset's")
    hidden_act: HiddenAct | None = Field(
        None, description="gelu (erf, Hugging Face's) or gelu_new (tanh, TensorFlow BERT's)"
    )
    hidden_dropout_prob: float | None = Field(None, ge=0, lt=1, description="instead of 0.1")
    attention_probs_dropout_prob: float | None = Field(
        None, ge=0, lt=1, description="instead of 0.1"
    )
    initializer_range: float | None = Field(
        None,
        gt=0,
        description="deviation of fresh weights, instead of 0.02; small networks want more",
    )
    init: str | None = Field(
        None, description="start from this run, model directory (or zip), or name on the hub"
    )
    attention: Attention = Field(
        "sdpa", description="sdpa (torch's fused attention) or masked_softmax (the reference path)"
    )
    kernels: Kernels = Field(
        "torch", description="fused operations: torch, or triton, or auto (triton on a GPU)"
    )
    compile: bool = Field(False, description="torch.compile every block (needs a C++ compiler)")

    def resolve(self, vocab_size: int) -> ModelConfig:
        """The preset with this section's overrides and the vocabulary's size."""
        names = ModelConfig.__dataclass_fields__.keys() & type(self).model_fields.keys()
        changes = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        return presets.get(self.preset).replace(vocab_size=vocab_size, **changes)


class DataSection(Section):
    """What is read: a corpus made by `clue-ds shard`, and how it becomes samples."""

    corpus: str = Field(
        description="directory written by `clue-ds shard`; train.objective pair takes only its "
        "vocabulary, so a model directory will do"
    )
    samples: sampling.RowKind = Field(
        "windows",
        description="windows (fixed length, across everything), sentences (whole ones, across "
        "documents), documents (whole sentences of one), packed (several documents a row, "
        "attention inside each); train.objective nsp and sop make pairs instead",
    )
    pairs: list[str] = Field(
        [], description="train.objective pair: JSON lines with sentence1, sentence2, label"
    )
    held_out: str | None = Field(
        None,
        description="corpus (for train.objective pair, a file of pairs) to evaluate on; default: "
        "CORPUS/held_out where there is one",
    )
    mixture: dict[str, float] = Field(
        {}, description="further corpora: directory -> share of the samples; corpus has the rest"
    )
    order: sampling.Order = Field(
        "auto",
        description="of samples: shuffle (random reads), lanes (sequential reads, for a corpus "
        "beyond memory), auto (lanes above 8 GiB)",
    )
    seq_length: int = Field(128, ge=8, description="tokens a sequence, [CLS] and [SEP] included")
    whole_word: bool = Field(True, description="mask whole words (the marks are in the shards)")
    max_ngram: int = Field(
        1, ge=1, le=8, description="mask runs of 1 to this many words, a run of k as often as 1/k"
    )
    mask_prob: float = Field(0.15, gt=0, lt=1, description="share of tokens that are predicted")
    predictions_per_sequence: int | None = Field(
        None, ge=1, description="fixed number of predictions; default ceil(mask_prob * seq_length)"
    )

    def num_predictions(self) -> int:
        """Predictions a sequence: 20 at length 128, 77 at 512."""
        if self.predictions_per_sequence is not None:
            return self.predictions_per_sequence
        return sampling.num_predictions(self.seq_length, self.mask_prob)


class TrainSection(Section):
    """How the weights move."""

    objective: sampling.Objective = Field(
        "mlm",
        description="mlm, or beside it: nsp (does B follow A), sop (are A and B in order), "
        "pair (labelled pairs from data.pairs)",
    )
    mlm_weight: float = Field(
        1.0, gt=0, description="of the MLM loss beside that of nsp, sop or pair"
    )
    steps: int = Field(100_000, ge=1, description="optimizer steps")
    global_batch_size: int = Field(256, ge=1, description="sequences an optimizer step, all ranks")
    micro_batch_size: int = Field(32, ge=1, description="sequences a forward pass on one rank")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of weights in use")
    optimizer: Literal["adamw", "lamb"] = Field("adamw", description="lamb needs ZeRO stage 0")
    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1e-6, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.01, ge=0, description="decoupled; not on LayerNorm and biases")
    gradient_clipping: float = Field(1.0, ge=0, description="largest gradient norm; 0 = no limit")
    schedule: Literal["linear", "cosine", "wsd"] = Field(
        "linear", description="decay after warm-up; wsd: stable, then linear over decay_steps"
    )
    warmup_steps: int = Field(1_000, ge=0, description="steps from 0 to the peak learning rate")
    decay_steps: int = Field(0, ge=0, description="wsd only: steps of the final decay")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="last learning rate / peak")

    @model_validator(mode="after")
    def _check_schedule(self) -> TrainSection:
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} + decay_steps {self.decay_steps} exceed "
                f"steps {self.steps}"
            )
        if self.schedule != "wsd" and self.decay_steps:
            raise ValueError(f"decay_steps is for schedule wsd; {self.schedule} has no use for it")
        return self

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Forward passes a step on each rank; a UserError if the batch sizes don't divide."""
        per_pass = self.micro_batch_size * world_size
        if self.global_batch_size % per_pass:
            below = self.global_batch_size // per_pass * per_pass
            nearest = " or ".join(str(n) for n in (below, below + per_pass) if n)
            raise UserError(
                f"train.global_batch_size {self.global_batch_size} is not divisible by "
                f"train.micro_batch_size {self.micro_batch_size} x {world_size} ranks = "
                f"{per_pass}; set train.global_batch_size to {nearest}, "
                "or change train.micro_batch_size"
            )
        return self.global_batch_size // per_pass


class EvaluateSection(Section):
    """How often the run is measured on held-out text, and on how much of it."""

    every: int = Field(1_000, ge=1, description="steps between evaluations; the last step has one")
    batches: int = Field(20, ge=1, description="global batches of an evaluation, or all there are")


class CheckpointSection(Section):
    """When the run is saved."""

    every: int = Field(1_000, ge=1, description="steps between checkpoints; the last step is saved")
    keep: int = Field(2, ge=1, description="newest checkpoints kept; older ones are deleted")


class LogSection(Section):
    """What is written while it runs."""

    every: int = Field(10, ge=1, description="steps between log lines")
    tensorboard: bool = Field(True, description="write RUN/tensorboard")


class HealthSection(Section):
    """How long ranks wait for each other before the job ends with a message."""

    start_seconds: float = Field(60, gt=0, description="until every rank has answered at start")
    beat_seconds: float = Field(60, ge=10, description="until a rank that says nothing is given up")
    step_seconds: float = Field(
        100,
        gt=0,
        description="until a step without an end, or anything else without progress, is a hang",
    )
    setup_seconds: float = Field(
        900, gt=0, description="until reading, building or compiling one thing is a hang, busy too"
    )
    save_seconds: float = Field(
        900, gt=0, description="until writing or evaluating one thing is a hang, busy too"
    )


DEFAULT_HEALTH = HealthSection()


class RunConfig(Section):
    """Pretrain an encoder on a corpus: everything that one run needs to know."""

    run_dir: str = Field(description="directory that will hold everything this run writes")
    seed: int = Field(42, ge=0, description="of weights, sample order, masks and dropout")
    deepspeed: str = Field(
        "zero1", description="zero0|zero1|zero2|zero3|zero1_offload, or a DeepSpeed JSON of yours"
    )
    data: DataSection
    model: ModelSection = ModelSection()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    health: HealthSection = DEFAULT_HEALTH

    @model_validator(mode="after")
    def _check_objective(self) -> RunConfig:
        objective, data = self.train.objective, self.data
        if objective != "mlm" and data.samples != "windows":
            raise ValueError(
                f"train.objective {objective} makes pairs; data.samples {data.samples} is for mlm"
            )
        if (objective == "pair") != bool(data.pairs):
            raise ValueError("data.pairs (files) and train.objective pair belong together")
        if objective == "mlm" and self.train.mlm_weight != 1.0:
            raise ValueError("train.mlm_weight is for the objectives nsp, sop and pair")
        return self


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names of the section in which the last part of `location` was written."""
    for part in location[:-1]:
        if part not in model.model_fields:
            return []
        annotation = model.model_fields[str(part)].annotation
        candidates = [c for c in (annotation, *get_args(annotation)) if isinstance(c, type)]
        sections = [c for c in candidates if issubclass(c, BaseModel)]
        if not sections:
            return []
        model = sections[0]
    return list(model.model_fields)


def explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """One line a mistake, each with its key; a misspelled key gets a suggestion."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _known_keys(model, item["loc"])
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            prefix = key.rpartition(".")[0]
            meant = ".".join(filter(None, (prefix, near[0]))) if near else None
            hint = f"did you mean {meant}?" if meant else f"known keys: {', '.join(known)}"
            lines.append(f"unknown key {key}; {hint}")
        elif item["type"] == "missing":
            lines.append(f"missing key {key}")
        else:
            given = "" if item["type"] == "value_error" else f" (got {item['input']!r})"
            lines.append(f"{key}: {item['msg'].removeprefix('Value error, ')}{given}")
    return f"{where}: " + "; ".join(lines)


def validate_section(section: type[AnySection], values: dict[str, Any], where: str) -> AnySection:
    """Build a section from nested dicts; a UserError starting with `where` lists all mistakes."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, section, where)) from None


def validate(values: dict[str, Any], where: str) -> RunConfig:
    """Build a RunConfig from nested dicts; a UserError starting with `where` lists all mistakes."""
    return validate_section(RunConfig, values, where)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, or a UserError with file and line."""
    path = existing_file(path, "config file")
    try:
        # YAML 1.1 reads 1e-4 as text; pydantic turns it into the number that was meant.
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"config file {path} must hold `key: value` lines, not {values!r}")
    return values


def load(path: str | Path) -> RunConfig:
    """Read and check a run's YAML file."""
    return validate(read_yaml(path), str(path))


def parse(argv: list[str], prog: str) -> RunConfig:
    """A RunConfig from `[--config FILE] [--section.key value ...]`; later values win.

    tyro prints help and argument errors itself and leaves with SystemExit.
    """
    import tyro

    only_config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_config.add_argument("--config")
    known, overrides = only_config.parse_known_args(argv)
    default = tyro.MISSING if known.config is None else _tyro_default(known.config)
    return tyro.cli(
        RunConfig,
        prog=prog,
        description=(
            f"{RunConfig.__doc__} Give them in a YAML file (--config RUN.yaml), nested by their "
            "dots, or here; what is given here wins."
        ),
        args=overrides,
        default=default,
        config=(tyro.conf.FlagConversionOff,),
        use_underscores=True,
    )


def _tyro_default(path: str) -> Any:
    """The checked file; a required key that it leaves out stays required on the command line."""
    import tyro

    values = read_yaml(path)
    data = values.get("data")
    no_corpus = data is None or (isinstance(data, dict) and "corpus" not in data)
    no_run_dir = "run_dir" not in values
    if no_corpus:
        values["data"] = {**(data or {}), "corpus": "?"}
    config = validate({"run_dir": "?", **values}, str(path))
    if no_corpus:
        section = config.data.model_copy(update={"corpus": tyro.MISSING})
        config = config.model_copy(update={"data": section})
    return config.model_copy(update={"run_dir": tyro.MISSING}) if no_run_dir else config


def flatten(
    values: dict[str, Any], keep: Set[str] = frozenset(), prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested dicts; the dicts at the keys in `keep` stay whole."""
    for key, value in values.items():
        if isinstance(value, dict) and prefix + key not in keep:
            yield from flatten(value, keep, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def save(config: RunConfig, path: str | Path) -> None:
    """Write every key, defaults included, as YAML."""
    text = yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")
