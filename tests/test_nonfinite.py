"""A gradient that is not finite: found at its step, on all ranks, with its cause; stop or skip."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import make_corpus, read_log, run_ranks, tiny_config

from clue_ds.errors import UserError

BAD_STEP = 3
LAYER = "bert.encoder.layer.1.intermediate"
# name -> sections of the config, what goes wrong in LAYER, and on which steps from BAD_STEP on.
STOPS: dict[str, tuple[dict[str, Any], str, int]] = {
    "zero0-fp32": ({"deepspeed": "zero0"}, "output", 1),
    "zero0-bf16": ({"deepspeed": "zero0", "train": {"precision": "bf16"}}, "gradient", 1),
    "zero1-fp32": ({"deepspeed": "zero1"}, "gradient", 1),
    "zero2-bf16": ({"deepspeed": "zero2", "train": {"precision": "bf16"}}, "output", 1),
    "zero3-fp32": ({"deepspeed": "zero3"}, "gradient", 1),
    "weights": ({"deepspeed": "zero2"}, "weights", 9),
}
SKIPS = {
    "zero0-fp32": ({"deepspeed": "zero0"}, "output", 1),
    "zero2-bf16": ({"deepspeed": "zero2", "train": {"precision": "bf16"}}, "gradient", 1),
    "in a row": ({"deepspeed": "zero1"}, "output", 9),
}
# The loss scale falls from 65,536 to 1 before there is nothing left to lower.
FP16 = {
    name: ({"deepspeed": name, "train": {"precision": "fp16", "steps": 40}}, "output", 40)
    for name in ("zero0", "zero1", "zero3")
}
SKIP = {"on_nan": "skip", "max_skipped_steps": 2}


def break_rank_1(run: Any, how: str, num_steps: int) -> None:
    """From BAD_STEP on, for `num_steps` steps, a tensor of rank 1 is not finite."""
    if run.engine.module is None or torch.distributed.get_rank() != 1:
        return
    steps = range(BAD_STEP - 1, BAD_STEP - 1 + num_steps)
    bad = [row for step in steps for row in run.stream.batch(step, 1, 2)["input_ids"].tolist()]
    is_bad = [False]

    def look(module: Any, arguments: Any, named: Any) -> None:
        is_bad[0] = named["input_ids"][0].tolist() in bad

    def spoil(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> Any:
        if not is_bad[0]:
            return None
        if how == "output":
            return output * math.nan
        if how == "weights":
            next(module.parameters()).data[0, 0] = math.inf
        elif output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.inf)
        return None

    run.engine.module.register_forward_pre_hook(look, with_kwargs=True)
    run.engine.module.get_submodule(LAYER).register_forward_hook(spoil)


def allow_fp16_on_a_cpu(patch: pytest.MonkeyPatch) -> None:
    """DeepSpeed refuses it because it is slow there; what it computes is the same."""
    from deepspeed.accelerator import get_accelerator

    from clue_ds.pretrain import engine

    accelerator = type(get_accelerator())
    dtypes = [*get_accelerator().supported_dtypes(), torch.float16]
    patch.setattr(accelerator, "is_fp16_supported", lambda accelerator: True)
    patch.setattr(accelerator, "supported_dtypes", lambda accelerator: dtypes)
    patch.setattr(engine, "_check_precision", lambda precision, device: None)


def ranks_meet_it(cases: list[tuple[dict[str, Any], str, int]]) -> list[str | None]:
    """On every rank: the error of each run, or None."""
    from clue_ds import config as run_config
    from clue_ds.pretrain import train

    results: list[str | None] = []
    for values, how, num_steps in cases:
        with pytest.MonkeyPatch.context() as patch:
            if values["train"]["precision"] == "fp16":
                allow_fp16_on_a_cpu(patch)
            run = train.build(run_config.validate(values, "test config"))
            break_rank_1(run, how, num_steps)
            try:
                with run.saver:
                    train.train(run)
                results.append(None)
            except UserError as error:
                results.append(str(error))
        run.loader.close()
        run.writers.close()
    return results


@pytest.fixture(scope="module")
def outcome(
    tmp_path_factory: pytest.TempPathFactory, sample_text: str
) -> dict[str, tuple[str | None, Path]]:
    """The error and the run directory of every case, with `stop ` or `skip ` before its name."""
    folder = tmp_path_factory.mktemp("nonfinite")
    corpus = make_corpus(folder, sample_text)
    cases = []
    for policy, group in (("stop", STOPS), ("skip", SKIPS), ("fp16", FP16)):
        for name, (sections, how, num_steps) in group.items():
            own = {**sections.get("train", {}), **(SKIP if policy == "skip" else {})}
            # One line in the end: a run must not notice only when it logs.
            own = {**sections, "train": own, "log": {"every": 100}, "checkpoint": {"every": 100}}
            config = tiny_config(corpus, folder / f"{policy} {name}", **own)
            cases.append((f"{policy} {name}", (config.model_dump(), how, num_steps)))
    by_rank = run_ranks(2, ranks_meet_it, [case for _, case in cases])
    assert by_rank[0] == by_rank[1]
    return {
        name: (error, folder / name) for (name, _), error in zip(cases, by_rank[0], strict=True)
    }


@pytest.mark.parametrize("name", STOPS)
def test_the_message_names_step_samples_rank_and_tensor(outcome: Any, name: str) -> None:
    error, folder = outcome[f"stop {name}"]
    assert error is not None
    assert error.startswith("the gradient is not finite at step 3 (samples 16 to 23 of the run): ")
    tensor = {
        "output": f"the output of {LAYER}, and the loss is nan",
        "gradient": f"the gradient of {LAYER}.dense.bias",
        "weights": f"the weights {LAYER}.dense.weight themselves",
    }[STOPS[name][1]]
    if name.startswith("zero3"):
        tensor = "the gradient of the output of bert.encoder.layer.1."
    assert f"rank 1: {tensor}" in error
    assert "rank 0" not in error and "--train.on_nan skip" in error
    assert not list(folder.glob("checkpoints/*"))


@pytest.mark.parametrize("name", ["zero0-fp32", "zero2-bf16"])
def test_a_skipped_update_is_counted_and_the_run_goes_on(outcome: Any, name: str) -> None:
    error, folder = outcome[f"skip {name}"]
    assert error is None
    first, line = read_log(folder)
    assert first["step"] == 1
    assert (line["step"], line["skipped_steps"]) == (6, 1)
    assert 0 < line["loss"] < 10 and math.isfinite(line["grad_norm"])
    assert (folder / "checkpoints" / "step-00000006").is_dir()


def test_too_many_skipped_updates_in_a_row_end_the_run(outcome: Any) -> None:
    error, folder = outcome["skip in a row"]
    assert error is not None and "not finite at step 5 (samples 32 to 39 of the run)" in error
    assert "train.max_skipped_steps is 2" in error
    assert not list(folder.glob("checkpoints/*"))


@pytest.mark.parametrize("name", FP16)
def test_a_loss_scale_that_collapses_in_fp16_names_step_rank_and_tensor(
    outcome: Any, name: str
) -> None:
    error, folder = outcome[f"fp16 {name}"]
    assert error is not None and error.startswith("fp16 training diverged at step ")
    assert "the gradient overflows even at the smallest loss scale: " in error
    assert f"rank 1: the output of {LAYER}" in error and "rank 0" not in error
    assert "train.precision bf16" in error
    assert not list(folder.glob("checkpoints/*"))
