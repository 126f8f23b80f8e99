"""The config of a run: one typed object from a YAML file.

Guarantees: an unknown key, a wrong type and a number out of range are errors that name the key and,
for a misspelled key, the one that was probably meant; `load` reads back exactly what `save` wrote.
pydantic checks the values, and command_line.py makes the options from the descriptions below.
Numbers that follow from others (gradient accumulation steps, for example) are methods, not fields.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    model_validator,
)

from clue_ds import presets
from clue_ds.data import sampling
from clue_ds.errors import UserError
from clue_ds.presets import Attention, HiddenAct, Kernels, ModelConfig
from clue_ds.settings import batch_sizes, paths, yaml_file
from clue_ds.settings.mistakes import explain
from clue_ds.settings.phases import Phase, check_order, parts
from clue_ds.settings.sections import (
    DEFAULT_HEALTH,
    CheckpointSection,
    EvaluateSection,
    HealthSection,
    LogSection,
    Section,
)

# A path whose `~` and `$NAME` are replaced when the config is read.
PathText = Annotated[str, AfterValidator(paths.expand)]
AnySection = TypeVar("AnySection", bound=Section)


class ModelSection(Section):
    """The network, and where its weights come from."""

    preset: str = Field(
        "roberta_tiny_clue", description="shape of the network: " + ", ".join(presets.NAMES)
    )
    num_hidden_layers: int | None = Field(None, ge=1, description="replaces the preset's value")
    hidden_size: int | None = Field(None, ge=1, description="replaces the preset's value")
    num_attention_heads: int | None = Field(None, ge=1, description="replaces the preset's value")
    intermediate_size: int | None = Field(None, ge=1, description="replaces the preset's value")
    max_position_embeddings: int | None = Field(
        None, ge=2, description="replaces the preset's value"
    )
    hidden_act: HiddenAct | None = Field(
        None, description="gelu (erf, Hugging Face's) or gelu_new (tanh, TensorFlow BERT's)"
    )
    hidden_dropout_prob: float | None = Field(None, ge=0, lt=1, description="replaces 0.1")
    attention_probs_dropout_prob: float | None = Field(None, ge=0, lt=1, description="replaces 0.1")
    initializer_range: float | None = Field(
        None,
        gt=0,
        description="standard deviation of initial weights, replaces 0.02",
    )
    init: PathText | None = Field(
        None, description="start from the weights of this run, model directory (or zip) or hub name"
    )
    attention: Attention = Field(
        "sdpa", description="sdpa (torch's fused attention) or masked_softmax (the reference path)"
    )
    kernels: Kernels = Field(
        "auto",
        description="fused operations: torch, or triton, or auto (on a GPU triton for every "
        "operation whose kernel agrees with torch there, else torch)",
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="apply torch.compile to embeddings, blocks, and the MLM head with its loss; "
        "auto: on a CUDA device at ZeRO 0 to 2 (the first step then takes half a minute longer)",
    )

    def resolve(self, vocab_size: int) -> ModelConfig:
        """The preset with the values of this section and this vocabulary size."""
        names = ModelConfig.__dataclass_fields__.keys() & type(self).model_fields.keys()
        changes = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        return presets.get(self.preset).replace(vocab_size=vocab_size, **changes)


class DataSection(Section):
    """The training data, and how samples are made from it."""

    corpus: PathText = Field(
        description="directory written by `clue-ds shard`; train.objective pair uses only its "
        "vocabulary, so it also accepts a model directory"
    )
    samples: sampling.RowKind = Field(
        "windows",
        description="what one row holds: windows (seq_length tokens, across sentences and "
        "documents), sentences (whole sentences, across documents), documents (whole sentences of "
        "one document), packed (several documents, each attending only to itself); "
        "train.objective nsp and sop make pairs instead",
    )
    padding: Literal["auto", "keep", "remove"] = Field(
        "auto",
        description="padding behind the last token of a row: remove (rows lie end to end in one "
        "buffer), keep, or auto (remove where rows differ in length or hold several documents, and "
        "on a GPU with kernels)",
    )
    pairs: list[PathText] = Field(
        [], description="for objective pair: files of JSON lines with sentence1, sentence2, label"
    )
    held_out: PathText | None = Field(
        None,
        description="corpus to evaluate on (for train.objective pair, a file of pairs); default: "
        "CORPUS/held_out if it exists",
    )
    mixture: dict[PathText, float] = Field(
        {}, description="further corpora: directory -> share of samples; data.corpus has the rest"
    )
    order: sampling.Order = Field(
        "auto",
        description="order of the samples: shuffle (random reads), lanes (sequential reads, for a "
        "corpus larger than memory), auto (lanes for a corpus above 8 GiB)",
    )
    seq_length: int = Field(128, ge=8, description="tokens per sequence, including [CLS] and [SEP]")
    whole_word: bool = Field(True, description="mask whole words, as marked in the shards")
    max_ngram: int = Field(
        1, ge=1, le=8, description="mask runs of 1 to this many words, k words with weight 1/k"
    )
    mask_prob: float = Field(0.15, gt=0, lt=1, description="share of the tokens that are predicted")
    predictions_per_sequence: int | None = Field(
        None, ge=1, description="a fixed number; default: ceil(mask_prob * seq_length)"
    )

    def num_predictions(self) -> int:
        """Predictions per sequence: 20 at length 128, 77 at 512."""
        if self.predictions_per_sequence is not None:
            return self.predictions_per_sequence
        return sampling.num_predictions(self.seq_length, self.mask_prob)


class TrainSection(Section):
    """Objective, batch sizes, optimizer and learning rate."""

    objective: sampling.Objective = Field(
        "mlm",
        description="mlm, or mlm together with nsp (does B follow A?), sop (are A and B in order?) "
        "or pair (labelled pairs from data.pairs)",
    )
    mlm_weight: float = Field(
        1.0, gt=0, description="weight of the MLM loss when nsp, sop or pair adds its own loss"
    )
    steps: int = Field(100_000, ge=1, description="number of optimizer steps")
    global_batch_size: int = Field(
        256, ge=1, description="sequences per optimizer step, all ranks together"
    )
    micro_batch_size: batch_sizes.MicroBatch = Field(
        "auto",
        description="sequences per forward pass on one rank; auto: that of the checkpoint if the "
        "run continues, else the largest power of two that divides global_batch_size / ranks and "
        "fits into every GPU's memory (on a CPU: up to 32)",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="type of the weights in forward and backward passes; auto: that of the "
        "checkpoint if the run continues, else bf16 if every rank's device is fast in it, else "
        "fp32",
    )
    optimizer: Literal["adamw", "lamb", "muon"] = Field(
        "adamw", description="muon: for the encoder's matrices, beside adamw; lamb: at ZeRO stage 0"
    )
    lr: float = Field(1e-4, gt=0, description="peak learning rate; with muon that of the matrices")
    adamw_lr: float | None = Field(
        None, gt=0, description="muon only: peak learning rate of all other weights; default: lr/2"
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="decay rate of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay rate of the second moment")
    eps: float = Field(1e-6, gt=0, description="added to the square root of the second moment")
    weight_decay: float = Field(
        0.01, ge=0, description="decoupled weight decay, except on LayerNorm and biases"
    )
    gradient_clipping: float = Field(1.0, ge=0, description="maximum gradient norm; 0: no limit")
    schedule: Literal["linear", "cosine", "wsd"] = Field(
        "linear", description="decay after warm-up; wsd: constant, then linear over decay_steps"
    )
    warmup_steps: int = Field(1_000, ge=0, description="steps from 0 to the peak learning rate")
    decay_steps: int = Field(0, ge=0, description="wsd only: number of steps of the final decay")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="final learning rate divided by lr")
    cuda_graph: Literal["auto", "on", "off"] = Field(
        "auto",
        description="replay forward and backward passes as CUDA graphs, at ZeRO 0 to 2: auto (on "
        "one GPU), on (on several, too, which has not been tried yet), or off",
    )
    on_nan: Literal["stop", "skip"] = Field(
        "stop", description="what follows a step whose gradient is inf or nan; it updates nothing"
    )
    max_skipped_steps: int = Field(3, ge=1, description="on_nan skip: this many in a row at most")
    on_spike: Literal["warn", "stop", "rollback"] = Field(
        "warn",
        description="what follows a loss far above those before it; rollback: a checkpoint from "
        "before it is loaded, and the batches around it are skipped",
    )
    spike_window: int = Field(100, ge=10, description="number of steps that a loss is compared to")
    spike_zscore: float = Field(
        6.0, gt=0, description="a spike is this many standard deviations above their mean"
    )
    rollback_steps: int = Field(100, ge=0, description="batches to skip before that of a spike")
    rollback_batches: int = Field(200, ge=1, description="batches to skip from that of a spike on")
    max_rollbacks: int = Field(3, ge=1, description="on_spike rollback: this many in a run at most")
    profile: list[int] = Field(
        [], description="first and last step to record with torch's profiler, in RUN/profile"
    )

    @model_validator(mode="after")
    def _check_combinations(self) -> TrainSection:
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} + decay_steps {self.decay_steps} exceed "
                f"steps {self.steps}; lower them, or raise steps"
            )
        if self.schedule != "wsd" and self.decay_steps:
            raise ValueError(
                f"decay_steps applies only to schedule wsd, not to {self.schedule}; remove it"
            )
        if self.optimizer != "muon" and self.adamw_lr is not None:
            raise ValueError("adamw_lr applies only to optimizer muon; set lr and remove adamw_lr")
        bounds = [1, *self.profile, self.steps]
        if self.profile and (len(self.profile) != 2 or bounds != sorted(bounds)):
            raise ValueError(
                f"profile {self.profile} must be the first and the last step to record, of steps 1 "
                f"to {self.steps}"
            )
        return self

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Micro-batches per step on each rank; a UserError if the batch sizes don't divide."""
        return batch_sizes.num_micro_batches(self.global_batch_size, self.micro_batch(), world_size)

    def micro_batch(self) -> int:
        """micro_batch_size as a number; pretrain/auto has replaced `auto` before."""
        assert self.micro_batch_size != "auto"
        return self.micro_batch_size

    def share(self, world_size: int) -> int:
        """Sequences per step on each rank; a UserError if the ranks don't divide the batch."""
        return batch_sizes.num_micro_batches(self.global_batch_size, 1, world_size)


