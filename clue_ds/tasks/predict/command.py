"""`clue-ds predict`: texts and files in, answers out, one a line and in the same order.

Guarantees: a file of any size takes the memory of a few thousand lines; the output appears complete
or not at all; a mistake names file and line; every answer says whether its text was cut; several
ranks write what one process writes.

Texts are sorted by length within CHUNK lines only. More would gain nothing (a batch is a hundredth
of that) and would need the whole file.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text as Styled

from clue_ds import dist, files
from clue_ds.config import DEFAULT_HEALTH, HealthSection
from clue_ds.errors import UserError, existing_file, run_command
from clue_ds.job import watchdog
from clue_ds.model import ops
from clue_ds.tasks import examples, features
from clue_ds.tasks.examples import Example
from clue_ds.tasks.features import Features, Text
from clue_ds.tasks.predict.predictor import MASK, Prediction, Predictor
from clue_ds.tasks.registry import Record

CHUNK = 4096  # lines that are read, sorted by length and answered together
FIELDS_WITHOUT_TASK = (("sentence1", "sentence2"), ("sentence",), ("text",))


class Answered(NamedTuple):
    """A line of the input, what the model read of it, and its class or embedding."""

    example: Example
    features: Features
    answer: Prediction | np.ndarray


def predict(
    model: Path,
    task: str | None = None,
    text: tuple[str, ...] = (),
    file: Path | None = None,
    out: Path | None = None,
    fill_mask: tuple[str, ...] = (),
    embed: bool = False,
    similarity: tuple[str, str] | None = None,
    top_k: int = 5,
    batch_size: int = 32,
    max_length: int | None = None,
    kernels: ops.Kernels = "torch",
    force: bool = False,
    health: HealthSection = DEFAULT_HEALTH,
) -> None:
    """Classify texts, fill their masks, embed or compare them with a trained model.

    A large file on several GPUs or ranks:
    clue-ds launch --local 2 -- predict --model M --file in.jsonl --out out.jsonl

    Args:
        model: a run directory, one of its checkpoints, or a Hugging Face directory.
        task: what a classifier answers: a task of CLUE or a YAML file; default what it was
            fine-tuned for.
        text: texts to classify (or embed); for a task of pairs, first and second text in turn.
        file: instead of texts: JSON lines, CSV or TSV with the task's fields; "sentence", "text" or
            "sentence1" and "sentence2" where there is no task.
        out: where the answers go, one JSON object a line; for --embed also an array (.npy). Without
            it they are printed.
        fill_mask: texts with [MASK] where a token is wanted.
        embed: write the embedding of every text (mean of its tokens) instead of a class.
        similarity: two texts, to be compared by the cosine of their embeddings.
        top_k: candidates shown for each mask.
        batch_size: texts that the model reads together.
        max_length: tokens read of a text; default what the task is trained with.
        kernels: the fused operations: Triton's, their torch twins, or auto: Triton on a GPU.
        force: replace the output if it exists.
        health: deadlines, of several ranks.
    """
    wanted = [bool(text), file is not None, bool(fill_mask), similarity is not None]
    if sum(wanted) != 1:
        raise UserError("give one of --text, --file, --fill-mask and --similarity")
    if out is not None and file is None:
        raise UserError("--out is for the answers to a --file; those to a --text are printed")
    with watchdog.reporting(), warnings.catch_warnings():
        warnings.showwarning = _print_warning
        if dist.world_size() > 1:
            _join_ranks(out, health)
        ops.choose_kernels(kernels)
        predictor = Predictor(model, task, batch_size, max_length)
        if fill_mask:
            _print_candidates(predictor, fill_mask, top_k)
        elif similarity is not None:
            print(f"{predictor.similarity([similarity[0]], [similarity[1]])[0]:.4f}")
        elif file is None:
            write_answers(answered(predictor, _given(predictor, text), embed), sys.stdout)
        else:
            with watchdog.current().section("predict"):
                predict_file(predictor, file, out, embed, force)
        dist.barrier()
    dist.report_end(stopped=False)


def _join_ranks(out: Path | None, health: HealthSection) -> None:
    if out is None:
        raise UserError("several ranks share the work of a --file; give one, and --out")
    from clue_ds.pretrain import engine

    watchdog.start(health, "clue-ds predict", can_stop=False)
    engine.start()


def _print_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"clue-ds predict: {message}", file=sys.stderr)


def _given(predictor: Predictor, texts: tuple[str, ...]) -> list[Example]:
    """The texts of the command line, in pairs where the task is one of pairs."""
    task = predictor.task
    if task is not None and task.build is not None:
        fields = ", ".join(task.fields)
        raise UserError(f"{task.name} reads {fields}; give them as JSON lines with --file")
    parts: list[Text] = list(texts)
    if task is not None and task.kind == "pair":
        if len(texts) % 2:
            raise UserError(
                f"{task.name} is about pairs of texts, and {len(texts)} are no pairs; "
                "give first and second text in turn"
            )
        parts = list(zip(texts[::2], texts[1::2], strict=True))
    return [
        Example(number, examples.checked(part, f"--text {number + 1}"), None)
        for number, part in enumerate(parts)
    ]


def read_unlabelled(predictor: Predictor, path: Path) -> Iterator[Example]:
    """The texts of a file, a line at a time; UserError names file and line."""
    number = -1
    for number, (line, record) in enumerate(examples.records(path)):
        where = f"{path}:{line}"
        text = text_of_record(predictor, record, where)
        yield Example(examples.id_of(record, number), text, None)
    if number < 0:
        raise UserError(f"{path} has no examples: it is empty; give one JSON object a line")


def text_of_record(predictor: Predictor, record: Record, where: str) -> Text:
    """What the model reads of a record: the task's text, or without a task that of plain fields."""
    if predictor.task is not None:
        return examples.text_of(predictor.task, record, where)
    for fields in FIELDS_WITHOUT_TASK:
        if all(name in record for name in fields):
            parts = [record[name] for name in fields]
            return examples.checked(parts[0] if len(parts) == 1 else (parts[0], parts[1]), where)
    raise UserError(
        f"{where}: no field 'sentence' or 'text', nor 'sentence1' and 'sentence2' "
        f"(has {', '.join(record) or 'none'})"
    )


