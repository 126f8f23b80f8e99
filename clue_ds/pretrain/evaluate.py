"""Evaluation on held-out text during training.

Guarantees: every evaluation uses the same samples with the same masks; figures are sums over all
ranks, so they do not depend on the number of ranks; no random number is drawn (dropout is off), so
training continues bit for bit as without it. The figures are in the step's log line as held_out_*.
"""

from __future__ import annotations

import math

import torch

from clue_ds import dist
from clue_ds.data import SampleStream
from clue_ds.job import watchdog
from clue_ds.pretrain.engine import Engine


class Evaluator:
    """Evaluates on the first `num_batches` global batches of a held-out stream, or on all of it."""

    def __init__(self, stream: SampleStream, num_batches: int) -> None:
        self.stream = stream
        self.num_batches = min(num_batches, stream.steps_per_epoch)

    def __call__(self, engine: Engine) -> dict[str, float]:
        """Figures for the log, on every rank: held_out_loss (of the MLM), held_out_mlm_accuracy.

        Objectives with pairs add held_out_pair_loss and held_out_pair_accuracy.
        """
        watch = watchdog.current()
        engine.module.eval()
        sums = torch.zeros(6, dtype=torch.float64, device=engine.device)
        with torch.no_grad():
            for step in range(self.num_batches):
                batch = self.stream.batch(step, dist.rank(), dist.world_size())
                for micro_batch in engine.micro_batches(batch):
                    output = engine.forward(**micro_batch)
                    sums[0] += output.mlm_sum
                    sums[1] += output.num_correct
                    sums[2] += output.num_predicted
                    if output.pair_sums is not None:
                        sums[3:] += output.pair_sums
                    watch.mark()
        engine.module.train()
        loss, correct, predicted, pair_loss, pairs_correct, num_pairs = dist.all_reduce(
            sums.tolist()
        )
        line = {
            "held_out_loss": loss / max(1.0, predicted),
            "held_out_mlm_accuracy": correct / max(1.0, predicted),
        }
        if num_pairs:
            line["held_out_pair_loss"] = pair_loss / num_pairs
            line["held_out_pair_accuracy"] = pairs_correct / num_pairs
        assert all(math.isfinite(value) for value in line.values()), line
        return line
