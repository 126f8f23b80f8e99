"""What the faults of test_save_faults.py do to a plain `engine.save_checkpoint` of DeepSpeed.

An expected result, and the reason for our own protocol: it syncs nothing, and it writes `latest` in
place. After a loss of power behind a save that has returned, `latest` names files that are cut off,
and the run can't be loaded although the checkpoint before it is there untouched.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from injector import KILLED, Fault, run

from clue_ds.checkpoint.deepspeed_import import import_deepspeed

# Crash points, counted back from the first operation after the save: where the damage is.
POINTS = (0, 1)


def plain_engine() -> Any:
    """A real engine at ZeRO stage 1; built in a child, because gloo does not survive a fork."""
    torch.set_num_threads(1)
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    deepspeed = import_deepspeed()
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    deepspeed.init_distributed(verbose=False)
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 40)
    values = {
        "train_batch_size": 2,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.Adam(model.parameters())
    return deepspeed.initialize(model=model, optimizer=optimizer, config=values)[0]


def train(engine: Any, steps: int) -> None:
    for _ in range(steps):
        engine.backward(engine(torch.ones(2, 40)).square().sum())
        engine.step()


def state(engine: Any) -> list[float]:
    """The number of updates, and sums of the weights and of the moments."""
    (moments,) = engine.optimizer.optimizer.state.values()
    weights = engine.optimizer.single_partition_of_fp32_groups[0]
    return [
        engine.global_steps,
        float(weights.double().sum()),
        float(moments["exp_avg"].double().sum()),
    ]


def save_after(folder: Path, steps: int) -> None:
    """A run that makes `steps` updates from the beginning and saves."""
    engine = plain_engine()
    train(engine, steps)
    engine.save_checkpoint(str(folder / "run"))
    (folder / f"state-{steps}").write_text(json.dumps(state(engine)))


def resume(folder: Path) -> None:
    """Load what is there, and leave the state in a file, or the word "nothing"."""
    engine = plain_engine()
    path, _ = engine.load_checkpoint(str(folder / "run"))
    found = "nothing" if path is None else state(engine)
    (folder / "found").write_text(json.dumps(found))


def outcome(folder: Path) -> str:
    """intact, partial (of neither step), nothing (a run would start over), or an error."""
    status, _, text = run(folder / "run", lambda: resume(folder), Fault())
    if status != 0:
        return f"error: {text.strip().splitlines()[-1]}"
    found = json.loads((folder / "found").read_text())
    if found == "nothing":
        return found
    states = [json.loads((folder / f"state-{step}").read_text()) for step in (1, 2)]
    return "intact" if found in states else "partial"


def crashed(folder: Path) -> dict[int, str]:
    """The outcome after a loss of power at each of POINTS in a second save."""
    run_dir = folder / "run"

    def saves_and_goes_on() -> None:
        save_after(folder, 2)
        (run_dir / "log").mkdir()

    _, total, text = run(run_dir, saves_and_goes_on, Fault())
    assert outcome(folder) == "intact", text
    found = {}
    for at in (total - point for point in POINTS):
        shutil.rmtree(run_dir)
        shutil.copytree(folder / "saved", run_dir)
        status, _, text = run(run_dir, saves_and_goes_on, Fault(at, power_loss=True))
        assert status == KILLED, text
        found[total - at] = outcome(folder)
    return found


def test_the_same_killer_finds_damage_that_a_plain_save_leaves(tmp_path: Path) -> None:
    import_deepspeed()  # once, for all children
    (tmp_path / "run").mkdir()
    status, _, text = run(tmp_path / "run", lambda: save_after(tmp_path, 1), Fault())
    assert status == 0, text
    shutil.copytree(tmp_path / "run", tmp_path / "saved")
    found = crashed(tmp_path)
    assert found[1] == "intact"
    assert found[0] != "intact", "it would be, if save_checkpoint synced what it writes"