def predict_file(
    predictor: Predictor, file: Path, out: Path | None, embed: bool = False, force: bool = False
) -> None:
    """Answer every line of a file, into `out` or to the terminal, and say how many."""
    begin = time.perf_counter()
    rows = read_unlabelled(predictor, existing_file(file, "input"))
    chunks = answered(predictor, rows, embed)
    if out is None:
        write_answers(chunks, sys.stdout)
        return
    if dist.rank() > 0:
        _check_output(out, force)
        for _ in chunks:
            pass  # rank 0 writes them
        return
    with output_file(out, force) as stream:
        if embed and out.suffix == ".npy":
            num_texts, num_cut = write_array(chunks, predictor.config.hidden_size, stream)
        else:
            with open(stream.fileno(), "w", encoding="utf-8", closefd=False) as lines:
                num_texts, num_cut = write_answers(chunks, lines)
    rate = num_texts / (time.perf_counter() - begin)
    cut = f", {num_cut:,} of them cut to {predictor.max_length} tokens" if num_cut else ""
    print(f"wrote {out}: {num_texts:,} answers{cut}, {rate:,.0f} a second")


def _check_output(out: Path, force: bool) -> None:
    if out.is_dir():
        raise UserError(f"{out} is a directory; give the path of a file for the answers")
    if out.exists() and not force:
        raise UserError(f"{out} exists; give --force to replace it, or another path")