class RunConfig(Section):
    """Pretrain an encoder on a corpus. These are all the settings of a run."""

    run_dir: PathText = Field(description="directory for everything that this run writes")
    seed: int = Field(
        42, ge=0, description="seed of initial weights, sample order, masks and dropout"
    )
    deepspeed: PathText = Field(
        "zero1", description="zero0|zero1|zero2|zero3|zero1_offload, or a path to a DeepSpeed JSON"
    )
    extend: bool = Field(
        False,
        description="let a run go on to a raised train.steps under linear or cosine, too",
    )
    data: DataSection
    model: ModelSection = ModelSection()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    health: HealthSection = DEFAULT_HEALTH
    phases: list[Phase] = Field(
        [], description="parts of the run, in order, with settings of their own (docs/runs.md)"
    )

    @model_validator(mode="after")
    def _check_phases(self) -> RunConfig:
        check_order(self.phases, self.train.steps)
        for number in range(len(self.phases)):
            try:
                self.in_phase(number)
            except ValidationError as error:
                raise ValueError(explain(error, RunConfig, f"phases.{number}")) from None
        return self

    def in_phase(self, number: int) -> RunConfig:
        """The settings that hold in this phase (from 0), without `phases`; itself without any."""
        if not self.phases:
            return self
        values = self.model_dump(include=set(RunConfig.model_fields) - {"phases"})
        for section, changes in self.phases[number].changes().items():
            values[section] |= changes
        return RunConfig.model_validate(values)

    def by_phase(self) -> list[RunConfig]:
        """The settings of each phase, with its number of steps as train.steps, for sums."""
        found = []
        for part in parts(self.model_dump()):
            own = self.in_phase(part.number)
            train = own.train.model_copy(update={"steps": part.end - part.begin})
            found.append(own.model_copy(update={"train": train}))
        return found

    @model_validator(mode="after")
    def _check_objective(self) -> RunConfig:
        objective, data = self.train.objective, self.data
        if objective != "mlm" and data.samples != "windows":
            raise ValueError(
                f"train.objective {objective} makes pairs, so data.samples {data.samples} can't be "
                "used; remove data.samples"
            )
        if (objective == "pair") != bool(data.pairs):
            raise ValueError("set both data.pairs (files) and train.objective pair, or neither")
        if objective == "mlm" and self.train.mlm_weight != 1.0:
            raise ValueError("train.mlm_weight applies only to the objectives nsp, sop and pair")
        return self


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
    """The mapping in a YAML file, or a UserError with file, line and key."""
    return yaml_file.read(path)


def load(path: str | Path) -> RunConfig:
    """Read and check a run's YAML file."""
    return validate(read_yaml(path), str(path))


def flatten(
    values: dict[str, Any], keep: Set[str] = frozenset(), prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested dicts; dicts at the keys in `keep` are values themselves."""
    for key, value in values.items():
        if isinstance(value, dict) and prefix + key not in keep:
            yield from flatten(value, keep, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def save(config: RunConfig, path: str | Path) -> None:
    """Write every key as YAML, including the defaults."""
    text = yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")
