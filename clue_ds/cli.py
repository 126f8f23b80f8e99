"""`clue-ds VERB ...`: a table of verbs, each imported only when it is called.

A verb is either a function whose annotated arguments and docstring are its command line (tyro makes
the parser and the help), a dict of such functions (subcommands), or, where the table says `argv`, a
function that takes the argument list itself.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from typing import NamedTuple

from clue_ds.errors import UserError, run_command


class Verb(NamedTuple):
    target: str  # "module:name"
    help: str
    takes_argv: bool = False


VERBS: dict[str, Verb] = {
    "vocab": Verb("clue_ds.data.vocab:COMMANDS", "learn a vocabulary, or slim an existing one"),
    "shard": Verb("clue_ds.data.build:shard", "turn raw text into a memory-mapped corpus"),
    "plan": Verb("clue_ds.plan:plan", "memory, batches, disk and time of a run, by arithmetic"),
    "pretrain": Verb("clue_ds.pretrain.train:main", "train an encoder on a corpus", True),
    "export": Verb("clue_ds.export:export", "write a run for Hugging Face, TensorFlow, ONNX"),
    "import": Verb("clue_ds.export:import_model", "read a BERT by others, to continue from it"),
    "finetune": Verb("clue_ds.tasks.grid:finetune", "train a model for tasks of CLUE or your own"),
    "score": Verb("clue_ds.tasks.score:score", "table of fine-tuned runs beside published scores"),
    "report": Verb("clue_ds.tasks.score:report", "one page about a fine-tuning run"),
    "predict": Verb("clue_ds.tasks.predict_files:predict", "classify, fill masks, embed, compare"),
    "serve": Verb("clue_ds.tasks.serve:serve", "answer over HTTP, with a page to try it"),
    "submit": Verb("clue_ds.tasks.submit:submit", "write and check the zip for CLUE's leaderboard"),
    "launch": Verb("clue_ds.launcher.launch:main", "run a verb on several ranks", True),
    "doctor": Verb("clue_ds.doctor:main", "check this machine or all hosts of a job", True),
    "status": Verb("clue_ds.status:status", "where a run stands, and whether it is alive"),
    "bench": Verb("clue_ds.benchmarks:COMMANDS", "compare speed with named peers"),
    "demo": Verb("clue_ds.demo:demo", "the whole main job on real text, in minutes"),
}

USAGE = "usage: clue-ds VERB ...   (clue-ds VERB --help says more)"


def _usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items())
    return f"{USAGE}\n\nIn the order in which data flows:\n{verbs}"


def _run(name: str, argv: list[str]) -> None:
    module, _, attribute = VERBS[name].target.partition(":")
    target = getattr(importlib.import_module(module), attribute)
    if VERBS[name].takes_argv:
        target(argv)
        return
    import tyro

    prog = f"clue-ds {name}"
    if isinstance(target, dict):
        tyro.extras.subcommand_cli_from_dict(target, prog=prog, args=argv, use_underscores=False)
    else:
        tyro.cli(target, prog=prog, args=argv, use_underscores=False)


def _check_verb(name: str) -> None:
    if name in VERBS:
        return
    import difflib

    near = difflib.get_close_matches(name, VERBS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"verbs: {', '.join(VERBS)}"
    raise UserError(f"there is no verb {name!r}; {hint}")


def main(argv: list[str] | None = None) -> int:
    """Entry of the console script; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if argv[0] == "--version":
        print(f"clue-ds {importlib.metadata.version('clue_ds')}")
        return 0
    name, rest = argv[0], argv[1:]
    # Two ranks that each take every core run several times slower than two that share them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    status = run_command("clue-ds", lambda: _check_verb(name))
    return status or run_command(f"clue-ds {name}", lambda: _run(name, rest))


if __name__ == "__main__":
    sys.exit(main())
