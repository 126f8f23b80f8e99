"""The FLOP rule, the meter's sums, and log files that a resume doesn't spoil."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from clue_ds import presets
from clue_ds.errors import UserError
from clue_ds.metrics import (
    Meter,
    Writers,
    flops_per_token,
    format_line,
    format_seconds,
    peak_flops,
    truncate_log,
)

# MFLOP a token with V = 8,021 and p = 0.15, at 128 and 512: the published rule's own table, which
# is rounded to three digits.
TABLE = [
    ("roberta_tiny_clue", 128, 32.3),
    ("roberta_tiny_clue", 512, 38.0),
    ("roberta_tiny3l768_clue", 128, 137),
    ("roberta_tiny3l768_clue", 512, 148),
    ("bert_base_clue", 128, 530),
    ("bert_base_clue", 512, 572),
    ("roberta_large_clue", 128, 1858),
    ("roberta_large_clue", 512, 1971),
]


@pytest.mark.parametrize(("preset", "length", "mflop"), TABLE)
def test_flops_per_token_is_the_rule_of_the_field(preset: str, length: int, mflop: float) -> None:
    flops = flops_per_token(presets.get(preset), s_eff=length, mask_prob=0.15)
    assert flops / 1e6 == pytest.approx(mflop, rel=5e-3)


def a_batch(lengths: list[int], num_predicted: int) -> dict[str, torch.Tensor]:
    labels = torch.full((len(lengths), 4), -100)
    labels.view(-1)[:num_predicted] = 7
    return {"lengths": torch.tensor(lengths), "masked_labels": labels}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A800-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090 D", 147e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("a device of tomorrow", None),
    ],
)
def test_a_peak_is_found_by_the_names_that_drivers_give(
    name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == peak
    assert peak_flops(torch.device("cpu")) is None


def test_meter_counts_real_tokens_and_means_over_parts_and_steps() -> None:
    meter = Meter(presets.get("roberta_tiny_clue"), torch.device("cpu"))
    for losses, correct in (([4.0, 2.0], [1, 2]), ([1.0, 1.0], [3, 0])):
        meter.add_batch(a_batch([8, 4], 6))
        for loss, hits in zip(losses, correct, strict=True):
            meter.add_micro_batch(torch.tensor(loss), torch.tensor(hits), share=0.5)
    line = meter.flush(10, grad_norm=torch.tensor(2.5))
    assert line["step"] == 10
    assert line["loss"] == pytest.approx((3.0 + 1.0) / 2)
    assert line["mlm_accuracy"] == pytest.approx(6 / 12)
    assert line["grad_norm"] == 2.5
    assert line["mfu"] is None
    assert line["tokens_per_second"] * line["seconds_per_step"] * 2 == pytest.approx(24)
    assert 0 < line["cpu_seconds_per_step"]


def test_a_loss_that_is_no_number_names_its_step() -> None:
    meter = Meter(presets.get("roberta_tiny_clue"), torch.device("cpu"))
    for loss in (3.0, float("nan"), 3.0):
        meter.add_batch(a_batch([8], 1))
        meter.add_micro_batch(torch.tensor(loss), torch.tensor(0), share=1.0)
    with pytest.raises(UserError, match="loss is nan at step 9: training diverged"):
        meter.flush(10, 1.0)


def line_at(step: int) -> dict[str, float | None]:
    return {
        "step": step,
        "loss": 5.0 - step / 10,
        "mlm_accuracy": 0.25,
        "lr": 1e-4,
        "grad_norm": 1.5,
        "tokens_per_second": 12345.6,
        "mfu": None,
        "data_wait_ms": 0.25,
        "seconds_per_step": 2.0,
        "memory_gib": 1.0,
        "samples": 8 * step,
    }


def test_log_has_each_step_once_after_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Writers(tmp_path, total_steps=9, start_step=0, tensorboard=True)
    for step in range(1, 8):
        first.write(line_at(step))
    first.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # the run died while it wrote
    second = Writers(tmp_path, total_steps=9, start_step=4, tensorboard=True)
    for step in range(5, 10):
        second.write(line_at(step))
    second.close()
    lines = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    elapsed = [line["elapsed_s"] for line in lines]
    assert elapsed == sorted(elapsed)
    console = capsys.readouterr().out.splitlines()
    assert len(console) == 12, "one line a step, not folded where there is no terminal"
    assert "step 9/9  loss 4.1000  acc 25.00%  lr 1.00e-04" in console[-1]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 10))


def test_log_of_a_new_run_in_an_old_directory_starts_empty(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 3}\n')
    assert truncate_log(path, 0) == []
    assert path.read_text() == ""


def test_eta_counts_what_is_left() -> None:
    assert "eta 3:20" in format_line(line_at(100), total_steps=200)
    assert format_seconds(59.4) == "0:59"
    assert format_seconds(3661) == "1:01:01"
