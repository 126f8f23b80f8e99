"""The metrics of a run: meters, the FLOP rule, and the form of a log line.

Guarantees: loss and accuracy cover all ranks and all steps since the last line; throughput counts
real tokens only and excludes the time spent on saving; MFU is null if the peak of the device is
unknown.

Rejected: DeepSpeed's flops profiler (it doesn't see flash attention and Triton operators); a
synchronization with the device at every step, only to print a loss that nobody reads.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from clue_ds import dist
from clue_ds.errors import UserError
from clue_ds.presets import ModelConfig

if TYPE_CHECKING:  # `clue-ds status` reads log lines without it
    import torch
    from torch import Tensor

# Files of a run directory: a line per log line, and one for each start, save and end.
LOG, EVENTS = "log.jsonl", "events.jsonl"

# Dense tensor-core FLOP/s in bf16 (V100: fp16) with fp32 sums, by a substring of the device's name.
# The first match counts, so longer names come first. From NVIDIA's data sheets and white papers.
PEAK_FLOPS = (
    ("B200", 2250e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H800 PCIe", 756e12),
    ("H200", 989e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L20", 119.5e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("RTX 4090 D", 147e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("V100-PCIE", 112e12),
    ("V100", 125e12),
)


def flops_per_token(config: ModelConfig, s_eff: float, mask_prob: float) -> float:
    """Useful FLOPs per real token, forward and backward; a multiply-add counts as 2.

    `s_eff` = sum(len^2) / sum(len) over the sequences; `mask_prob` is the share of tokens that the
    MLM head sees. Padding, head work on other tokens and recomputation don't count as useful.
    """
    layers, hidden, vocab = config.num_hidden_layers, config.hidden_size, config.vocab_size
    # The usual 12 h^2 weights per block assume a feed-forward size of 4 h; ours may differ.
    weights = 4 * hidden**2 + 2 * hidden * config.intermediate_size
    blocks = layers * (6 * weights + 12 * hidden * s_eff)
    return blocks + mask_prob * 6 * (hidden**2 + hidden * vocab)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a GPU whose name is in PEAK_FLOPS; None for other devices and CPUs."""
    name = dist.device_name(device)
    return next((peak for part, peak in PEAK_FLOPS if part in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this rank: of its accelerator, or of the process on a CPU."""
    if device.type != "cpu":
        import torch

        return torch.accelerator.max_memory_allocated(device) / 2**30
    # ru_maxrss is in KiB on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Meter:
    """Sums over the steps since the last log line, kept on the device until a line is written.

    `step_losses`: step and minimised loss of each step of the last line whose update was made.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.peak = peak_flops(device)
        self._loss = math.nan  # of the last line; a line without any update repeats it
        self.step_losses: list[tuple[int, float]] = []
        self._start_window()

    def restart(self) -> None:
        """Forget the steps since the last line: they are given up."""
        self._start_window()

    def _start_window(self) -> None:
        self._losses: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._num_steps = 0
        self._left_out: set[int] = set()
        self._pair_sums: list[Tensor] = []
        self._num_tokens = self._sum_squares = 0.0
        # Of each step: slots for predictions, those that are used, and rows that are pairs.
        self._sizes: list[list[float]] = []
        self._wait = self._excluded = self._excluded_cpu = 0.0
        self._began, self._began_cpu = time.perf_counter(), time.process_time()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in this block as waiting for data."""
        began = time.perf_counter()
        yield
        self._wait += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time in this block from all rates (saving a checkpoint)."""
        began, began_cpu = time.perf_counter(), time.process_time()
        yield
        self._excluded += time.perf_counter() - began
        self._excluded_cpu += time.process_time() - began_cpu

    def add_batch(self, batch: dict[str, Tensor]) -> None:
        """Count the real tokens of this rank's batch, which is still in host memory."""
        self._num_steps += 1
        lengths = batch["lengths"].double()
        self._num_tokens += float(lengths.sum())
        # Attention costs the square of a sequence's length, and packed rows hold several sequences.
        # The lengths of a flat batch (data/flat.py) are those of its sequences.
        is_packed = "cu_seqlens" in batch and "bounds" not in batch
        sequences = batch["cu_seqlens"].diff().double() if is_packed else lengths
        self._sum_squares += float(sequences.square().sum())
        labels, pairs = batch["masked_labels"], batch.get("next_sentence_label", ())
        num_slots = float(labels.numel())
        if "bounds" in batch:
            num_slots = float(batch["bounds"][2]) * len(batch["sizes"])
        self._sizes.append([num_slots, float((labels >= 0).sum()), float(len(pairs))])

    def add_micro_batch(
        self, loss: Tensor, num_correct: Tensor, share: float, pair_sums: Tensor | None = None
    ) -> None:
        """Add a micro-batch's loss, `share` of this rank's step; nothing waits for the device.

        `loss` is what is minimised, see BertForPreTraining.forward. pair_sums [3]: loss, hits and
        number of its sentence pairs.
        """
        if pair_sums is not None:
            self._pair_sums.append(pair_sums.double())
        self._losses.append(loss.detach().double() * share)
        self._counts.append(num_correct.detach().double())

    def leave_out_step(self, ago: int = 0) -> None:
        """Leave the losses out of the step before the last `ago` ones, the last one by default.

        Its gradient was not finite, and it updated nothing.
        """
        import torch

        number = len(self._losses) // self._num_steps
        index = self._num_steps - 1 - ago
        for sums in (self._losses, self._pair_sums):
            if sums:
                own = slice(index * number, (index + 1) * number)
                sums[own] = [torch.zeros_like(each) for each in sums[own]]
        self._left_out.add(index)

    def flush(
        self, step: int, grad_norm: float | Tensor, is_regular: bool = True
    ) -> dict[str, Any]:
        """The log line after `step` updates, over the steps since the last regular line.

        Its loss is the mean over the predicted tokens, plus that over the pairs. What is minimised
        has fixed divisors instead, slots and rows, and is smaller where rows are short.

        A line that is not regular leaves the next one as it would have been without it. Every rank
        must call it. UserError naming the step at which the loss stopped being finite.
        """
        import torch

        num_steps = self._num_steps
        losses = torch.stack(self._losses).reshape(num_steps, -1).sum(1).tolist()
        losses = [total / dist.world_size() for total in dist.all_reduce(losses)]
        correct = float(torch.stack(self._counts).sum())
        cpu = time.process_time() - self._began_cpu - self._excluded_cpu
        predicted = sum(used for _, used, _ in self._sizes)
        made = [sizes for i, sizes in enumerate(self._sizes) if i not in self._left_out]
        divisors = [sum(each) for each in zip(*made, strict=True)] or [0.0] * 3
        sums = [correct, predicted, self._num_tokens, self._sum_squares, self._wait, cpu]
        sums = dist.all_reduce([*sums, *divisors, *self._own_pair_sums()])
        correct, predicted, tokens, squares, wait, cpu, slots, used, rows, *pair_sums = sums
        pair_sum, pair_hits, num_pairs = pair_sums
        pair = {"pair_loss": pair_sum / max(1.0, num_pairs)}
        pair["pair_accuracy"] = pair_hits / max(1.0, num_pairs)
        for offset, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise UserError(diverged(f"loss is {loss} at step {step - num_steps + 1 + offset}"))
        seconds = time.perf_counter() - self._began - self._excluded
        rate = tokens / seconds
        mask_share = predicted / tokens
        mfu = None
        if self.peak is not None:
            flops = flops_per_token(self.config, squares / tokens, mask_share)
            mfu = rate * flops / (self.peak * dist.world_size())
        first, left_out = step - num_steps + 1, self._left_out
        self.step_losses = [(first + i, x) for i, x in enumerate(losses) if i not in left_out]
        if self.step_losses:
            minimised = sum(losses) / len(self.step_losses)
            mlm_sum = (minimised - pair_sum / max(1.0, rows)) * slots
            self._loss = mlm_sum / max(1.0, used) + pair["pair_loss"]
        has_pairs = bool(self._pair_sums)
        if is_regular:
            self._start_window()
        return {
            "step": step,
            "loss": self._loss,
            "mlm_accuracy": correct / max(1.0, predicted),
            **(pair if has_pairs else {}),
            "grad_norm": float(grad_norm),
            "tokens_per_second": rate,
            "mfu": mfu,
            "data_wait_ms": 1000 * wait / dist.world_size() / num_steps,
            "seconds_per_step": seconds / num_steps,
            # Processor time of all threads, averaged over the ranks.
            "cpu_seconds_per_step": cpu / dist.world_size() / num_steps,
            "memory_gib": peak_memory_gib(self.device),
        }

    def _own_pair_sums(self) -> list[float]:
        """Loss, hits and number of this rank's pairs."""
        if not self._pair_sums:
            return [0.0] * 3
        import torch

        sums: list[float] = torch.stack(self._pair_sums).sum(0).tolist()
        return sums


class Pulse:
    """When log lines are due beside the regular ones: after the first step of a process, and then
    so that two lines are at most `seconds` apart.

    `clock` must show the same time on all ranks, because all of them must make a line together.
    """

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds, self._clock = seconds, clock
        self._last: float | None = None

    def is_due(self, is_regular: bool) -> bool:
        """Whether a line follows this step; to be asked after every step."""
        now = self._clock()
        due = is_regular or self._last is None or now - self._last >= self._seconds
        if due:
            self._last = now
        return due


def diverged(what: str) -> str:
    """The message for a run in which `what` stopped being finite."""
    return (
        f"{what}: training diverged. Nothing was saved after the newest checkpoint; start again in "
        "a new run_dir with a smaller train.lr or more train.warmup_steps"
    )


def parse_line(raw: str | bytes) -> dict[str, Any] | None:
    """The log line in `raw`; None when it is not a complete one."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None


def format_line(line: dict[str, Any], total_steps: int) -> str:
    """A line for the console with rich's markup, about 100 columns wide."""
    width = len(str(total_steps))
    mfu = "" if line["mfu"] is None else f"  mfu [green]{line['mfu']:.1%}[/]"
    pair = f"pair [cyan]{line['pair_accuracy']:6.2%}[/]  " if "pair_accuracy" in line else ""
    phase = f"phase {line['phase']}  " if "phase" in line else ""
    held_out = "".join(
        f"  {key.replace('_', ' ')} [bold]{value:.4f}[/]"
        for key, value in line.items()
        if key.startswith("held_out")
    )
    eta = (total_steps - line["step"]) * line["seconds_per_step"]
    return (
        f"step [bold]{line['step']:>{width}}/{total_steps}[/]  {phase}"
        f"loss [bold]{line['loss']:.4f}[/]  "
        f"acc [cyan]{line['mlm_accuracy']:6.2%}[/]  {pair}lr {line['lr']:.2e}  "
        f"norm {line['grad_norm']:.2f}  {line['tokens_per_second']:,.0f} tok/s{mfu}  "
        f"wait {line['data_wait_ms']:.1f} ms  eta {format_seconds(eta)}{held_out}"
    )


def format_seconds(seconds: float) -> str:
    """59 -> 0:59, 3661 -> 1:01:01."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def describe_seconds(seconds: float) -> str:
    """A duration in a sentence: 45 seconds, 12 minutes, 3.5 hours, 10.9 days."""
    for unit, size, digits in (("days", 86_400, 1), ("hours", 3_600, 1), ("minutes", 60, 0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.{digits}f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 1.5 else f"{seconds:.2f} seconds"