@contextlib.contextmanager
def output_file(out: Path, force: bool) -> Iterator[IO[bytes]]:
    """A file that takes its name only when it is complete."""
    _check_output(out, force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with files.writing(out, shared=True) as stream:
            yield stream
    except OSError as error:
        raise UserError(f"can't write {out}: {error}; free some space or choose another") from None


def answered(
    predictor: Predictor, rows: Iterable[Example], embed: bool = False
) -> Iterator[list[Answered]]:
    """The examples with their answers, in order, a chunk of the file at a time."""
    rows = iter(rows)
    while chunk := list(islice(rows, CHUNK)):
        encoded = predictor.encode([example.text for example in chunk])
        yield list(map(Answered, chunk, encoded, _answers(predictor, encoded, embed)))


def _answers(predictor: Predictor, encoded: list[Features], embed: bool) -> list[Any]:
    """A class or an embedding for each text.

    Of several ranks each takes whole batches, the very ones of one process: the last bits of an
    answer depend on what else is in its batch.
    """
    answer = predictor.pool if embed else predictor.classify
    batches = features.batches_by_length(encoded, predictor.batch_size)
    mine = [i for batch in batches[dist.rank() :: dist.world_size()] for i in batch]
    result: list[Any] = [None] * len(encoded)
    for part in dist.all_gather((mine, answer([encoded[i] for i in mine]))):
        for i, one in zip(*part, strict=True):
            result[i] = one
    return result


def write_answers(chunks: Iterable[list[Answered]], stream: IO[str]) -> tuple[int, int]:
    """One JSON object a line, in order; numbers of texts and of those cut."""
    num_texts = num_cut = 0
    for chunk in chunks:
        for example, feature, answer in chunk:
            line = {"id": example.id, **_answer(answer), "truncated": feature.truncated}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            num_cut += feature.truncated
        num_texts += len(chunk)
    return num_texts, num_cut


def _answer(answer: Prediction | np.ndarray) -> dict[str, Any]:
    if isinstance(answer, Prediction):
        rounded = {label: round(p, 6) for label, p in answer.probabilities.items()}
        return {"label": answer.label, "probabilities": rounded}
    return {"embedding": [round(float(value), 6) for value in answer]}


def write_array(chunks: Iterable[list[Answered]], width: int, stream: IO[bytes]) -> tuple[int, int]:
    """Embeddings as one .npy, float32 [texts, H]; numbers of texts and of those cut.

    numpy leaves room in the header for the number of rows, which is known only at the end.
    """
    num_texts = num_cut = 0
    header = {"descr": "<f4", "fortran_order": False}
    np.lib.format.write_array_header_1_0(stream, {**header, "shape": (0, width)})
    begin = stream.tell()
    for chunk in chunks:
        vectors = [np.asarray(answer, "<f4") for _, _, answer in chunk]
        stream.write(np.stack(vectors).tobytes())
        num_texts += len(chunk)
        num_cut += sum(feature.truncated for _, feature, _ in chunk)
    stream.seek(0)
    np.lib.format.write_array_header_1_0(stream, {**header, "shape": (num_texts, width)})
    assert stream.tell() == begin, "the header grew over the first row"
    return num_texts, num_cut


def _print_candidates(predictor: Predictor, texts: tuple[str, ...], top_k: int) -> None:
    console = Console()
    for text in texts:
        candidates = predictor.fill_mask(text, top_k)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        table = Table()
        for number in range(1, len(candidates) + 1):
            table.add_column(MASK if len(candidates) == 1 else f"{MASK} {number}")
        for row in zip(*candidates, strict=True):
            table.add_row(*(Styled(f"{token} {100 * p:5.1f}%") for token, p in row))
        console.print(table)


def main(argv: list[str]) -> None:
    """What `clue-ds launch` starts on every rank."""
    import tyro

    with dist.one_voice():
        tyro.cli(predict, prog="clue-ds predict", args=argv, use_underscores=False)


if __name__ == "__main__":
    sys.exit(run_command("clue-ds predict", lambda: main(sys.argv[1:])))
