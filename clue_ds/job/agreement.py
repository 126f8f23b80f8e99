"""A decision of rank 0 about values of all ranks, made by threads beside the training loop.

Guarantees: every rank gets the same answer, also when rank 0's process ends right after it; ranks
may call `decide` seconds or minutes apart, and no rank's training loop takes part; what is
exchanged is removed from the store.

It goes through rank 0's store, on a connection of its own. Rejected: collectives. NCCL must be
called in the same order on all ranks, and a thread would interleave with the training loop's calls
in another order on each rank; a gloo group for threads needs new connections between all ranks, and
its timeout makes an error of a slow disk.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from clue_ds import dist
from clue_ds.job import rendezvous

SECONDS_PER_REQUEST = 60.0
# Between looks at the store; at 512 ranks these are 2,000 requests per second.
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 0.25

_numbers = itertools.count()


class Agreement:
    """`decide` for the threads of all ranks. Every rank must make one, in the same order."""

    def __init__(self) -> None:
        self._prefix = f"agreement/{next(_numbers)}"
        self._number = 0
        self._store: Any = None
        if dist.world_size() > 1:
            meeting = rendezvous.meet()
            self._store = meeting.connect(timedelta(seconds=SECONDS_PER_REQUEST))

    def decide(self, value: Any, rule: Callable[[list[Any]], Any]) -> Any:
        """What `rule` returns on rank 0 for the values of all ranks, in order; JSON values.

        RuntimeError when rank 0 is gone.
        """
        if self._store is None:
            return rule([value])
        round_ = f"{self._prefix}/{self._number}"
        self._number += 1
        self._store.set(f"{round_}/{dist.rank()}", json.dumps(value))
        if dist.rank() > 0:
            self._wait([f"{round_}/answer"])
            answer = json.loads(self._store.get(f"{round_}/answer"))
            self._store.set(f"{round_}/{dist.rank()}/read", "")
            return answer
        keys = [f"{round_}/{rank}" for rank in range(dist.world_size())]
        self._wait(keys)
        answer = rule([json.loads(text) for text in self._store.multi_get(keys)])
        self._store.set(f"{round_}/answer", json.dumps(answer))
        # The store is in this process, which may end as soon as this returns.
        read = [f"{round_}/{rank}/read" for rank in range(1, dist.world_size())]
        self._wait(read)
        for key in [*keys, *read, f"{round_}/answer"]:
            self._store.delete_key(key)
        return answer

    def _wait(self, keys: list[str]) -> None:
        """Ask again and again, because another thread may need the store in the meantime.

        The watchdog knows this file: a rank that waits for a thread in here is not to blame.
        """
        pause = FIRST_PAUSE
        while not self._store.check(keys):
            time.sleep(pause)
            pause = min(LONGEST_PAUSE, 1.5 * pause)
