"""Span reading; here is how its tasks are trained, which the table of tasks names too."""

from __future__ import annotations

from clue_ds.tasks.task import Settings

# CLUE's scripts: of BERT-base, and of ALBERT-tiny.
SETTINGS = Settings(max_length=512, batch_size=32, lr=3e-5, epochs=2)
SMALL_SETTINGS = Settings(max_length=512, batch_size=32, lr=2e-4, epochs=3)
EVALUATIONS_PER_EPOCH = 2
