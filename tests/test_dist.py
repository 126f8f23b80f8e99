"""Ranks under each launcher, sums and agreement between real processes, one report of an error."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from ranks import run_ranks

from clue_ds import dist
from clue_ds.errors import UserError
from clue_ds.pretrain.auto.precision import precision_on

LAUNCHERS = {
    "none": ({}, (0, 1, 0)),
    "deepspeed, torchrun": ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
    "openmpi": (
        {
            "OMPI_COMM_WORLD_RANK": "3",
            "OMPI_COMM_WORLD_SIZE": "8",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        },
        (3, 8, 1),
    ),
    "srun": (
        {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"},
        (3, 8, 1),
    ),
    "a batch script of Slurm's": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1, 0)),
    "empty variables": ({"RANK": "", "SLURM_STEP_NUM_TASKS": "", "SLURM_PROCID": ""}, (0, 1, 0)),
    "mpich": ({"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1"}, (3, 8, 1)),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_rank_under_each_launcher(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables, expected = LAUNCHERS[launcher]
    for names in (dist.RANK_VARIABLES, dist.WORLD_SIZE_VARIABLES, dist.LOCAL_RANK_VARIABLES):
        for name in names:
            monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (dist.rank(), dist.world_size(), dist.local_rank()) == expected


def test_a_rank_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UserError, match="RANK='first' is not a number"):
        dist.rank()


def ranks_communicate() -> dict[str, Any]:
    from clue_ds.pretrain.engine import start

    start()
    result = {
        "sum": dist.all_reduce([dist.rank() + 1.0, 0.1]),
        "broadcast": dist.broadcast({"from": dist.rank()}),
    }
    dist.agree(None)
    try:
        dist.agree("its disk is full" if dist.rank() == 1 else None)
    except UserError as error:
        result["error"] = str(error)
    return result


def test_ranks_sum_broadcast_and_agree() -> None:
    results = run_ranks(3, ranks_communicate)
    assert results[0]["sum"] == pytest.approx([6.0, 0.3])
    assert results[0]["broadcast"] == {"from": 0}
    assert results[0]["error"] == "rank 1: its disk is full"
    assert results[0] == results[1] == results[2]


def test_other_ranks_let_rank_0_report_first(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for rank, message in (("0", "no corpus"), ("2", "rank 2: no corpus")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(UserError) as error, dist.report_errors_once():
            raise UserError("no corpus")
        assert str(error.value) == message
    assert waited == [dist.SECONDS_FOR_RANK_0_TO_REPORT]


def test_a_rank_that_stopped_on_request_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `clue-ds launch`, rank 1 used to stay 10 s longer than rank 0."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit), dist.report_errors_once():
        dist.report_end(stopped=True)
    assert not waited


def test_the_device_is_torchs_accelerator_of_any_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one: which calls of torch are made (tests/gpu uses a real GPU)."""
    assert dist.device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    xpu = torch.device("xpu")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: xpu)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda device: f"the {device}")
    assert dist.device() == xpu and dist.device_name(dist.device()) == "the xpu"
    for supported, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda answer=supported: answer)
        assert precision_on(xpu)[0] == precision
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert dist.device().type == "cpu" and dist.device_name(dist.device()) == "cpu"


def test_a_block_that_draws_leaves_the_generator_as_it_was() -> None:
    before = torch.get_rng_state()
    with dist.fork_random_state(torch.device("cpu")):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
