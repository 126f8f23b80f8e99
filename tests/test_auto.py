"""`auto` becomes one value for the whole run, which its files, its log and its plan name."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import make_corpus, run_ranks, tiny_config

import clue_ds
from clue_ds import config as run_config
from clue_ds import plan
from clue_ds.checkpoint import manifest
from clue_ds.config import RunConfig
from clue_ds.errors import UserError
from clue_ds.job import preflight
from clue_ds.model.cuda_graph import takes_graphs
from clue_ds.pretrain import auto, batches, resume, train
from clue_ds.pretrain.auto import compiled, micro_batch
from clue_ds.pretrain.auto.precision import precision_on

TEXT = "今天的天气很好。\n我们一起去公园。\n\n公园里有很多花。\n大家都很高兴。\n"
WITH, WITHOUT = "flags : fpu avx512f avx512_bf16 amx_bf16\n", "flags : fpu avx2 avx512f\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"), TEXT)


def config(corpus: Path | str, run_dir: Path, precision: str, **train: Any) -> RunConfig:
    return tiny_config(corpus, run_dir, train={"precision": precision, **train})


def test_auto_is_the_default() -> None:
    train = run_config.TrainSection()
    assert (train.precision, train.micro_batch_size) == ("auto", "auto")
    model = run_config.ModelSection()
    assert (model.kernels, model.compile) == ("auto", "auto")


def test_a_cpu_computes_in_bf16_if_it_has_the_instructions(tmp_path: Path) -> None:
    cpuinfo, cpu = tmp_path / "cpuinfo", torch.device("cpu")
    cpuinfo.write_text(WITH)
    assert precision_on(cpu, cpuinfo)[0] == "bf16"
    cpuinfo.write_text(WITHOUT)
    precision, reason = precision_on(cpu, cpuinfo)
    assert precision == "fp32" and "no instructions for bf16" in reason
    assert precision_on(cpu, tmp_path / "none")[0] == "fp32"


def run_twice(corpus: str, folder: str) -> list[dict[str, str]]:
    """On a rank: a run with `auto` where bf16 is slow, continued where it is fast.

    The first has micro-batches of 2 rows, which the second, with `auto`, has to keep.
    """
    cpuinfo, run_dir, found = Path(folder, "cpuinfo"), Path(folder, "run"), []
    preflight.CPUINFO = cpuinfo
    for flags, size in ((WITHOUT, 2), (WITH, "auto")):
        cpuinfo.write_text(flags)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            clue_ds.pretrain(config(corpus, run_dir, "auto", micro_batch_size=size))
        last = manifest.published(run_dir / manifest.FOLDER)[0]
        saved = manifest.read(last)
        found.append(
            {
                "printed": printed.getvalue(),
                "config.yaml": run_config.load(run_dir / "config.yaml").train.precision,
                "manifest": saved.precision,
                "its config": saved.config["train"]["precision"],
                "size": str(saved.config["train"]["micro_batch_size"]),
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
    assert "train.micro_batch_size auto is 2: the run continues with that of its ch" in printed
    names = "config.yaml", "manifest", "its config"
    assert first == second == dict.fromkeys(names, "fp32") | {"size": "2"}


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


def memory_of(rows: int) -> float:
    """Bytes in a model of a GPU on which more than 512 rows end in `out of memory`."""
    return 1_000 + 100.0 * rows if rows <= 512 else float("inf")


@pytest.mark.parametrize(
    ("share", "room", "wanted", "size"),
    [
        (256, 1e9, None, 256),  # the whole share in one pass
        (4_096, 1e9, None, 512),  # 1,024 rows run out of memory
        (256, 7_400, None, 64),
        (24, 1e9, None, 8),  # 16 does not divide it
        (7, 1e9, None, 1),
        (256, 1_300, None, 2),  # less than the first that is tried
        (256, 1_050, None, None),  # not even one row fits
        (256, 1e9, 48, 256),  # a checkpoint's size that no longer divides
        (96, 1e9, 24, 24),
        (256, 5_000, 64, 32),  # a checkpoint of a larger GPU
    ],
)
def test_the_largest_power_of_two_that_divides_and_fits(
    share: int, room: float, wanted: int | None, size: int | None
) -> None:
    fit = micro_batch.largest_that_fits(share, memory_of, room, wanted)
    assert (fit and fit.size) == size
    if fit is not None:
        assert share % fit.size == 0 and fit.peak == memory_of(fit.size) <= room


def test_a_trial_makes_the_passes_of_the_run(corpus: Path, tmp_path: Path) -> None:
    own = config(corpus, tmp_path, "fp32")
    opened = batches.open_data(own)
    identity = resume.RunIdentity(
        own, own.model.resolve(opened.vocab_size), opened.vocab_file, "", True, ""
    )
    stream = batches.make_stream(own, opened)
    network = micro_batch.network_of(identity, stream, torch.device("cpu"))
    trial = micro_batch.Trial(network, stream.batch(0), torch.device("cpu"))
    assert trial.run(2) != trial.run(4)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert {name for name, p in network.named_parameters() if p.grad is not None} == trained
    assert micro_batch.state_bytes(own, identity.model) > 16 * sum(
        p.numel() for p in network.parameters()
    )


def test_code_is_compiled_on_a_gpu_at_stages_that_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    stage1 = tiny_config("corpus", tmp_path, deepspeed="zero1", model={"compile": "auto"})
    stage3 = stage1.model_copy(update={"deepspeed": "zero3"})
    monkeypatch.setenv("CC", "gcc")
    found, notes = compiled.choose(stage1, gpu)
    assert (found.model.compile, notes[0].split(":")[0]) == (True, "model.compile auto is true")
    found, notes = compiled.choose(stage3, gpu)
    assert (found.model.compile, "ZeRO stage 3" in notes[0]) == (False, True)
    found, notes = compiled.choose(stage1, cpu)
    assert (found.model.compile, notes) == (False, [])
    assert compiled.choose(found, gpu) == (found, [])  # not auto any more
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs a C compiler" in compiled.choose(stage1, gpu)[1][0]


def test_graphs_are_for_one_gpu_unless_they_are_asked_for() -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert takes_graphs("auto", gpu, stage=1, world_size=1)
    assert takes_graphs("on", gpu, stage=2, world_size=8)
    without = [("auto", gpu, 1, 2), ("auto", gpu, 3, 1), ("auto", cpu, 1, 1), ("off", gpu, 1, 1)]
    assert not any(takes_graphs(*case) for case in without)
    with pytest.raises(
        UserError, match="needs a CUDA device and ZeRO stage 0 to 2.*set it to auto"
    ):
        takes_graphs("on", gpu, stage=3, world_size=1)


def test_on_a_cpu_auto_is_at_most_32_rows_and_each_phase_has_its_own(tmp_path: Path) -> None:
    sizes = {"micro_batch_size": "auto", "global_batch_size": 192}
    phases = [
        {"until": 2},
        {"until": 3, "train": {"global_batch_size": 24}},
        {"train": {"micro_batch_size": 6}},
    ]
    found = auto.on_this_machine(config("corpus", tmp_path, "fp32", **sizes))
    assert found.train.micro_batch_size == 32
    three = tiny_config("corpus", tmp_path, train=sizes, phases=phases)
    resolved = auto.on_this_machine(three)
    assert [part.train.micro_batch() for part in resolved.by_phase()] == [32, 8, 6]
    assert resume.differences(resolved, three, step=4) == []


@pytest.mark.parametrize("value", [0, -1, "many", 1.5])
def test_a_micro_batch_is_a_number_or_auto(value: object) -> None:
    values = {"run_dir": "r", "data": {"corpus": "c"}, "train": {"micro_batch_size": value}}
    message = "train.micro_batch_size: give a number of at least 1, or auto"
    with pytest.raises(UserError, match=message):
        run_config.validate(values, "test")
    values = {**values, "train": {}, "phases": [{"train": {"micro_batch_size": value}}]}
    with pytest.raises(UserError, match="give a number of at least 1, or auto"):
        run_config.validate(values, "test")


def test_a_plan_estimates_the_micro_batch(tmp_path: Path) -> None:
    sizes = {"micro_batch_size": "auto", "global_batch_size": 1 << 15}
    values = {"run_dir": str(tmp_path), "data": {"corpus": "no corpus"}, "train": sizes}
    run = run_config.validate({**values, "model": {"preset": "bert_base_clue"}}, "test")
    found = {}
    for memory_gib in (16.0, 80.0):
        machine = plan.Machine(4, 4, memory_gib, 989e12, 0.35, 25e9)
        (line,) = [x for x in plan.describe(run, machine) if x.startswith("batch ")]
        assert line.endswith("(train.micro_batch_size auto, estimated; a run measures it)")
        found[memory_gib] = int(line.split(" micro-batches x ")[1].split()[0])
        assert "this config (stage 1) fits" in "\n".join(plan.describe(run, machine))
    assert 1 < found[16.0] < found[80.0]


def dry_run(corpus: str, folder: str) -> str:
    """On a rank: what `clue-ds pretrain --dry-run` prints."""
    path = Path(folder, "run.yaml")
    sizes = {"micro_batch_size": "auto", "precision": "auto"}
    run_config.save(tiny_config(corpus, Path(folder, "run"), train=sizes), path)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train.main(["--config", str(path), "--dry-run"])
    return printed.getvalue()


def test_a_dry_run_prints_every_auto_and_writes_nothing(corpus: Path, tmp_path: Path) -> None:
    printed, of_rank_1 = run_ranks(2, dry_run, str(corpus), str(tmp_path))
    assert "train.precision auto is " in printed
    assert "model.kernels auto is torch: there is no GPU" in printed
    assert "train.micro_batch_size auto is 4: the largest power of two up to 32" in printed
    assert "each step is 8 sequences of 16 = 2 ranks x 1 micro-batches x 4, in " in printed
    assert printed.endswith("dry run: nothing was trained or written\n")
    assert of_rank_1 == "" and not (tmp_path / "run").exists()
