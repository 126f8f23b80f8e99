"""A loss spike: a warning, the end of the run, or a rollback that gives the same every time."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import make_corpus, read_log, run_ranks, tiny_config

from clue_ds.checkpoint.masters import load_weights
from clue_ds.data.stream.loader import Skip, batch_number
from clue_ds.errors import UserError
from clue_ds.pretrain.anomalies import spikes
from clue_ds.pretrain.anomalies.spikes import Spikes
from clue_ds.pretrain.writers import Writers

STEPS, EVERY, BAD = 20, 4, 13
# BAD is 3 batches after the first one that is skipped.
SKIP = Skip(10, 5)
TRAIN = {
    "steps": STEPS,
    "warmup_steps": 2,
    "spike_window": 10,
    "spike_zscore": 20,
    "rollback_steps": 3,
    "rollback_batches": 2,
    "max_rollbacks": 2,
}
ZERO3 = str(Path(__file__).with_name("zero3_sharded.json"))
STAGES = {
    "zero0": ("zero0", "fp32"),
    "zero1": ("zero1", "fp32"),
    "zero2-bf16": ("zero2", "bf16"),
    "zero3": (ZERO3, "fp32"),
}
SAME = ("loss", "mlm_accuracy", "grad_norm", "lr", "samples")


def spoil(run: Any, bad: list[int]) -> None:
    """The loss on these batches of the stream is ten times as large, and so is its gradient."""
    ranks = range(torch.distributed.get_world_size())
    rows = [
        row
        for number in bad
        for rank in ranks
        for row in run.stream.batch(number, rank, len(ranks))["input_ids"].tolist()
    ]
    is_bad = [False]

    def look(module: Any, arguments: Any, named: Any) -> None:
        is_bad[0] = named["input_ids"][0].tolist() in rows

    def enlarge(module: Any, arguments: Any, output: Any) -> Any:
        if is_bad[0]:
            return output._replace(loss=output.loss * 10)
        return output

    run.engine.module.register_forward_pre_hook(look, with_kwargs=True)
    run.engine.module.register_forward_hook(enlarge)


class Notes(list[str]):
    """What a run says to the user; a rollback makes new writers."""

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Writers, "note", lambda writers, text: self.append(text))
            yield


def ranks_meet_it(
    cases: list[tuple[dict[str, Any], list[int], list[int] | None]],
) -> list[tuple[str | None, list[str]]]:
    """On every rank: error and notes of each run, with these bad batches; with a skip, the run
    skips that from the beginning, without a rollback."""
    from clue_ds import config as run_config
    from clue_ds.pretrain import train

    results = []
    for values, bad, skip in cases:
        error, notes = None, Notes()
        run = train.build(run_config.validate(values, "test config"))
        spoil(run, bad)
        if skip is not None:
            run.spikes = Spikes(run.config, None, (Skip(*skip),))
            run.loader.close()
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
            run.loader = train.Loader(run.stream, rank, world_size, 0, None, run.spikes.skips)
        with notes.collected():
            try:
                train.train(run)
            except UserError as refusal:
                error = str(refusal)
        run.loader.close()
        run.writers.close()
        results.append((error, notes))
    return results


class Outcome:
    """Folder with the run directories, and error and notes of each run."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder, self.corpus = folder, corpus
        self.results: dict[str, tuple[str | None, list[str]]] = {}

    def run(self, cases: dict[str, tuple[dict[str, Any], list[int], list[int] | None]]) -> None:
        arguments = []
        for name, (sections, bad, skip) in cases.items():
            train = {**TRAIN, **sections.get("train", {})}
            checkpoint = {"every": EVERY, "keep": 9, **sections.get("checkpoint", {})}
            log = sections.get("log", {"every": 3})
            values = {"deepspeed": sections.get("deepspeed", "zero1"), "log": log}
            run_dir = self.folder / name
            config = tiny_config(self.corpus, run_dir, train=train, checkpoint=checkpoint, **values)
            arguments.append((config.model_dump(), bad, skip))
        by_rank = run_ranks(2, ranks_meet_it, arguments)
        for name, first, second in zip(cases, *by_rank, strict=True):
            assert first[0] == second[0], name
            self.results[name] = (first[0], first[1])

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_weights(self.folder / name)[1]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Outcome:
    folder = tmp_path_factory.mktemp("spikes")
    outcome = Outcome(folder, make_corpus(folder, sample_text))
    cases: dict[str, Any] = {}
    for name, (json, precision) in STAGES.items():
        own = {"deepspeed": json, "train": {"precision": precision, "on_spike": "rollback"}}
        cases[f"back {name}"] = (own, [BAD], None)
        cases[f"reference {name}"] = (own, [], list(SKIP))
    policies = [("warn", [BAD]), ("stop", [BAD]), ("rollback", [*range(BAD, 60)])]
    for policy, bad in policies:
        cases[f"only {policy}"] = ({"train": {"on_spike": policy}}, bad, None)
    # The run is given up before its first checkpoint, so there is none to go back to.
    early = {"train": {"on_spike": "rollback"}, "checkpoint": {"every": 12}}
    cases["early"] = (early, [BAD], None)
    outcome.run(cases)
    # Runs that died: long after the rollback, and shortly before it, where another checkpoint was.
    own = {"train": {"on_spike": "rollback"}}
    for name, source, steps in (("after", "back", 16), ("before", "only stop", 12)):
        source = "back zero1" if source == "back" else source
        shutil.copytree(folder / source, folder / name)
        for directory in (folder / name / "checkpoints").glob("step-*"):
            if int(directory.name[5:]) > steps:
                shutil.rmtree(directory)
    late = [BAD]
    outcome.run({"after": (own, late, None), "before": ({**own, "log": {"every": 1}}, late, None)})
    return outcome


