"""Real ranks for tests: processes that this helper starts, waits for and, if need be, ends.

A test names a function of a test module; every rank imports the module and calls it with the same
JSON arguments; what it returns comes back as JSON. Ranks are forked from a process that has
imported everything (zygote.py); one call should still do the work of many tests.
"""

from __future__ import annotations

import json
import random
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zygote import Zygote, shared

from clue_ds import config as run_config
from clue_ds.config import RunConfig

CHILD = """
import atexit, importlib, json, os, sys
from pathlib import Path
os.dup2(2, 1)
module, name, arguments, output = sys.argv[1:5]
output += os.environ["RANK"]
result = getattr(importlib.import_module(module), name)(*json.loads(arguments))
Path(output).write_text(json.dumps(result))
# One exit in thousands, threads of gloo abort an interpreter that takes itself apart ("terminate
# called without an active exception"); launcher/processes.py knows.
atexit._run_exitfuncs()
sys.stdout.flush()
os._exit(0)
"""

TINY_MODEL: dict[str, Any] = {
    "preset": "roberta_tiny_clue",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}


def run_ranks(
    num_ranks: int, function: Callable[..., Any], *arguments: Any, zygote: Zygote | None = None
) -> list[Any]:
    """Call a module-level function of a test module on `num_ranks` ranks; results by rank.

    They are forked from `zygote`; None is the one that all tests share.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    module = Path(sys.modules[function.__module__].__file__ or "").stem
    common = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    variables = [{**common, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(num_ranks)]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(num_ranks)]
        logs = [output.with_suffix(".log") for output in outputs]
        words = [module, function.__name__, json.dumps(arguments), f"{folder}/"]
        statuses = (zygote or shared()).run(CHILD, words, variables, logs)
        assert statuses == [0] * num_ranks, "\n".join(log.read_text() for log in logs)
        return [json.loads(output.read_text()) for output in outputs]


def make_corpus(directory: Path, text: str, num_documents: int = 120) -> Path:
    """A learnable corpus through the real pipeline: the documents of `text`, drawn again and again.

    Random tokens would hide lost Adam moments: nothing about them can be learned.
    """
    from clue_ds.data.build.command import shard
    from clue_ds.data.text.vocab import learn

    documents = text.strip().split("\n\n")
    draw = random.Random(0)
    source, vocab = directory / "text.txt", directory / "vocab.txt"
    chosen = [draw.choice(documents) for _ in range(num_documents)]
    source.write_text("\n\n".join(chosen) + "\n", encoding="utf-8")
    learn((str(source),), output=vocab, size=400)
    corpus = directory / "corpus"
    shard((str(source),), output=corpus, vocab=vocab, workers=1)
    return corpus


def tiny_config(corpus: Path | str, run_dir: Path | str, **sections: Any) -> RunConfig:
    """A run of seconds; `sections` are merged over the defaults, key by key."""
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "deepspeed": "zero1",
        "data": {"corpus": str(corpus), "seq_length": 16},
        # Compilation takes longer than a few steps, on a GPU that auto would compile for.
        "model": {"compile": False, **TINY_MODEL},
        "train": {
            "steps": 6,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "lr": 2e-3,
            "warmup_steps": 2,
            "precision": "fp32",
        },
        "evaluate": {},
        "checkpoint": {"every": 3, "keep": 9},
        "log": {"every": 1, "tensorboard": False},
    }
    for key, value in sections.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return run_config.validate(values, "test config")


def read_log(run_dir: Path | str) -> list[dict[str, Any]]:
    lines = Path(run_dir, "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def pretrain_runs(configs: list[dict[str, Any]]) -> list[str | None]:
    """On every rank: several runs one after the other in one process group, through the real
    build and loop; None for a run that ended, or the message of the UserError that stopped it."""
    from clue_ds.errors import UserError
    from clue_ds.pretrain import train

    results: list[str | None] = []
    for values in configs:
        try:
            run = train.build(run_config.validate(values, "test config"))
            with run.saver:
                train.train(run)
        except UserError as error:
            results.append(str(error))
            continue
        run.loader.close()
        run.writers.close()
        results.append(None)
    return results
