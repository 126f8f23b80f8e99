"""Read CLUE's tasks from the Hugging Face hub (clue/clue) with the `datasets` library.

HF_ENDPOINT, HF_HOME and HF_TOKEN have the meaning that `datasets` gives them. A split that was
fetched before is read from its cache without a connection.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from clue_ds.errors import UserError
from clue_ds.tasks import examples
from clue_ds.tasks.examples import Examples
from clue_ds.tasks.registry import Record, Split, Task

REPOSITORY = "clue/clue"
SPLITS: dict[Split, str] = {"train": "train", "dev": "validation", "test": "test"}


def read(task: Task, split: Split) -> Examples:
    """A split of one of CLUE's tasks; its `sha256` is of its records, written as JSON lines."""
    # Imported here because it takes seconds, and only --data hub needs it.
    import datasets

    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(REPOSITORY, task.name, split=SPLITS[split])
    except Exception as error:  # every library below raises its own kinds
        reason = next(filter(str.strip, str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"can't fetch {task.name} of {REPOSITORY} from the hub: {reason}; download the task's "
            "files elsewhere and give their directory with --data"
        ) from error
    names = dataset.features[task.label_field].names
    records = [_with_label_name(task, record, names) for record in dataset]
    path = Path(f"{REPOSITORY}/{task.name}/{SPLITS[split]}.jsonl")
    found = examples.collect(task, path, enumerate(records, start=1), labelled=split != "test")
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    found.sha256 = hashlib.sha256(lines.encode()).hexdigest()
    return found


def _with_label_name(task: Task, record: Record, names: list[str]) -> Record:
    """The record with its label by name: the hub's class numbers have another order than ours.

    The number -1 means that there is no label.
    """
    number = record[task.label_field]
    label = names[number] if number >= 0 else next(iter(task.skipped_labels), "-")
    return {**record, task.label_field: label}
