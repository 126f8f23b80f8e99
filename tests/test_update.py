"""An update on the device is that of clipping and skipping on the host: the same to 1e-6."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks, tiny_config
from torch import Tensor, nn

from clue_ds.config import TrainSection
from clue_ds.pretrain import ds_json, optim
from clue_ds.pretrain.engine import Engine, start

# Of the inputs in each step: small gradients, large ones that are clipped, and two without an end.
SCALES = (0.1, 3.0, math.nan, math.inf, 0.1, 10.0, math.nan, 1.0, 0.2)
LR, CLIPPING, TOLERANCE = 1e-2, 1.0, 1e-6
STAGES = ("zero0", "zero1")


class Regression(nn.Module):
    """A network whose gradients are as large as its inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.dense = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.dense(x) - x.flip(1)).square().mean()


def inputs(step: int) -> Tensor:
    draws = torch.Generator().manual_seed(step)
    return SCALES[step] * torch.randn(16, 8, generator=draws)


def settings(deepspeed: str) -> TrainSection:
    sizes = {"global_batch_size": 16, "micro_batch_size": 16}
    train = {**sizes, "gradient_clipping": CLIPPING, "weight_decay": 0.1, "precision": "fp32"}
    return tiny_config("corpus", "run", deepspeed=deepspeed, train=train).train


def on_the_host(train: TrainSection) -> dict[str, Any]:
    """What torch does with clip_grad_norm_, an `if`, and an AdamW that is not fused."""
    model = Regression()
    groups = optim.parameter_groups(model, train.weight_decay)
    betas = (train.beta1, train.beta2)
    adamw = torch.optim.AdamW(groups, lr=LR, betas=betas, eps=train.eps, foreach=False)
    norms, num_skipped = [], 0
    for step in range(len(SCALES)):
        adamw.zero_grad()
        model(inputs(step)).backward()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), CLIPPING))
        norms.append(norm)
        if math.isfinite(norm):
            adamw.step()
        else:
            num_skipped += 1
    state = adamw.state[model.dense.weight]
    return {
        "weights": [p.tolist() for p in model.parameters()],
        "moment": state["exp_avg_sq"].flatten().tolist(),
        "count": float(state["step"]),
        "norms": norms,
        "skipped": num_skipped,
    }


def on_the_device() -> list[dict[str, Any]]:
    """On a rank: the same with the engine, at each stage."""
    device, found = start(), []
    for deepspeed in STAGES:
        train = settings(deepspeed)
        engine = Engine(Regression(), train, ds_json.read(deepspeed), deepspeed, device)
        assert optim.updates_on_device(train, engine.stage, engine.offload)
        norms, skipped = [], []
        for step in range(len(SCALES)):
            engine.backward(engine.forward(x=inputs(step)))
            norms.append(float(engine.step(LR)))
            # Asked for at some steps only: the count is right all the same.
            skipped += [step] if step % 3 == 2 and engine.skipped_update else []
        adamw = engine.optimizer.optimizer if engine.stage else engine.optimizer
        state = copy.copy(next(iter(adamw.state.values())))
        found.append(
            {
                "weights": [p.tolist() for p in engine.module.parameters()],
                "moment": state["exp_avg_sq"].flatten()[:64].tolist(),
                "count": float(state["step"]),
                "norms": norms,
                "skipped": engine.skipped_steps,
                "asked": skipped,
            }
        )
        engine.close(leaves=False)
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    (found,) = run_ranks(1, on_the_device)
    return {
        name: (on_the_host(settings(name)), ours) for name, ours in zip(STAGES, found, strict=True)
    }


@pytest.mark.parametrize("stage", STAGES)
def test_clipping_and_skipping_on_the_device_are_those_of_the_host(both: Any, stage: str) -> None:
    host, device = both[stage]
    for ours, theirs in zip(device["weights"], host["weights"], strict=True):
        torch.testing.assert_close(
            torch.tensor(ours), torch.tensor(theirs), atol=TOLERANCE, rtol=TOLERANCE
        )
    torch.testing.assert_close(
        torch.tensor(device["moment"]), torch.tensor(host["moment"]), atol=TOLERANCE, rtol=1e-5
    )
    for ours, theirs in zip(device["norms"], host["norms"], strict=True):
        assert math.isfinite(ours) == math.isfinite(theirs)
        assert not math.isfinite(ours) or ours == pytest.approx(theirs, rel=1e-6)
    # The bias correction counts only updates that were made.
    assert device["count"] == host["count"] == len(SCALES) - 3
    assert device["skipped"] == host["skipped"] == 3
    assert device["asked"] == [2]
    assert any(0 < norm < CLIPPING for norm in host["norms"])
    assert any(CLIPPING < norm < math.inf for norm in host["norms"])


def test_a_checkpoint_of_another_device_is_continued_with_the_fused_update(tmp_path: Path) -> None:
    """Loading puts the settings of the saved groups in place, also what is not a setting."""
    parameter = nn.Parameter(torch.ones(3))
    adamw = torch.optim.AdamW([parameter], lr=LR, fused=True)
    saved = torch.optim.AdamW([parameter], lr=LR, foreach=False)
    parameter.grad = torch.ones(3)
    saved.step()
    adamw.load_state_dict(saved.state_dict())
    optim.keep_fused(adamw, True)
    adamw.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    before = parameter.detach().clone()
    adamw.step()
    assert torch.equal(parameter, before) and float(adamw.state[parameter]["step"]) == 1
