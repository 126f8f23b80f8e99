"""The FLOP rule, the meter's sums, and the form of a log line."""

from __future__ import annotations

import pytest
import torch

from clue_ds import presets
from clue_ds.errors import UserError
from clue_ds.metrics import (
    Meter,
    Pulse,
    describe_seconds,
    flops_per_token,
    format_line,
    format_seconds,
    peak_flops,
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
    # The means were over 8 slots, of which 6 are used.
    assert line["loss"] == pytest.approx((3.0 + 1.0) / 2 * 8 / 6)
    assert line["mlm_accuracy"] == pytest.approx(6 / 12)
    assert line["grad_norm"] == 2.5
    assert line["mfu"] is None
    assert line["tokens_per_second"] * line["seconds_per_step"] * 2 == pytest.approx(24)
    assert 0 < line["cpu_seconds_per_step"]


def test_a_line_in_between_leaves_the_next_regular_line_as_it_was() -> None:
    lines = []
    for looks in (False, True):
        meter = Meter(presets.get("roberta_tiny_clue"), torch.device("cpu"))
        for step, loss in enumerate((4.0, 2.0, 0.0), 1):
            meter.add_batch(a_batch([8], 2))
            meter.add_micro_batch(torch.tensor(loss), torch.tensor(1), share=1.0)
            if looks and step < 3:
                line = meter.flush(step, 1.0, is_regular=False)
                assert line["loss"] == (8.0, 6.0)[step - 1]
        line = meter.flush(3, 1.0)
        lines.append({key: line[key] for key in ("step", "loss", "mlm_accuracy")})
    assert lines[0] == lines[1] == {"step": 3, "loss": 4.0, "mlm_accuracy": 0.5}


def test_the_loss_is_a_mean_over_predictions_and_pairs_of_updates_that_were_made() -> None:
    """A third step, whose gradient was not finite, is left out."""
    meter = Meter(presets.get("roberta_tiny_clue"), torch.device("cpu"))
    for mlm_sum, num_predicted, pair_sum in ((9.0, 3, 1.0), (5.0, 4, 2.0), (float("inf"), 1, 7.0)):
        batch = a_batch([8, 4], num_predicted)
        meter.add_batch({**batch, "next_sentence_label": torch.tensor([1, -100])})
        # As the model divides: by 8 slots, and by 2 rows, of which one is a pair.
        loss = torch.tensor(mlm_sum / 8 + pair_sum / 2)
        meter.add_micro_batch(loss, torch.tensor(1), 1.0, torch.tensor([pair_sum, 1.0, 1.0]))
    meter.leave_out_step()
    line = meter.flush(3, 1.0)
    assert line["loss"] == pytest.approx((9.0 + 5.0) / 7 + (1.0 + 2.0) / 2)
    assert line["pair_loss"] == pytest.approx(1.5)
    assert meter.step_losses == [(1, 9 / 8 + 0.5), (2, 5 / 8 + 1.0)]


def test_the_loss_is_the_same_without_padding() -> None:
    losses = []
    for further in ({}, {"bounds": torch.tensor([8, 4, 4]), "sizes": torch.zeros(2, 3)}):
        meter = Meter(presets.get("roberta_tiny_clue"), torch.device("cpu"))
        batch = a_batch([8, 4], 6)
        if further:  # two micro-batches of 4 slots, with the labels that are used
            batch["masked_labels"] = batch["masked_labels"][batch["masked_labels"] >= 0]
        meter.add_batch({**batch, **further})
        meter.add_micro_batch(torch.tensor(3.0), torch.tensor(1), share=1.0)
        losses.append(meter.flush(1, 1.0)["loss"])
    assert losses[0] == losses[1] == 4.0


def test_lines_are_due_after_the_first_step_and_after_some_seconds() -> None:
    now = 100.0
    pulse = Pulse(30.0, lambda: now)
    assert pulse.is_due(False) and not pulse.is_due(False)
    now = 129.0
    assert not pulse.is_due(False) and pulse.is_due(True)
    now = 158.0
    assert not pulse.is_due(False)
    now = 159.0
    assert pulse.is_due(False) and not pulse.is_due(False)


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


def test_eta_counts_what_is_left() -> None:
    assert "eta 3:20" in format_line(line_at(100), total_steps=200)
    assert format_seconds(59.4) == "0:59"
    assert format_seconds(3661) == "1:01:01"
    spoken = [describe_seconds(seconds) for seconds in (0.031, 45, 700, 12_600, 941_760)]
    assert spoken == ["0.03 seconds", "45 seconds", "12 minutes", "3.5 hours", "10.9 days"]
