"""`auto` becomes one value for the whole run, which its files, its log and its plan name."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path

import pytest
import torch
from ranks import make_corpus, run_ranks, tiny_config

import clue_ds
from clue_ds import config as run_config
from clue_ds import plan
from clue_ds.checkpoint import manifest
from clue_ds.config import RunConfig
from clue_ds.job import preflight
from clue_ds.pretrain import resume
from clue_ds.pretrain.auto.precision import precision_on

TEXT = "今天的天气很好。\n我们一起去公园。\n\n公园里有很多花。\n大家都很高兴。\n"
WITH, WITHOUT = "flags : fpu avx512f avx512_bf16 amx_bf16\n", "flags : fpu avx2 avx512f\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"), TEXT)


def config(corpus: Path | str, run_dir: Path, precision: str) -> RunConfig:
    return tiny_config(corpus, run_dir, train={"precision": precision})


def test_auto_is_the_default() -> None:
    assert run_config.TrainSection().precision == "auto"


def test_a_cpu_computes_in_bf16_if_it_has_the_instructions(tmp_path: Path) -> None:
    cpuinfo, cpu = tmp_path / "cpuinfo", torch.device("cpu")
    cpuinfo.write_text(WITH)
    assert precision_on(cpu, cpuinfo)[0] == "bf16"
    cpuinfo.write_text(WITHOUT)
    precision, reason = precision_on(cpu, cpuinfo)
    assert precision == "fp32" and "no instructions for bf16" in reason
    assert precision_on(cpu, tmp_path / "none")[0] == "fp32"


def run_twice(corpus: str, folder: str) -> list[dict[str, str]]:
    """On a rank: a run with `auto` where bf16 is slow, continued where it is fast."""
    cpuinfo, run_dir, found = Path(folder, "cpuinfo"), Path(folder, "run"), []
    preflight.CPUINFO = cpuinfo
    for flags in (WITHOUT, WITH):
        cpuinfo.write_text(flags)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            clue_ds.pretrain(config(corpus, run_dir, "auto"))
        last = manifest.published(run_dir / manifest.FOLDER)[0]
        saved = manifest.read(last)
        found.append(
            {
                "printed": printed.getvalue(),
                "config.yaml": run_config.load(run_dir / "config.yaml").train.precision,
                "manifest": saved.precision,
                "its config": saved.config["train"]["precision"],
            }
        )
        shutil.rmtree(last)
    return found


def test_a_run_says_what_auto_is_and_keeps_the_precision_of_its_checkpoint(
    corpus: Path, tmp_path: Path
) -> None:
    ((first, second),) = run_ranks(1, run_twice, str(corpus), str(tmp_path))
    assert "train.precision auto is fp32: this processor has no instruc" in first.pop("printed")
    printed = second.pop("printed")
    assert "resuming after step 3" in printed
    assert "train.precision auto is fp32: the run continues in the precision of its" in printed
    assert first == second == dict.fromkeys(("config.yaml", "manifest", "its config"), "fp32")


def test_a_precision_that_was_set_is_still_compared(tmp_path: Path) -> None:
    saved = config("corpus", tmp_path, "bf16")
    assert resume.differences(saved, config("corpus", tmp_path, "auto"), step=3) == []
    (changed,) = resume.differences(saved, config("corpus", tmp_path, "fp32"), step=3)
    assert changed == "train.precision was 'bf16', is now 'fp32'"


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16"), (False, "fp32")])
def test_a_plan_names_the_precision_of_its_gpus(
    has_bf16: bool, precision: str, tmp_path: Path
) -> None:
    machine = plan.Machine(4, 4, 80.0, 989e12, 0.35, 25e9, has_bf16)
    (head, *lines) = plan.describe(config("no corpus", tmp_path, "auto"), machine)
    assert f"parameters in {precision} (train.precision auto), ZeRO stage 1" in head
    assert lines == plan.describe(config("no corpus", tmp_path, precision), machine)[1:]
