"""CLUE's tasks from the Hugging Face hub, read by `datasets` itself (clue/clue).

HF_ENDPOINT, HF_HOME and HF_TOKEN mean what they mean to `datasets`; what was fetched before is
there without a connection.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from clue_ds.errors import UserError
from clue_ds.tasks import examples
from clue_ds.tasks.examples import Examples
from clue_ds.tasks.registry import Split, Task

REPOSITORY = "clue/clue"
SPLITS: dict[Split, str] = {"train": "train", "dev": "validation", "test": "test"}


def read(task: Task, split: Split) -> Examples:
    """A split of one of CLUE's tasks; `sha256` is that of its rows as JSON lines."""
    # Imported here because it takes seconds, and only --data hub needs it.
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(REPOSITORY, task.name, split=SPLITS[split])
    except Exception as error:  # every layer below has its own kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"can't fetch {task.name} of {REPOSITORY} from the hub: {reason}; download the task's "
            "files elsewhere and give their directory with --data"
        ) from error
    names = rows.features[task.label_field].names
    named = [_with_label(task, row, names) for row in rows]
    path = Path(f"{REPOSITORY}/{task.name}/{SPLITS[split]}.jsonl")
    found = examples.collect(task, path, enumerate(named, start=1), labelled=split != "test")
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in named)
    found.sha256 = hashlib.sha256(lines.encode()).hexdigest()
    return found


def _with_label(task: Task, row: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The hub numbers its classes in an order of its own; -1 is no label."""
    number = row[task.label_field]
    label = names[number] if number >= 0 else next(iter(task.skipped_labels), "-")
    return {**row, task.label_field: label}
