"""Phases: one run whose length, masks and batches change on the way, and which resumes anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import TINY_MODEL, make_corpus, pretrain_runs, read_log, run_ranks, tiny_config

from clue_ds import plan
from clue_ds.checkpoint import manifest
from clue_ds.checkpoint.masters import load_weights
from clue_ds.config import DataSection, RunConfig
from clue_ds.data import Corpus, SampleStream
from clue_ds.data.stream.order import places
from clue_ds.errors import UserError
from clue_ds.pretrain import resume
from clue_ds.pretrain.phases import open_phases, seed_of_order
from clue_ds.settings.phases import at, num_samples, parts

STEPS, BOUNDARY = 8, 4
# 128 and then 512 in miniature, with another mask rate. A step has 4 micro-batches, then 3 (which
# does not divide the 16 before it), then 1.
PHASES: list[dict[str, Any]] = [
    {"until": BOUNDARY, "data": {"seq_length": 16}},
    {
        "until": 7,
        "data": {"seq_length": 32, "mask_prob": 0.3},
        "train": {"global_batch_size": 6, "micro_batch_size": 2},
    },
    {
        "data": {"seq_length": 32, "mask_prob": 0.3},
        "train": {"global_batch_size": 4, "micro_batch_size": 4},
    },
]
# The same with one micro-batch per step.
WHOLE: list[dict[str, Any]] = [
    {**phase, "train": {**phase.get("train", {}), "micro_batch_size": size}}
    for phase, size in zip(PHASES, (8, 6, 4), strict=True)
]
SAME = ("loss", "mlm_accuracy", "grad_norm", "lr", "samples", "phase", "held_out_loss")
CASES = ("zero0", "zero1", "zero2", "zero3", "zero1_offload")
STOPS = (2, BOUNDARY, 6)


def config(corpus: Path | str, run_dir: Path | str, **sections: Any) -> RunConfig:
    train = {"steps": STEPS, **sections.pop("train", {})}
    values = {
        "phases": PHASES,
        "checkpoint": {"every": 2},
        "evaluate": {"every": 3, "batches": 1},
        "data": {"held_out": str(corpus)},
    }
    return tiny_config(corpus, run_dir, train=train, **{**values, **sections})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    """Runs in phases, and each of them as it was at some steps and went on from there."""
    folder = tmp_path_factory.mktemp("phases")
    corpus = make_corpus(folder, sample_text)
    full = [config(corpus, folder / name, deepspeed=name) for name in CASES]
    plain = config(corpus, folder / "plain", phases=[])
    single = config(corpus, folder / "single", phases=[{}])
    no_dropout = {**TINY_MODEL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    accumulated, whole = (
        config(corpus, folder / name, model=no_dropout, phases=phases)
        for name, phases in (("accumulated", PHASES), ("whole", WHOLE))
    )
    runs = [run.model_dump() for run in (*full, plain, single, accumulated, whole)]
    assert run_ranks(1, pretrain_runs, runs) == [[None] * len(runs)]
    again = []
    for name in CASES:
        for stop in STOPS if name == "zero1" else (BOUNDARY,):
            copy = folder / f"{name}-{stop}"
            shutil.copytree(folder / name, copy)
            for later in range(stop + 2, STEPS + 1, 2):
                shutil.rmtree(copy / "checkpoints" / f"step-{later:08d}")
            again.append(config(corpus, copy, deepspeed=name).model_dump())
    late = config(corpus, folder / "late", phases=[{"until": 6}, {"data": {"seq_length": 32}}])
    shutil.copytree(folder / "plain", folder / "late")
    shutil.rmtree(folder / "late" / "checkpoints" / "step-00000008")
    again.append(late.model_dump())
    assert run_ranks(1, pretrain_runs, again) == [[None] * len(again)]
    return folder


@pytest.mark.parametrize(
    "name", [f"{name}-{BOUNDARY}" for name in CASES] + [f"zero1-{stop}" for stop in (2, 6)]
)
def test_a_run_that_resumes_in_a_phase_or_between_two_equals_an_undisturbed_one(
    folder: Path, name: str
) -> None:
    expected, got = read_log(folder / name.rpartition("-")[0]), read_log(folder / name)
    assert [line["step"] for line in got] == list(range(1, STEPS + 1))
    for want, line in zip(expected, got, strict=True):
        assert {k: line.get(k) for k in SAME} == {k: want.get(k) for k in SAME}
    want_weights = load_weights(folder / name.rpartition("-")[0])[1]
    for key, tensor in load_weights(folder / name)[1].items():
        assert torch.equal(tensor, want_weights[key]), key


def test_the_log_says_the_phase_and_counts_its_samples(folder: Path) -> None:
    lines = read_log(folder / "zero1")
    assert [line["phase"] for line in lines] == [1] * 4 + [2] * 3 + [3]
    assert [line["samples"] for line in lines] == [8, 16, 24, 32, 38, 44, 50, 54]
    saved = json.loads((folder / "zero1/checkpoints/step-00000006/manifest.json").read_text())
    assert saved["samples"] == 44


def test_a_run_with_one_phase_equals_a_run_without(folder: Path) -> None:
    one, other = read_log(folder / "single"), read_log(folder / "plain")
    assert [{k: line.get(k) for k in SAME} for line in one] == [
        {k: line.get(k) for k in SAME} for line in other
    ]
    weights = load_weights(folder / "plain")[1]
    assert all(torch.equal(t, weights[k]) for k, t in load_weights(folder / "single")[1].items())


def test_a_run_may_be_given_a_later_phase(folder: Path) -> None:
    """Its steps up to there are those of the run without phases."""
    late, plain = read_log(folder / "late"), read_log(folder / "plain")
    assert [line["loss"] for line in late[:6]] == [line["loss"] for line in plain[:6]]
    assert late[6]["loss"] != plain[6]["loss"] and late[6]["phase"] == 2
    assert late[-1]["lr"] == plain[-1]["lr"]


def test_stages_train_the_same_in_every_phase(folder: Path) -> None:
    """Micro-batches are counted and averaged rightly after the change, at every stage."""
    expected = [line["loss"] for line in read_log(folder / "zero0")]
    for name in CASES[1:]:
        got = [line["loss"] for line in read_log(folder / name)]
        assert got == pytest.approx(expected, abs=2e-4), name
    ours, whole = (read_log(folder / name) for name in ("accumulated", "whole"))
    for key in ("loss", "grad_norm"):
        assert [a[key] for a in ours] == pytest.approx([b[key] for b in whole], rel=1e-4)


def test_samples_are_those_that_the_stream_gives_for_the_phase(folder: Path) -> None:
    run = config(folder / "corpus", "unused")
    corpus = Corpus(folder / "corpus")
    found = open_phases(run, corpus)
    streams = [
        SampleStream(corpus, 16, 8, run.seed),
        SampleStream(corpus, 32, 6, seed_of_order(run.seed, 1), mask_prob=0.3),
        SampleStream(corpus, 32, 4, seed_of_order(run.seed, 2), mask_prob=0.3),
    ]
    for phase, stream in zip(found, streams, strict=True):
        for step in range(phase.part.begin, phase.part.end):
            got = phase.stream.arrays(phase.batch_number(step))
            want = stream.arrays(step - phase.part.begin)
            assert all(np.array_equal(got[key], want[key]) for key in want)


def test_a_phase_with_the_same_samples_goes_on_in_their_order() -> None:
    """Also behind one of another length, and with another batch; then only whole batches count."""
    run = config(
        "c",
        "r",
        train={"steps": 40, "global_batch_size": 64, "micro_batch_size": 8, "warmup_steps": 2},
        phases=[
            {"until": 5},
            {"until": 10, "data": {"mask_prob": 0.3}},
            {"until": 13, "train": {"global_batch_size": 192}},
            {"until": 20, "data": {"seq_length": 32}},
            {"until": 30, "train": {"global_batch_size": 256}},
            {"train": {"global_batch_size": 16}},
        ],
    )
    found = parts(run.model_dump())
    # 640 samples are 3.33 batches of 192, and 7 x 192 = 1344 are 5.25 batches of 256.
    assert [part.first_batch for part in found] == [0, 5, 4, 0, 6, 0]
    assert [part.order for part in found] == [0, 0, 0, 1, 0, 2]
    assert [at(found, step).number for step in (0, 4, 5, 12, 13, 29, 39, 40)] == [
        *(0, 0, 1, 2, 3, 4, 5, 5)
    ]
    sizes = [64] * 10 + [192] * 3 + [64] * 7 + [256] * 10 + [16] * 10
    for step in range(41):
        assert num_samples(run.model_dump(), step) == sum(sizes[:step])


@pytest.mark.parametrize("order", ["shuffle", "lanes"])
def test_each_sample_comes_once_per_epoch_although_the_batch_changes(
    folder: Path, order: str
) -> None:
    run = config(
        folder / "corpus",
        "unused",
        data={"order": order},
        train={"global_batch_size": 64},
        phases=[{"until": 2}, {"train": {"global_batch_size": 128}}],
    )
    seen: list[tuple[int, int]] = []
    for phase in open_phases(run, Corpus(folder / "corpus")):
        stream = phase.stream
        epochs, samples = np.empty((2, stream.global_batch_size), dtype=np.uint64)
        for step in range(phase.part.begin, phase.part.end):
            places(phase.batch_number(step), 0, stream.order, epochs, samples)
            seen += zip(epochs.tolist(), samples.tolist(), strict=True)
    assert len(set(seen)) == len(seen) == 2 * 64 + 6 * 128
    num_epochs, rest = divmod(len(seen), stream.num_samples)
    assert sorted(seen)[: len(seen) - rest] == [
        (epoch, sample) for epoch in range(num_epochs) for sample in range(stream.num_samples)
    ]
    assert num_epochs > 0


def test_only_the_past_must_stay_as_it_was() -> None:
    second = {"data": {"seq_length": 32, "mask_prob": 0.3}, "train": {"global_batch_size": 4}}
    saved = config("c", "r", phases=[{"until": 4}, second])
    longer = config(
        "c", "r", phases=[{"until": 4}, {**second, "until": 7}, {"data": {"seq_length": 24}}]
    )
    assert resume.differences(saved, longer, 6) == []
    assert resume.differences(saved, longer, 7) == []
    assert resume.differences(saved, longer, 8) == [
        "data.seq_length was 32, is now 24 in step 8",
        "data.mask_prob was 0.3, is now 0.15 in step 8",
        "train.global_batch_size was 4, is now 8 in step 8",
    ]
    earlier = config("c", "r", phases=[{"until": 3}, second])
    assert resume.differences(saved, earlier, 3) == []
    assert resume.differences(saved, earlier, 4)[0] == "data.seq_length was 16, is now 32 in step 4"
    plain = config("c", "r", phases=[])
    assert resume.differences(saved, plain, 4) == []
    assert resume.differences(plain, saved, 4) == []
    split = [{"until": 2}, {"until": 3, "train": {"micro_batch_size": 8}}, {}]
    assert resume.differences(plain, config("c", "r", phases=split), 8) == []


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no end": ({"phases": [{}, {}]}, "missing key phases.0.until"),
    "not rising": ({"phases": [{"until": 4}, {"until": 4}, {}]}, "phases.1.until 4 is not after 4"),
    "beyond the run": ({"phases": [{"until": 8}, {}]}, "phases.0.until 8 leaves no step of"),
    "last": ({"phases": [{"until": 4}, {"until": 8}]}, "phases.1.until: the last phase ends at"),
    "key": (
        {"phases": [{"until": 4, "train": {"lr": 1e-3}}, {}]},
        "unknown key phases.0.train.lr; known keys: global_batch_size, micro_batch_size",
    ),
    "misspelled": (
        {"phases": [{"until": 4, "data": {"seq_len": 32}}, {}]},
        "unknown key phases.0.data.seq_len; did you mean phases.0.data.seq_length?",
    ),
    "range": (
        {"phases": [{"until": 4}, {"data": {"seq_length": 4}}]},
        "phases.1: data.seq_length: Input should be greater than or equal to 8 (got 4)",
    ),
    "objective": (
        {"train": {"objective": "sop"}, "phases": [{"data": {"samples": "packed"}}]},
        "phases.0: train.objective sop makes pairs",
    ),
    "positions": (
        {"phases": [{"until": 4}, {"data": {"seq_length": 64}}]},
        "phases.1: data.seq_length 64 exceeds the model's positions",
    ),
    "batch": (
        {"phases": [{"until": 4}, {"train": {"global_batch_size": 5}}]},
        "phases.1: train.global_batch_size 5 is not divisible by",
    ),
    "rollback": ({"train": {"on_spike": "rollback"}}, "train.on_spike rollback can't be used with"),
    "best": ({"checkpoint": {"keep_best": True}}, "checkpoint.keep_best can't be used with phases"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_impossible_phases_are_refused_at_the_start(
    folder: Path, tmp_path: Path, name: str
) -> None:
    from clue_ds.pretrain import train

    sections, message = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        train.build(config(folder / "corpus", tmp_path / "run", **sections))
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_manifest_with_samples_that_its_phases_do_not_give_is_damaged(
    folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder / "zero1/checkpoints/step-00000006", tmp_path / "step-00000006")
    values = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(manifest.seal({**values, "samples": 48}))
    with pytest.raises(manifest.Damaged, match="48 samples after step 6"):
        manifest.read(copy)


def test_the_plan_adds_the_phases_up() -> None:
    """Memory of the largest, tokens and time of all."""
    machine = plan.Machine(1, 1, 80.0, 989e12, 0.35, 25e9)
    big = {"preset": "bert_base_google", "max_position_embeddings": 512}
    shape = {**dict.fromkeys(TINY_MODEL), **big}
    train = {"steps": 1000, "global_batch_size": 64, "micro_batch_size": 64}
    alone = {
        length: plan.describe(
            config(
                "no corpus", "r", model=shape, phases=[], train={**train, "steps": steps}
            ).model_copy(update={"data": DataSection(corpus="no corpus", seq_length=length)}),
            machine,
        )
        for length, steps in ((128, 900), (512, 100))
    }
    phases = [{"until": 900, "data": {"seq_length": 128}}, {"data": {"seq_length": 512}}]
    printed = plan.describe(
        config("no corpus", "r", model=shape, phases=phases, train=train), machine
    )
    both = [next(line for line in alone[n] if line.startswith("computing")) for n in (128, 512)]
    assert [line for line in printed if line.startswith("computing")] == both
    memory = next(line for line in alone[512] if line.startswith("memory/GPU"))
    assert memory in printed and memory not in alone[128]
    most = 64 * (900 * 128 + 100 * 512)
    assert f"run         1,000 steps, at most {most:,} tokens" in printed
    assert "phase 2     100 steps of length 512" in printed
