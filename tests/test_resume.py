"""An interrupted run ends with the same losses and weights, bit for bit, as one that wasn't.

Two ranks, dropout on, text that can be learned (random tokens would hide lost Adam moments). The
second half runs in fresh processes, from a copy of the run directory as the interruption left it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import make_corpus, pretrain_runs, read_log, run_ranks, tiny_config
from test_manifest import described

from clue_ds.checkpoint import manifest, retention
from clue_ds.checkpoint.masters import load_weights
from clue_ds.data.stream.samples import STREAM_VERSION
from clue_ds.errors import UserError
from clue_ds.pretrain import resume

# As shipped, stage 3 keeps every parameter of so small a model whole; here it shards them all.
OWN_JSON = {"zero3_sharded": str(Path(__file__).with_name("zero3_sharded.json"))}

MUON = ("zero0-muon", "zero1-muon", "zero2-muon", "zero3-muon", "zero1_offload-muon")
CASES = [
    ("zero0", "fp32"),
    ("zero1", "fp32"),
    ("zero2", "fp32"),
    ("zero3", "fp32"),
    ("zero3_sharded", "fp32"),
    ("zero1_offload", "fp32"),
    ("zero0", "bf16"),
    ("zero1", "bf16"),
    *((name, "fp32") for name in MUON),
    ("zero0-muon", "bf16"),
    ("zero1-muon", "bf16"),
]
MIDDLE, LAST = 3, 6
SAME = ("loss", "mlm_accuracy", "grad_norm", "lr", "samples")


def interrupted_copy(run: Path, copy: Path) -> Path:
    """The run directory as it was right after the first checkpoint, with log lines too many."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / f"step-{LAST:08d}")
    (copy / "checkpoints" / f"step-{LAST:08d}.tmp").mkdir()  # it died while it saved
    return copy


def change_stream_version(run: Path, version: int | None) -> None:
    """Make a checkpoint one of another stream, or of the time before streams had versions."""
    path = run / "checkpoints" / f"step-{MIDDLE:08d}" / "manifest.json"
    values = json.loads(path.read_text())
    assert values.pop("stream_version") == STREAM_VERSION
    if version is None:
        values = {k: v for k, v in values.items() if k not in ("sha256", "num_threads")}
        path.write_text(json.dumps({**values, "format": 1}))
    else:
        path.write_text(manifest.seal({**values, "stream_version": version}))


