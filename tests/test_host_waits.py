"""Between two log lines a step reads no value of the device on the host.

On a GPU each such read waits until the device has done all its work. Counted here on a CPU, where
the same operations are dispatched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import make_corpus, run_ranks, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from clue_ds.pretrain import train

TEXT = "今天的天气很好。\n我们一起去公园。\n\n公园里有很多花。\n大家都很高兴。\n"
# Operations whose result, or its shape, the host must know before it can go on.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}
# These read a batch that is still in host memory; key_mask does so only on a CPU.
ON_HOST = ("Meter.add_batch", "without_full_lengths", "key_mask")
STEPS = 6
# The updates that are made on the device (optim.updates_on_device).
CASES = (("zero0", "fp32"), ("zero1", "fp32"), ("zero1", "bf16"))


class HostWaits(TorchDispatchMode):
    """Collects, for each wait, the functions of ours that lead to it."""

    def __init__(self) -> None:
        super().__init__()
        self.by_step: list[list[str]] = [[]]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.overloadpacket.__name__ in WAITS:
            frame, names = sys._getframe(1), []
            while frame is not None:
                if frame.f_globals.get("__name__", "").startswith("clue_ds."):
                    names.append(frame.f_code.co_qualname)
                frame = frame.f_back
            if not names or not names[0].startswith(ON_HOST):
                self.by_step[-1].append(" < ".join(names))
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"), TEXT)


def waits_of_a_run(corpus: str, run_dir: str, deepspeed: str, precision: str) -> list[list[str]]:
    """The waits of every step of a run that logs its first and its last one only."""
    config = tiny_config(
        corpus,
        run_dir,
        deepspeed=deepspeed,
        train={"precision": precision, "steps": STEPS, "gradient_clipping": 0.5},
        log={"every": 1_000, "seconds": 1e6},
        checkpoint={"every": 1_000},
    )
    run, waits = train.build(config), HostWaits()
    end_of_step: Callable[[int], bool] = run.watch.step

    def step(done: int) -> bool:
        waits.by_step.append([])
        return end_of_step(done)

    run.watch.step = step  # type: ignore[method-assign]
    with run.saver, waits:
        train.train(run)
    run.loader.close()
    run.writers.close()
    run.engine.close(leaves=False)
    return waits.by_step


def waits_by_case(corpus: str, folder: str) -> list[list[list[str]]]:
    """On a rank: the waits of a run in each case."""
    return [waits_of_a_run(corpus, f"{folder}/{'-'.join(case)}", *case) for case in CASES]


def test_nothing_waits_between_log_lines(corpus: Path, tmp_path: Path) -> None:
    (found,) = run_ranks(1, waits_by_case, str(corpus), str(tmp_path))
    for case, waits in zip(CASES, found, strict=True):
        # A step's share begins when the step before it has ended; the first and last are logged.
        assert waits[1], f"{case}: the line of the first step reads its figures"
        assert waits[2 : STEPS - 1] == [[]] * (STEPS - 3), case
