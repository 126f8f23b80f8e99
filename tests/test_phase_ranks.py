"""Phases on two ranks, in bf16, with Muon, and with mixtures that change from phase to phase."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import make_corpus, read_log, tiny_config
from test_regroup import on_ranks, train_all
from zygote import Zygote

from clue_ds.checkpoint.masters import load_weights
from clue_ds.config import RunConfig
from clue_ds.data import Corpus, SampleStream
from clue_ds.data.build.command import shard
from clue_ds.data.stream.mixture import open_corpus
from clue_ds.errors import UserError
from clue_ds.pretrain import batches, phases, resume
from clue_ds.settings.phases import parts

STEPS, BOUNDARY, INSIDE = 8, 4, 6
# name -> DeepSpeed config and precision; all with Muon.
CASES = {
    "zero1-bf16": ("zero1", "bf16"),
    "zero2-bf16": ("zero2", "bf16"),
    "zero3": ("zero3", "fp32"),
}
SAME = ("loss", "mlm_accuracy", "grad_norm", "lr", "samples", "phase")


def in_phases(other: Path | str, later: float = 0.25) -> list[dict[str, Any]]:
    """128 and then 512 in miniature; the share of `other` goes from 0 to 0.5 to `later`."""
    longer = {"seq_length": 32, "mask_prob": 0.3}
    return [
        {"until": BOUNDARY},
        {
            "until": 7,
            "data": {**longer, "mixture": {str(other): 0.5}},
            "train": {"global_batch_size": 6, "micro_batch_size": 1},
        },
        {"data": {**longer, "mixture": {str(other): later}}, "train": {"global_batch_size": 4}},
    ]


def config(folder: Path, run_dir: Path | str, **sections: Any) -> RunConfig:
    train = {"steps": STEPS, **sections.pop("train", {})}
    values = {"phases": in_phases(folder / "other"), "checkpoint": {"every": 2}}
    return tiny_config(folder / "corpus", run_dir, train=train, **{**values, **sections})


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    """A directory with two corpora of one vocabulary: corpus and other."""
    folder = tmp_path_factory.mktemp("phases")
    make_corpus(folder, sample_text)
    documents = sample_text.strip().split("\n\n")
    draw = random.Random(1)
    text = "\n\n".join(draw.choice(documents)[::-1] for _ in range(60))
    (folder / "other.txt").write_text(text + "\n", encoding="utf-8")
    source = (str(folder / "other.txt"),)
    shard(source, output=folder / "other", vocab=folder / "vocab.txt", workers=1)
    return folder


@pytest.fixture(scope="module")
def runs(corpora: Path, zygote: Zygote) -> Path:
    """Runs on two ranks, and each as it was between two phases and inside of one, continued."""
    configs = {
        name: config(
            corpora,
            corpora / name,
            deepspeed=deepspeed,
            train={"precision": precision, "optimizer": "muon"},
        )
        for name, (deepspeed, precision) in CASES.items()
    }
    values = [one.model_dump() for one in configs.values()]
    on_ranks(zygote, 2, train_all, [values], corpora)
    again = []
    for name, one in configs.items():
        for stop in (BOUNDARY, INSIDE):
            copy = shutil.copytree(corpora / name, corpora / f"{name}-{stop}")
            for later in range(stop + 2, STEPS + 1, 2):
                shutil.rmtree(copy / "checkpoints" / f"step-{later:08d}")
            again.append({**one.model_dump(), "run_dir": str(copy)})
    on_ranks(zygote, 2, train_all, [again], corpora)
    return corpora


@pytest.mark.heavy
@pytest.mark.parametrize("stop", [BOUNDARY, INSIDE])
@pytest.mark.parametrize("name", CASES)
def test_a_run_that_resumes_equals_an_undisturbed_one(runs: Path, name: str, stop: int) -> None:
    expected, got = read_log(runs / name), read_log(runs / f"{name}-{stop}")
    assert [line["step"] for line in got] == list(range(1, STEPS + 1))
    keys = (*SAME, "samples_of/corpus", "samples_of/other")
    assert [[line[k] for k in keys] for line in got] == [
        [line[k] for k in keys] for line in expected
    ]
    weights = load_weights(runs / name)[1]
    for key, tensor in load_weights(runs / f"{name}-{stop}")[1].items():
        assert torch.equal(tensor, weights[key]), key


@pytest.mark.heavy
def test_stages_and_precisions_train_the_same_in_every_phase(runs: Path) -> None:
    """bf16 has 8 bits; what else would differ is a wrong mean over micro-batches or ranks."""
    expected = [line["loss"] for line in read_log(runs / "zero3")]
    for name, (_, precision) in CASES.items():
        got = [line["loss"] for line in read_log(runs / name)]
        assert got == pytest.approx(expected, abs=2e-4 if precision == "fp32" else 5e-2), name


@pytest.mark.heavy
def test_the_log_counts_the_samples_of_each_corpus(runs: Path) -> None:
    lines = read_log(runs / "zero1-bf16")
    assert [line["samples"] for line in lines] == [8, 16, 24, 32, 38, 44, 50, 54]
    for line in lines:
        assert line["samples_of/corpus"] + line["samples_of/other"] == line["samples"]
    others = [line["samples_of/other"] for line in lines]
    assert others[:4] == [0] * 4 and 0 < others[6] - others[3] < 18
    assert others[6] == phases_of(runs)[1].stream.samples_by_part(3)[1]


def mixture(folder: Path, share: float) -> Any:
    return open_corpus(folder / "corpus", {str(folder / "other"): share})


def phases_of(folder: Path, **sections: Any) -> list[phases.RunPhase]:
    own = config(folder, "unused", **sections)
    return phases.open_phases(own, batches.open_data(own))


def test_a_phase_reads_the_stream_of_its_mixture(corpora: Path) -> None:
    found, seed = phases_of(corpora), config(corpora, "unused").seed
    streams = [
        SampleStream(Corpus(corpora / "corpus"), 16, 8, seed),
        SampleStream(mixture(corpora, 0.5), 32, 6, phases.seed_of_order(seed, 1), mask_prob=0.3),
        SampleStream(mixture(corpora, 0.25), 32, 4, phases.seed_of_order(seed, 2), mask_prob=0.3),
    ]
    for phase, stream in zip(found, streams, strict=True):
        for step in range(phase.part.begin, phase.part.end):
            got = phase.stream.arrays(phase.batch_number(step))
            want = stream.arrays(step - phase.part.begin)
            assert all(np.array_equal(got[key], want[key]) for key in want)


def test_a_phase_goes_on_where_the_last_one_with_its_mixture_stopped() -> None:
    some, more = {"mixture": {"/a": 0.3, "/b": 0.1}}, {"mixture": {"/a": 0.4, "/b": 0.1}}
    run = tiny_config(
        "c",
        "r",
        data={"mixture": {"/a": 0.3, "/b": 0.1}},
        train={"steps": 70, "global_batch_size": 64, "micro_batch_size": 8},
        phases=[
            {"until": 10},
            {"until": 20, "data": more},
            {"until": 30, "data": some},
            {"until": 40, "data": {"mixture": {}}},
            {"until": 50, "data": {"mixture": {"/b": 0.1, "/a": 0.3}}},
            {"until": 60, "data": more, "train": {"global_batch_size": 128}},
            {"data": {"mixture": {}, "mask_prob": 0.3}},
        ],
    )
    found = parts(run.model_dump())
    assert [part.order for part in found] == [0, 1, 0, 2, 3, 1, 2]
    assert [part.first_batch for part in found] == [0, 0, 10, 0, 0, 5, 10]


def test_only_the_mixtures_of_the_past_must_stay_as_they_were(corpora: Path) -> None:
    def prints(later: float, begin: int = BOUNDARY) -> list[str]:
        changed = in_phases(corpora / "other", later)
        changed[0]["until"] = begin
        one = phases.fingerprints(phases_of(corpora, phases=changed))
        identity = resume.RunIdentity(None, None, Path(), "", True, one)  # type: ignore[arg-type]
        return [identity.corpus_fingerprint(step) for step in range(1, STEPS + 1)]

    base, other = prints(0.25), prints(0.75)
    assert base[:4] == [Corpus(corpora / "corpus").fingerprint] * 4
    assert len(set(base)) == 3 and base[4:7] == [base[4]] * 3
    assert other[:7] == base[:7] and other[7] != base[7]
    earlier = prints(0.25, begin=3)
    assert earlier[:3] == base[:3] and earlier[3] != base[3] and earlier[4] != base[4]


def test_impossible_mixtures_of_phases_are_refused(corpora: Path, tmp_path: Path) -> None:
    from clue_ds.pretrain import train

    wrong = in_phases(corpora / "other", later=1.5)
    with pytest.raises(UserError, match=r"the share 1\.5 of .*other must be a multiple of"):
        train.build(config(corpora, tmp_path / "run", phases=wrong))
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        train.build(config(corpora, tmp_path / "run", phases=in_phases(tmp_path / "nowhere")))
    pairs = [{"sentence1": "一", "sentence2": "二", "label": label} for label in ("0", "1")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    of_pairs = {
        "data": {"pairs": [str(tmp_path / "pairs.jsonl")]},
        "train": {"objective": "pair"},
    }
    with pytest.raises(UserError, match=r"phases can't have a data\.mixture with"):
        train.build(config(corpora, tmp_path / "run", **of_pairs))
    assert not (tmp_path / "run").exists()
