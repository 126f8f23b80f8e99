"""`clue-ds VERB ...`: the table of verbs, each of which is imported only when it is called.

A verb is a function whose annotated arguments and docstring define its command line (tyro makes the
parser and the help), a dict of such functions (subcommands), a table of more verbs, or, with
`takes_argv`, a function that parses the argument list itself.
"""

from __future__ import annotations

import importlib
import os
import select
import signal
import sys
from typing import NamedTuple, TextIO

from clue_ds import __version__
from clue_ds.errors import UserError, explain_os_error, run_command, shorten
from clue_ds.launcher.contract import STATUS_USER_ERROR
from clue_ds.settings import startup


class Verb(NamedTuple):
    target: str | dict[str, Verb]  # "module:name", or a table of verbs
    help: str
    takes_argv: bool = False


_SUBJECTS = {
    "tokenizer": "against tokenizers' encode_batch_fast",
    "shard": "clue-ds shard against datasets.map and tokenizers",
    "loader": "against datasets, torch and other loaders",
    "cold": "a corpus larger than memory, read from a cold disk",
    "scale": "seconds and memory to open a corpus of 100 GB",
    "pretrain": "tokens per second against a plain training loop",
    "padding": "tokens per second without padding against padded rows",
    "saving": "what a checkpoint costs training, against DeepSpeed's own",
    "scaling": "several ranks and ZeRO stages against one rank",
    "kernels": "fused kernels against torch, on a GPU",
    "gpu": "all that a new GPU machine should be asked first, in minutes, with a page",
    "finetune": "against transformers' Trainer",
    "evidence": "curves of pretraining and fine-tuning, with a plot",
    "recipe_study": "one change of pretraining's recipe at a time, at equal tokens",
    "demo": "the demo with several seeds, and what pretraining gained",
    "serve": "answers per second against a transformers pipeline",
    "onnx_latency": "an ONNX export against transformers' legacy export",
}
BENCHMARKS = {
    name: Verb(f"clue_ds.benchmarks.{name}:{name}", help) for name, help in _SUBJECTS.items()
}

VERBS: dict[str, Verb] = {
    "vocab": Verb(
        "clue_ds.data.text.vocab:COMMANDS", "learn a vocabulary, or slim an existing one"
    ),
    "shard": Verb("clue_ds.data.build.command:shard", "turn raw text into a memory-mapped corpus"),
    "plan": Verb("clue_ds.plan:main", "calculate memory, batches, disk and time of a run", True),
    "pretrain": Verb("clue_ds.pretrain:main", "train an encoder on a corpus", True),
    "export": Verb(
        "clue_ds.export.command:export", "convert a run to Hugging Face, TensorFlow or ONNX"
    ),
    "import": Verb(
        "clue_ds.export.command:import_model", "convert a BERT from elsewhere, to continue from it"
    ),
    "push": Verb("clue_ds.export.push:push", "publish a model on the hub or on ModelScope"),
    "finetune": Verb(
        "clue_ds.tasks.finetune.command:finetune", "fine-tune a model on CLUE's tasks or your own"
    ),
    "score": Verb(
        "clue_ds.tasks.finetune.score:score", "compare fine-tuned runs with published scores"
    ),
    "report": Verb("clue_ds.report.command:report", "write a page about a corpus or about runs"),
    "predict": Verb(
        "clue_ds.tasks.predict.command:predict", "classify, fill masks, embed or compare texts"
    ),
    "serve": Verb(
        "clue_ds.tasks.serve.command:serve", "serve a model over HTTP, with a page to try it"
    ),
    "submit": Verb(
        "clue_ds.tasks.predict.submit:submit", "write and check the zip for CLUE's leaderboard"
    ),
    "launch": Verb("clue_ds.launcher.launch:main", "run a verb on several ranks", True),
    "doctor": Verb("clue_ds.doctor:main", "check this machine or all hosts of a job", True),
    "status": Verb("clue_ds.status:status", "show the progress of a run, and if it is running"),
    "bench": Verb(BENCHMARKS, "compare the speed with other libraries"),
    "demo": Verb("clue_ds.demo:demo", "run the whole pipeline on real text, in minutes"),
}

_SIGPIPE_STATUS = 128 + signal.SIGPIPE


def _usage(prog: str, verbs: dict[str, Verb]) -> str:
    width = max(map(len, verbs))
    lines = "\n".join(f"  {name:<{width}}  {verb.help}" for name, verb in verbs.items())
    order = "\nverbs, in the order in which data flows:" if verbs is VERBS else ""
    return f"usage: {prog} VERB ...   ({prog} VERB --help explains a verb)\n{order}\n{lines}"


def _run_verb(prog: str, verbs: dict[str, Verb], argv: list[str]) -> None:
    """Run the verb of the table that `argv` begins with, or print the table."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(prog, verbs))
        return
    name, rest = argv[0], argv[1:]
    _check_verb(name, verbs)
    verb = verbs[name]
    if isinstance(verb.target, dict):
        _run_verb(f"{prog} {name}", verb.target, rest)
        return
    module, _, attribute = verb.target.partition(":")
    target = getattr(importlib.import_module(module), attribute)
    if verb.takes_argv:
        target(rest)
        return
    from clue_ds.settings import arguments

    arguments.call(target, f"{prog} {name}", rest)


def _check_verb(name: str, verbs: dict[str, Verb]) -> None:
    if name in verbs:
        return
    import difflib

    near = difflib.get_close_matches(name, verbs, n=1)
    hint = f"did you mean {near[0]}?" if near else f"verbs: {', '.join(verbs)}"
    raise UserError(f"there is no verb {shorten(name)}; {hint}")


def main(argv: list[str] | None = None) -> int:
    """Entry of the console script; returns the exit status.

    Without `argv` this process is ours alone, and may start again in UTF-8 mode.
    """
    if argv is None:
        startup.prepare()
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:  # a parser that has printed its help raises SystemExit
            sys.stdout.flush()
    except BrokenPipeError:
        # `clue-ds ... | head`: discard what is still in the buffers of a closed pipe.
        unread = [stream for stream in (sys.stdout, sys.stderr) if _nobody_reads(stream)]
        if not unread:
            raise
        _discard(unread)
        return _SIGPIPE_STATUS
    except OSError as error:  # `clue-ds ... > file` on a full disk
        said = explain_os_error(error)
        if said is None:
            raise
        _discard([sys.stdout])
        print(f"clue-ds: error: writing the output: {said}", file=sys.stderr)
        return STATUS_USER_ERROR


def _discard(streams: list[TextIO]) -> None:
    """Let nothing fail that is still in the streams' buffers when this process ends."""
    for stream in streams:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(argv: list[str]) -> int:
    if argv[:1] == ["--version"]:
        print(f"clue-ds {__version__}")
        return 0
    # If two ranks each use every core for tokenizing, they run several times slower.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    command = " ".join(["clue-ds", *(name for name in argv[:1] if name in VERBS)])
    return run_command(command, lambda: _run_verb("clue-ds", VERBS, argv))


def _nobody_reads(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


if __name__ == "__main__":
    sys.exit(main())
