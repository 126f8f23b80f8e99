"""Which micro-batches and numbers of ranks fit a global batch."""

from __future__ import annotations


def ways(batch: int, micro: int, world_size: int) -> str:
    """What to do when `batch` is not divisible by `micro` x `world_size`: the nearest that fit."""
    found = []
    if batch % world_size == 0:
        found.append(f"set train.micro_batch_size to {_nearest(batch // world_size, micro)}")
    if batch % micro == 0:
        found.append(f"start {_ranks(batch // micro, world_size)}")
    if not found:
        found.append(f"start {_ranks(batch, world_size)} with train.micro_batch_size 1")
    below = batch // (micro * world_size) * micro * world_size
    batches = " or ".join(str(n) for n in (below, below + micro * world_size) if n)
    return (
        f"{', or '.join(found)}, or set train.global_batch_size to {batches} (in a new run: one "
        "that continues keeps its batch)"
    )


def _ranks(number: int, wanted: int) -> str:
    which = _nearest(number, wanted)
    return f"{which} rank{'' if which == '1' else 's'}"


def _nearest(number: int, wanted: int) -> str:
    """The divisors of `number` that are nearest to `wanted`, from below and from above."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    below = [n for n in divisors if n < wanted][-1:]
    return " or ".join(map(str, below + [n for n in divisors if n > wanted][:1]))
