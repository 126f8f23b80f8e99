"""The DeepSpeed JSON: DeepSpeed's own keys, plus the numbers that our config owns.

Guarantees: each number has one owner. "auto", or a missing key, takes our value; a concrete value
that differs from ours is an error that lists all such keys at once, with both values. The sections
"optimizer" and "scheduler" are refused, because the run's config has those settings.

Rejected: letting the value in the JSON win, and ignoring it silently.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import io
import json
from typing import TYPE_CHECKING, Any

from clue_ds.config import RunConfig, TrainSection
from clue_ds.errors import UserError, existing_file

if TYPE_CHECKING:  # `clue-ds plan --help` imports this module, and torch takes a second
    import torch
    from torch import nn

SHIPPED = ("zero0", "zero1", "zero2", "zero3", "zero1_offload")
OURS_INSTEAD = {
    "optimizer": "train.optimizer, train.lr, train.beta1 and so on",
    "scheduler": "train.schedule and train.warmup_steps",
}
# Elements. DeepSpeed's own default, and the unit to which a smaller bucket is rounded up.
DEFAULT_BUCKET, BUCKET_UNIT = 500_000_000, 1 << 20
LAST_COMPILED_STAGE = 2  # torch.compile can't follow how stage 3 gathers parameters
ALIASES = {"bfloat16": "bf16"}


def read(name: str) -> dict[str, Any]:
    """The JSON `name`: one of SHIPPED, or the path of a file."""
    if name in SHIPPED:
        text = importlib.resources.files("clue_ds.ds_configs").joinpath(f"{name}.json").read_text()
        return json.loads(text)
    if not name.endswith(".json"):
        raise UserError(
            f"deepspeed {name!r} is neither one of {', '.join(SHIPPED)} nor a path ending in .json"
        )
    path = existing_file(name, "DeepSpeed JSON")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"DeepSpeed JSON {path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"DeepSpeed JSON {path} must hold an object, not {values!r}")
    return {ALIASES.get(str(key), str(key)): value for key, value in values.items()}


def zero_stage(values: dict[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed JSON; 0 if it sets none."""
    return int(values.get("zero_optimization", {}).get("stage", 0))


def offloads(values: dict[str, Any]) -> bool:
    """Whether the optimizer states are kept in the host's memory."""
    section = values.get("zero_optimization", {}).get("offload_optimizer") or {}
    return section.get("device", "none") != "none"


def check_compile(config: RunConfig, values: dict[str, Any]) -> None:
    """UserError for `model.compile` at stage 3, which torch 2.13 can't trace."""
    if config.model.compile is True and zero_stage(values) > LAST_COMPILED_STAGE:
        raise UserError(
            f"model.compile is true, but DeepSpeed JSON {config.deepspeed} has ZeRO stage 3, which "
            "gathers parameters in a way that torch.compile can't follow; set model.compile to "
            "false, or take a DeepSpeed JSON of stage 0, 1 or 2"
        )


def our_numbers(train: TrainSection, world_size: int, stage: int) -> dict[str, Any]:
    """Dotted DeepSpeed key -> the value that our config gives it."""
    # Stage 0 accumulates gradients in the type of the weights; it has no separate buffer.
    accumulate_in = train.precision if stage == 0 else "fp32"
    return {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch(),
        "gradient_accumulation_steps": train.gradient_accumulation_steps(world_size),
        "gradient_clipping": train.gradient_clipping,
        "bf16.enabled": train.precision == "bf16",
        "fp16.enabled": train.precision == "fp16",
        "data_types.grad_accum_dtype": accumulate_in,
    }


def _our_key(key: str) -> str:
    """The key of the run's config that owns a DeepSpeed key."""
    return {
        "train_batch_size": "train.global_batch_size",
        "train_micro_batch_size_per_gpu": "train.micro_batch_size",
        "gradient_accumulation_steps": "train.global_batch_size / (train.micro_batch_size x ranks)",
        "gradient_clipping": "train.gradient_clipping",
    }.get(key, "train.precision")


def fill(values: dict[str, Any], name: str, train: TrainSection, world_size: int) -> dict[str, Any]:
    """`values` of the JSON called `name`, with our numbers in place of "auto".

    A UserError lists everything that disagrees.
    """
    where = f"DeepSpeed JSON {name}"
    for section, ours in OURS_INSTEAD.items():
        if section in values:
            raise UserError(
                f'{where}: remove the section "{section}"; set {ours} in the run config'
            )
    filled = json.loads(json.dumps(values))
    mistakes = []
    for key, ours in our_numbers(train, world_size, zero_stage(values)).items():
        *sections, last = key.split(".")
        section = filled
        for key_of_section in sections:
            section = section.setdefault(key_of_section, {})
        theirs = section.get(last, "auto")
        if theirs != "auto" and (
            theirs != ours or isinstance(theirs, bool) != isinstance(ours, bool)
        ):
            mistakes.append(f"{key} is {json.dumps(theirs)}, but {_our_key(key)} gives {ours!r}")
        section[last] = ours
    if mistakes:
        raise UserError(
            f"{where} disagrees with the run config: {'; '.join(mistakes)}. "
            'Write "auto" there, or change the run config'
        )
    autos = list(_leftover_autos(filled))
    if autos:
        raise UserError(
            f'{where}: the run config has no value for "auto" at {", ".join(autos)}; write one'
        )
    if train.optimizer == "muon":
        # DeepSpeed vouches for AdamW only; tests/test_engine.py proves MuonAdamW at every stage.
        filled["zero_allow_untested_optimizer"] = True
    # By default DeepSpeed prints a line every 10 steps.
    filled.setdefault("steps_per_print", 10**9)
    # Its throughput timer synchronizes the GPU twice per micro-batch, for a figure that
    # clue_ds/metrics measures without that.
    filled.setdefault("timers", {"throughput": {"enabled": False}})
    return filled


def fit_buckets(values: dict[str, Any], num_parameters: int) -> None:
    """Limit the buffer in which gradients are collected to what the model can fill.

    DeepSpeed 0.19.8 allocates the whole bucket in every step at stages 1 to 3, and its default of
    5e8 elements takes 1 GB in bf16 and 2 GB in fp32 even for a model of 8 million parameters. A
    bucket that holds all gradients sends the same messages. A size in the JSON stays.
    """
    if zero_stage(values) > 0:
        needed = -(-num_parameters // BUCKET_UNIT) * BUCKET_UNIT
        values["zero_optimization"].setdefault("reduce_bucket_size", min(needed, DEFAULT_BUCKET))


def _leftover_autos(values: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _leftover_autos(value, f"{prefix}{key}.")
        elif value == "auto":
            found.append(prefix + key)
    return found


def initialize(
    deepspeed: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    values: dict[str, Any],
    name: str,
) -> Any:
    """Call deepspeed.initialize; a UserError names the JSON when DeepSpeed refuses it."""
    from pydantic import ValidationError

    try:
        # Its bf16 optimizer prints a dozen lines about memory at every log level.
        with contextlib.redirect_stdout(io.StringIO()):
            return deepspeed.initialize(
                model=model, optimizer=optimizer, config=values, dist_init_required=False
            )[0]
    except (deepspeed.DeepSpeedConfigError, ValidationError) as error:
        raise UserError(f"DeepSpeed JSON {name}: {error}") from None