def test_the_batch_of_a_step_is_a_function_of_step_and_skips() -> None:
    skips = [Skip(10, 5), Skip(10, 2), Skip(30, 100)]
    assert [batch_number(step, skips) for step in (0, 9, 10, 29, 30)] == [0, 9, 17, 36, 137]


@pytest.mark.parametrize("name", STAGES)
def test_a_rollback_equals_a_run_that_never_saw_those_batches(outcome: Outcome, name: str) -> None:
    error, notes = outcome.results[f"back {name}"]
    assert error is None
    assert any(note.startswith("resuming after step 8 from ") for note in notes), notes
    expected, got = outcome.weights(f"reference {name}"), outcome.weights(f"back {name}")
    for key, tensor in expected.items():
        assert torch.equal(tensor, got[key]), key
    lines = [
        [{key: line[key] for key in ("step", *SAME)} for line in read_log(outcome.folder / run)]
        for run in (f"reference {name}", f"back {name}")
    ]
    assert [line["step"] for line in lines[1]] == sorted({line["step"] for line in lines[1]})
    assert lines[1][-1] == lines[0][-1]
    assert read_log(outcome.folder / f"back {name}")[-1]["skipped_batches"] == SKIP.num_batches


def test_a_rollback_says_which_samples_it_skips(outcome: Outcome) -> None:
    notes = outcome.results["back zero1"][1]
    (note,) = [note for note in notes if "; rollback " in note]
    assert note.startswith("the loss of step 14 (samples 104 to 111 of the stream) is ")
    assert "standard deviations above the mean" in note
    assert (
        "rollback 1 of 2: the steps from 11 on are trained again, without 5 batches "
        "(samples 80 to 119 of the stream)" in note
    )


@pytest.mark.parametrize("name", ["after", "before"])
def test_a_run_that_dies_near_a_rollback_ends_the_same(outcome: Outcome, name: str) -> None:
    error, notes = outcome.results[name]
    assert error is None
    assert any("rollback 1 of 2" in note for note in notes) == (name == "before")
    expected, got = outcome.weights("reference zero1"), outcome.weights(name)
    for key, tensor in expected.items():
        assert torch.equal(tensor, got[key]), key
    assert read_log(outcome.folder / name)[-1]["skipped_batches"] == SKIP.num_batches


def test_too_many_rollbacks_end_the_run(outcome: Outcome) -> None:
    error, notes = outcome.results["only rollback"]
    assert sum("; rollback " in note for note in notes) == 2
    assert error is not None and "after 2 rollbacks (train.max_rollbacks 2)" in error
    assert "smaller train.lr" in error


def test_stop_names_the_samples_and_saves_nothing_of_it(outcome: Outcome) -> None:
    error, _ = outcome.results["only stop"]
    assert error is not None and "the loss of step 14 (samples 104 to 111 of" in error
    assert "--train.on_spike rollback" in error
    steps = [path.name for path in (outcome.folder / "only stop" / "checkpoints").glob("step-*")]
    assert max(steps) == "step-00000012"


def test_a_warning_is_given_once_and_the_run_goes_on(outcome: Outcome) -> None:
    error, notes = outcome.results["only warn"]
    assert error is None
    (note,) = [note for note in notes if "standard deviations" in note]
    assert note.startswith("warning: the loss of step 14 ") and note.endswith("; the run goes on")
    error, notes = outcome.results["early"]
    assert error is None
    assert any("there is no checkpoint yet to go back to; the run goes on" in n for n in notes)


def test_a_falling_or_noisy_or_constant_loss_is_no_spike() -> None:
    config = tiny_config("c", "r", train={"steps": 10**6, "warmup_steps": 2})
    draw = random.Random(0)
    seen = Spikes(config)
    falling = [3 + 6 * 0.99**n + draw.gauss(0, 0.2) for n in range(3_000)]
    known_by_heart = [0.001 + draw.expovariate(1) / 1_000 for _ in range(1_000)]
    losses = list(enumerate([*falling, *known_by_heart], start=1))
    assert seen.look(losses) is None
    spike = seen.look([(4_001, 0.001), (4_002, 9.0), (4_003, 12.0)])
    assert spike is not None and spike.step == 4_002


def test_too_few_checkpoints_for_a_rollback_are_refused() -> None:
    def check(every: int, keep: int, **train: Any) -> None:
        checkpoint = {"every": every, "keep": keep}
        log = {"every": 10}
        values = {"on_spike": "rollback", **train}
        spikes.check_retention(tiny_config("c", "r", train=values, checkpoint=checkpoint, log=log))

    check(1_000, 2)
    check(20, 7)
    check(20, 1, on_spike="warn")
    with pytest.raises(UserError, match="keeps none that is as old; set checkpoint.keep to 2"):
        check(1_000, 1)
    with pytest.raises(UserError, match="set checkpoint.keep to 7"):
        check(20, 6)
