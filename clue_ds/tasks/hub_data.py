"""Read CLUE's tasks from the Hugging Face hub (clue/clue) with the `datasets` library.

HF_ENDPOINT, HF_HOME and HF_TOKEN have the meaning that `datasets` gives them. A split that was
fetched before is read from its cache without a connection.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from clue_ds.errors import UserError
from clue_ds.tasks import examples, kinds
from clue_ds.tasks.examples import Examples
from clue_ds.tasks.task import Split, Task

REPOSITORY = "clue/clue"
TASKS = (
    "afqmc", "tnews", "iflytek", "cmnli", "csl", "cluewsc2020", "cmrc2018", "drcd", "c3", "chid",
    "ocnli",
)  # fmt: skip
SPLITS: dict[Split, str] = {"train": "train", "dev": "validation", "test": "test"}


def read(task: Task, split: Split) -> Examples:
    """A split of one of CLUE's tasks; its `sha256` is of its records, written as JSON lines."""
    if task.name not in TASKS:
        raise UserError(
            f"{REPOSITORY} on the hub has no data of {task.name}, only of {', '.join(TASKS)}; give "
            f"the directory with the files of {task.name} with --data, in a command of its own"
        )
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
    kind = kinds.of(task)
    records = [kind.hub_record(record, dataset.features) for record in dataset]
    path = Path(f"{REPOSITORY}/{task.name}/{SPLITS[split]}.jsonl")
    located = ((f"{path}:{number}", record) for number, record in enumerate(records, start=1))
    found = examples.collect(task, path, located, labelled=split != "test")
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    found.sha256 = hashlib.sha256(lines.encode()).hexdigest()
    return found
