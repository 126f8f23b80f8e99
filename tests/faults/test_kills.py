"""Runs that are killed again and again end like undisturbed ones; so do others that go wrong.

20 SIGKILLs at moments drawn from a seed, over four ZeRO configurations: weights, moments and
states of the random generators are equal bit for bit in the end.
"""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from killer import NEVER, Moment, differences, start, state
from ranks import make_corpus, tiny_config
from torch import Tensor
from zygote import Zygote

from clue_ds import config as run_config
from clue_ds.checkpoint import manifest

STEPS, KILLS = 32, 5
ZERO3 = str(Path(__file__).resolve().parents[1] / "zero3_sharded.json")
# name -> DeepSpeed JSON, precision, number of ranks
CASES: dict[str, tuple[str, str, int]] = {
    "zero0": ("zero0", "fp32", 1),
    "zero1": ("zero1", "fp32", 2),
    "zero2-bf16": ("zero2", "bf16", 1),
    "zero3": (ZERO3, "fp32", 1),
}


# Two ranks stay in `make test`.
EACH = [one if one == "zero1" else pytest.param(one, marks=pytest.mark.heavy) for one in CASES]

# The last state of undisturbed runs, which several tests need.
TWINS: dict[str, dict[str, Tensor]] = {}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    return make_corpus(tmp_path_factory.mktemp("kills"), sample_text)


class Case:
    """A run and its undisturbed twin, each with a config file."""

    def __init__(self, name: str, folder: Path, corpus: Path) -> None:
        self.name, self.folder = name, folder
        json, precision, self.num_ranks = CASES[name]
        sections: dict[str, Any] = {
            "deepspeed": json,
            "train": {"steps": STEPS, "precision": precision},
            "checkpoint": {"every": 2, "keep": 2},
            "health": {"beat_seconds": 20, "step_seconds": 15},
        }
        for run in ("run", "twin"):
            config = tiny_config(corpus, folder / run, **sections)
            run_config.save(config, folder / f"{run}.yaml")

    def start(
        self, zygote: Zygote, moment: Moment = NEVER, run: str = "run"
    ) -> list[tuple[int, str]]:
        return start(zygote, self.num_ranks, self.folder / f"{run}.yaml", moment, self.folder)

    def equals_twin(self, zygote: Zygote) -> None:
        if self.name not in TWINS:
            ends = self.start(zygote, run="twin")
            assert [status for status, _ in ends] == [0] * self.num_ranks, ends
            TWINS[self.name] = state(self.folder / "twin")
        twin = TWINS[self.name]
        assert any("exp_avg" in name for name in twin) and any("rng" in name for name in twin)
        assert differences(state(self.folder / "run"), twin) == []


@pytest.mark.parametrize("name", EACH)
def test_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not(
    zygote: Zygote, corpus: Path, tmp_path: Path, name: str
) -> None:
    case, draw = Case(name, tmp_path, corpus), random.Random(name)
    for _ in range(KILLS):
        # Every second step is followed by a save, which takes longer than the step.
        moment = Moment(number=draw.randint(1, 3), seconds=draw.uniform(0, 0.04))
        ends = case.start(zygote, moment)
        assert [status for status, _ in ends] == [-signal.SIGKILL] * case.num_ranks, ends
    ends = case.start(zygote)
    assert [status for status, _ in ends] == [0] * case.num_ranks, ends
    case.equals_twin(zygote)


def test_a_rank_that_dies_in_deepspeeds_own_save_costs_only_the_save(
    zygote: Zygote, corpus: Path, tmp_path: Path
) -> None:
    """Rank 1 leaves a cut file; rank 0 waits for it inside DeepSpeed, and is ended."""
    case = Case("zero1", tmp_path, corpus)
    ends = case.start(zygote, Moment(number=4, ranks=[1], where="in DeepSpeed's save"))
    assert ends[1][0] == -signal.SIGKILL
    assert ends[0][0] == 71 and "rank 1 on" in ends[0][1], ends[0]
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in folder.glob("step-*")] != []
    ends = case.start(zygote)
    assert [status for status, _ in ends] == [0, 0], ends
    assert not list(folder.glob("*.tmp"))
    case.equals_twin(zygote)


def test_a_bomb_that_only_one_of_the_ranks_meets_runs_nothing_and_ends_both(
    zygote: Zygote, corpus: Path, tmp_path: Path
) -> None:
    import torch
    from test_pickles import put, with_bomb

    case = Case("zero1", tmp_path, corpus)
    assert [status for status, _ in case.start(zygote, Moment(5))] == [-signal.SIGKILL] * 2
    # The one of step 4 may still have been written in the background.
    directory = manifest.published(tmp_path / "run" / "checkpoints")[0]
    shutil.copytree(directory, tmp_path / "intact")
    (shard,) = directory.glob("deepspeed/*rank_1_*optim_states.pt")
    content = torch.load(shard, weights_only=False)
    key = shard.relative_to(directory).as_posix()
    put(directory, key, with_bomb(content, tmp_path / "marker", zipped=True))
    ends = case.start(zygote)
    assert [status for status, _ in ends] == [2, 2], ends
    said = "".join(text for _, text in ends)
    assert shard.name in said and "Nothing in it was run" in said and "Traceback" not in said
    assert not (tmp_path / "marker").exists()