class Runs:
    """Folder with `full-CASE` and `half-CASE` run directories, and how each run ended."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder, self.corpus = folder, corpus
        self.results: dict[str, str | None] = {}

    def config(self, kind: str, name: str, precision: str, **more: Any) -> dict[str, Any]:
        run_dir = self.folder / f"{kind}-{name}-{precision}"
        json, _, optimizer = name.partition("-")
        train = {"precision": precision, "optimizer": optimizer or "adamw"}
        sections: dict[str, Any] = {"train": {**train, **more.pop("train", {})}}
        return tiny_config(
            self.corpus, run_dir, deepspeed=OWN_JSON.get(json, json), **sections, **more
        ).model_dump()

    def copy(self, kind: str, name: str, precision: str) -> None:
        full = self.folder / f"full-{name}-{precision}"
        interrupted_copy(full, self.folder / f"{kind}-{name}-{precision}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Runs:
    folder = tmp_path_factory.mktemp("resume")
    runs = Runs(folder, make_corpus(folder, sample_text))
    first = run_ranks(2, pretrain_runs, [runs.config("full", *case) for case in CASES])
    assert first == [[None] * len(CASES)] * 2
    for case in CASES:
        runs.copy("half", *case)
    runs.copy("stage", "zero1", "fp32")
    runs.copy("lr", "zero1", "fp32")
    runs.copy("stream", "zero0", "fp32")
    change_stream_version(folder / "stream-zero0-fp32", STREAM_VERSION + 1)
    runs.copy("old", "zero0", "fp32")
    change_stream_version(folder / "old-zero0-fp32", None)
    runs.copy("one", "zero0", "fp32")
    other_stage = runs.config("stage", "zero1", "fp32") | {"deepspeed": "zero2"}
    other_lr = runs.config("lr", "zero1", "fp32", train={"lr": 1e-3}, seed=7)
    other_stream, no_stream = (runs.config(kind, "zero0", "fp32") for kind in ("stream", "old"))
    others = [other_stage, other_lr, other_stream, no_stream]
    configs = [runs.config("half", *case) for case in CASES] + others
    by_rank = run_ranks(2, pretrain_runs, configs)
    assert by_rank[0] == by_rank[1], "all ranks must agree, or the others hang"
    names = ["-".join(case) for case in CASES] + ["stage", "lr", "stream", "old"]
    runs.results.update(zip(names, by_rank[0], strict=True))
    ((runs.results["one-zero0"],),) = run_ranks(
        1, pretrain_runs, [runs.config("one", "zero0", "fp32")]
    )
    return runs


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    runs: Runs, case: tuple[str, str]
) -> None:
    name = "-".join(case)
    assert runs.results[name] is None
    full, half = runs.folder / f"full-{name}", runs.folder / f"half-{name}"
    expected, got = read_log(full), read_log(half)
    assert [line["step"] for line in got] == list(range(1, LAST + 1))
    for want, line in zip(expected, got, strict=True):
        assert {key: line[key] for key in SAME} == {key: want[key] for key in SAME}
    want_weights, weights = load_weights(full)[1], load_weights(half)[1]
    assert set(weights) == set(want_weights)
    for key, tensor in weights.items():
        assert torch.equal(tensor, want_weights[key]), key


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_second_half_learns(runs: Runs, case: tuple[str, str]) -> None:
    """Or equality would prove nothing about the moments of Adam."""
    folder = runs.folder / ("full-" + "-".join(case))
    middle = load_weights(folder / "checkpoints" / f"step-{MIDDLE:08d}")[1]
    last = load_weights(folder)[1]
    key = "bert.encoder.layer.0.output.dense.weight"
    assert (last[key] - middle[key]).abs().mean() > 1e-4
    losses = [line["loss"] for line in read_log(folder)]
    assert min(losses[3:]) < losses[0]


def test_stage_0_resumes_on_another_number_of_ranks(runs: Runs) -> None:
    assert runs.results["one-zero0"] is None
    got = read_log(runs.folder / "one-zero0-fp32")
    expected = read_log(runs.folder / "full-zero0-fp32")
    assert got[:MIDDLE] == expected[:MIDDLE]
    # Other dropout draws, same samples, masks and moments.
    for want, line in zip(expected[MIDDLE:], got[MIDDLE:], strict=True):
        assert line["loss"] == pytest.approx(want["loss"], abs=0.1)
        assert line["samples"] == want["samples"]


def test_another_stage_on_as_many_ranks_draws_the_same_dropout(runs: Runs) -> None:
    assert runs.results["stage"] is None
    expected = read_log(runs.folder / "full-zero1-fp32")
    for want, line in zip(expected, read_log(runs.folder / "stage-zero1-fp32"), strict=True):
        assert line["loss"] == pytest.approx(want["loss"], abs=1e-5)


def test_what_was_regrouped_is_one_note(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = described(3)  # by two ranks at stage 1
    monkeypatch.setattr(resume.dist, "world_size", lambda: 2)
    assert resume.regrouped(saved, 1, False, None) == []
    assert resume.regrouped(saved, 1, True, 3 << 20) == [
        "the checkpoint was saved by 2 ranks under ZeRO stage 1, and 2 ranks under ZeRO stage 1 "
        "with CPU offload continue it: weights, moments (3.0 MiB on rank 0), samples and masks "
        "are the same"
    ]
    monkeypatch.setattr(resume.dist, "world_size", lambda: 1)
    (note,) = resume.regrouped(saved, 3, False, 3 << 20)
    assert "and 1 rank under ZeRO stage 3 continue it" in note
    assert note.endswith("dropout draws other masks from here on")


def test_changed_settings_are_refused_with_every_difference(runs: Runs) -> None:
    message = runs.results["lr"]
    assert message is not None
    assert "seed was 42, is now 7" in message and "train.lr was 0.002, is now 0.001" in message


def test_another_optimizer_is_refused() -> None:
    old = tiny_config("c", "r", train={"optimizer": "muon"})
    now = tiny_config("c", "r", train={"optimizer": "adamw"})
    changed = resume.differences(old, now, 3)
    assert changed == ["train.optimizer was 'muon', is now 'adamw'"]
    now = tiny_config("c", "r", train={"optimizer": "muon", "adamw_lr": 1e-3})
    assert resume.differences(old, now, 3) == ["train.adamw_lr was None, is now 0.001"]


def test_another_sample_stream_is_refused_with_both_versions(runs: Runs) -> None:
    for name, version in (("stream", STREAM_VERSION + 1), ("old", 0)):
        message = runs.results[name]
        assert message is not None
        assert f"step-{MIDDLE:08d} was trained on samples and masks of stream version" in message
        assert (
            f"version {version}, but this clue_ds makes those of version {STREAM_VERSION};"
            in message
        )
        assert "--model.init" in message


def test_steps_may_change_only_where_the_past_does_not_depend_on_them() -> None:
    def changed(step: int, schedule: str, steps: int, decay: int = 0) -> list[str]:
        more = {"schedule": schedule, "decay_steps": 10 if schedule == "wsd" else 0}
        old = tiny_config("c", "r", train={"steps": 50, **more})
        now = tiny_config("c", "r", train={"steps": steps, **more})
        return resume.differences(old, now, step)

    assert changed(20, "linear", 80) == ["train.steps was 50, is now 80"]
    assert changed(40, "wsd", 80) == []
    assert changed(41, "wsd", 80) == ["train.steps was 50, is now 80"]
    assert changed(20, "wsd", 25) == ["train.steps was 50, is now 25"]


def test_what_is_only_carried_out_differently_may_change() -> None:
    old = tiny_config("c", "r")
    now = tiny_config(
        "moved",
        "elsewhere",
        train={"micro_batch_size": 4},
        log={"every": 7},
        checkpoint={"keep": 1},
    )
    assert resume.differences(old, now, 3) == []


def test_other_versions_and_threads_are_one_note(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0", "deepspeed": "0.19.8", "numpy": "2.4.0"}
    monkeypatch.setattr(resume.preflight, "versions", lambda: versions)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    saved = dataclasses.replace(described(3), versions=versions, num_threads=2)
    assert resume.environment(saved, uses_cpu=True) == []
    other = dataclasses.replace(saved, versions={**versions, "torch": "2.12.0"}, num_threads=4)
    (note,) = resume.environment(other, uses_cpu=True)
    assert "saved with torch 2.12.0 and 4 threads, and this run has torch 2.13.0 and 2 th" in note
    (note,) = resume.environment(other, uses_cpu=False)
    assert "threads" not in note
    # Earlier versions of clue_ds recorded no threads.
    assert resume.environment(dataclasses.replace(saved, num_threads=0), uses_cpu=True) == []


def test_a_retention_that_would_keep_nothing_is_refused() -> None:
    def check(has_held_out: bool = True, **keep: Any) -> None:
        config = tiny_config("c", "r", evaluate={"every": 2}, checkpoint={"every": 4, **keep})
        retention.check(config, has_held_out)

    check(keep_every=8, keep_best=True)
    with pytest.raises(UserError, match="keep_every 6 is not a multiple .* 4; set it to 8"):
        check(keep_every=6)
    with pytest.raises(UserError, match="needs held-out text"):
        check(keep_best=True, has_held_out=False)
    with pytest.raises(UserError, match="evaluate.every 2 does not divide checkpoint.every 3"):
        check(keep_best=True, every=3)
