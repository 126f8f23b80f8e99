"""`clue-ds predict`: read texts or a file, write one answer per line in the same order.

Guarantees: a file of any size needs the memory of a few thousand lines; the output appears complete
or not at all; an error message names file and line; every answer records whether its text was
truncated; several ranks write the same output as one process.

Texts are sorted by length only within CHUNK lines. Sorting more would gain nothing (a batch is a
hundredth of that) and would need the whole file in memory.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text as Styled

from clue_ds import dist, files
from clue_ds.config import DEFAULT_HEALTH, HealthSection
from clue_ds.errors import UserError, existing_file, run_module
from clue_ds.job import watchdog
from clue_ds.model import ops
from clue_ds.settings import arguments
from clue_ds.tasks import examples, features
from clue_ds.tasks.examples import Example
from clue_ds.tasks.features import Features, Text
from clue_ds.tasks.predict.predictor import MASK, Prediction, Predictor, check_finite
from clue_ds.tasks.registry import Record

CHUNK = 4096  # lines that are read, sorted by length and computed together
FIELDS_WITHOUT_TASK = (("sentence1", "sentence2"), ("sentence",), ("text",))


class Answered(NamedTuple):
    """A line of the input, the tokens that the model read, and its class or embedding."""

    example: Example
    features: Features
    answer: Prediction | np.ndarray


def predict(
    model: Path,
    task: str | None = None,
    text: tuple[str, ...] = (),
    file: Path | None = None,
    output: Path | None = None,
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
    """Classify texts, fill in masked tokens, or embed or compare texts with a trained model.

    To split a large file over several GPUs or ranks:
    clue-ds launch --local 2 -- predict --model M --file in.jsonl --output out.jsonl

    Args:
        model: a run directory, one of its checkpoints, a Hugging Face directory, or a zip of one.
        task: the task of a classifier: a task of CLUE or a YAML file; default the one that the
            model was fine-tuned for.
        text: texts to classify (or embed); for a task of pairs, alternate first and second texts.
        file: instead of --text, a file of JSON lines, CSV or TSV with the task's fields; without a
            task the fields are "sentence", "text", or "sentence1" and "sentence2".
        output: the file for the answers, one JSON object per line, or with --embed also an array
            (.npy). Without it the answers are printed.
        fill_mask: texts with [MASK] for each token to fill in.
        embed: write the embedding of every text (the mean over its tokens) instead of a class.
        similarity: two texts to compare by the cosine of their embeddings.
        top_k: number of candidates to show for each mask.
        batch_size: number of texts that the model computes together.
        max_length: most tokens to read of a text; default the length that the model was
            fine-tuned with.
        kernels: implementation of the fused operations: triton, torch, or auto (triton on a GPU).
        force: replace the output if it exists.
        health: deadlines for the ranks of a job.
    """
    inputs = [bool(text), file is not None, bool(fill_mask), similarity is not None]
    if sum(inputs) != 1:
        raise UserError("give exactly one of --text, --file, --fill-mask and --similarity")
    if output is not None and file is None:
        raise UserError("--output needs --file: other answers are printed; drop --output")
    with watchdog.reporting(), warnings.catch_warnings():
        warnings.showwarning = _print_warning
        if dist.world_size() > 1:
            _join_ranks(output, health)
        ops.choose_kernels(kernels)
        predictor = Predictor(model, task, batch_size, max_length)
        if fill_mask:
            _print_candidates(predictor, fill_mask, top_k)
        elif similarity is not None:
            print(f"{predictor.similarity([similarity[0]], [similarity[1]])[0]:.4f}")
        elif file is None:
            chunks = answered(predictor, _given(predictor, text), embed)
            write_answers(chunks, sys.stdout, predictor.names)
        else:
            with watchdog.current().section("predict"):
                predict_file(predictor, file, output, embed, force)
        dist.barrier()
    dist.report_end(stopped=False)


def _join_ranks(out: Path | None, health: HealthSection) -> None:
    if out is None:
        raise UserError(
            "several ranks can only share the lines of a file; give --file and --output"
        )
    from clue_ds.pretrain import engine

    watchdog.start(health, "clue-ds predict", can_stop=False)
    engine.start()


def _print_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"clue-ds predict: {message}", file=sys.stderr)


def _given(predictor: Predictor, texts: tuple[str, ...]) -> list[Example]:
    """The texts of the command line, in pairs if the task is about pairs."""
    task = predictor.task
    if task is not None and task.build is not None:
        fields = ", ".join(task.fields)
        raise UserError(f"{task.name} reads {fields}; give them as JSON lines with --file")
    given: list[Text] = list(texts)
    if task is not None and task.kind == "pair":
        if len(texts) % 2:
            raise UserError(
                f"{task.name} is about pairs of texts, but {len(texts)} is an odd number of texts; "
                "alternate first and second texts"
            )
        given = list(zip(texts[::2], texts[1::2], strict=True))
    return [
        Example(number, examples.checked(one, f"--text {number + 1}"), None)
        for number, one in enumerate(given)
    ]


def read_unlabelled(predictor: Predictor, path: Path) -> Iterator[Example]:
    """The texts of a file, one line at a time; a UserError names file and line."""
    number = -1
    for number, (line, record) in enumerate(examples.records(path)):
        where = f"{path}:{line}"
        text = text_of_record(predictor, record, where)
        yield Example(examples.id_of(record, number, where), text, None)
    if number < 0:
        raise UserError(f"{path} has no examples: it is empty; give one JSON object per line")


def text_of_record(predictor: Predictor, record: Record, where: str) -> Text:
    """What the model reads of a record: the task's text, or without a task the usual fields."""
    if predictor.task is not None:
        return examples.text_of(predictor.task, record, where)
    for fields in FIELDS_WITHOUT_TASK:
        if all(name in record for name in fields):
            texts = [record[name] for name in fields]
            return examples.checked(texts[0] if len(texts) == 1 else (texts[0], texts[1]), where)
    raise UserError(
        f"{where}: no field 'sentence' or 'text', nor 'sentence1' and 'sentence2' "
        f"(has {', '.join(record) or 'none'})"
    )


def predict_file(
    predictor: Predictor, file: Path, out: Path | None, embed: bool = False, force: bool = False
) -> None:
    """Answer every line of a file, into `out` or on the terminal, and print how many."""
    begin = time.perf_counter()
    rows = read_unlabelled(predictor, existing_file(file, "input"))
    chunks = answered(predictor, rows, embed)
    if out is None:
        write_answers(chunks, sys.stdout)
        return
    if dist.rank() > 0:
        _check_output(out, force)
        for _ in chunks:
            pass  # every rank computes its share; rank 0 writes
        return
    with output_file(out, force) as stream:
        if embed and out.suffix == ".npy":
            num_texts, num_cut = write_array(chunks, predictor.config.hidden_size, stream)
        else:
            with open(stream.fileno(), "w", encoding="utf-8", closefd=False) as lines:
                num_texts, num_cut = write_answers(chunks, lines)
    rate = num_texts / (time.perf_counter() - begin)
    cut = f", {num_cut:,} of them cut to {predictor.max_length} tokens" if num_cut else ""
    print(f"wrote {out}: {num_texts:,} answers{cut}, {rate:,.0f} per second")


def _check_output(out: Path, force: bool) -> None:
    if out.is_dir():
        raise UserError(f"{out} is a directory; give the path of a file for the answers")
    if out.exists() and not force:
        raise UserError(f"{out} exists; give --force to replace it, or another path")


@contextlib.contextmanager
def output_file(out: Path, force: bool) -> Iterator[IO[bytes]]:
    """A new file that gets its name only when it is complete."""
    try:
        _check_output(out, force)
        out.parent.mkdir(parents=True, exist_ok=True)
        with files.writing(out, shared=True) as stream:
            yield stream
    except OSError as error:
        raise UserError(
            f"can't write {out}: {error}; free some space or use another path"
        ) from None


def answered(
    predictor: Predictor, rows: Iterable[Example], embed: bool = False
) -> Iterator[list[Answered]]:
    """The examples with their answers, in order, one chunk of the file at a time."""
    rows = iter(rows)
    while chunk := list(islice(rows, CHUNK)):
        encoded = predictor.encode([example.text for example in chunk])
        answers = _answers(predictor, encoded, embed)
        for example, answer in zip(chunk, answers, strict=True):
            check_finite(answer, f"the text with id {example.id!r}")
        yield list(map(Answered, chunk, encoded, answers))


def _answers(predictor: Predictor, encoded: list[Features], embed: bool) -> list[Any]:
    """A class or an embedding for each text.

    Ranks share whole batches, the same ones that a single process makes, because the last bits of
    an answer depend on the other texts in its batch.
    """
    answer = predictor.pool if embed else predictor.classify
    batches = features.batches_by_length(encoded, predictor.batch_size)
    mine = [i for batch in batches[dist.rank() :: dist.world_size()] for i in batch]
    result: list[Any] = [None] * len(encoded)
    for indices, answers in dist.all_gather((mine, answer([encoded[i] for i in mine]))):
        for i, one in zip(indices, answers, strict=True):
            result[i] = one
    return result


def write_answers(
    chunks: Iterable[list[Answered]], stream: IO[str], names: Mapping[str, str] | None = None
) -> tuple[int, int]:
    """Write one JSON object per line, in order; return the numbers of texts and of cut texts.

    `names`: label -> its name, for answers that a person reads; files have labels only.
    """
    num_texts = num_cut = 0
    for chunk in chunks:
        for example, feature, answer in chunk:
            shown = _answer(answer, names or {})
            line = {"id": example.id, **shown, "truncated": feature.truncated}
            stream.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            num_cut += feature.truncated
        num_texts += len(chunk)
    return num_texts, num_cut


def _answer(answer: Prediction | np.ndarray, names: Mapping[str, str]) -> dict[str, Any]:
    if isinstance(answer, Prediction):
        rounded = {names.get(k, k): round(p, 6) for k, p in answer.probabilities.items()}
        name = {"name": names[answer.label]} if answer.label in names else {}
        return {"label": answer.label, **name, "probabilities": rounded}
    return {"embedding": [round(float(value), 6) for value in answer]}


def write_array(chunks: Iterable[list[Answered]], width: int, stream: IO[bytes]) -> tuple[int, int]:
    """Write embeddings as one .npy, float32 [texts, H]; return the numbers of texts and cut texts.

    The number of rows is known only at the end; numpy pads the header so that it fits in later.
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
    """The entry point that `clue-ds launch` starts on every rank."""
    with dist.report_errors_once():
        arguments.call(predict, "clue-ds predict", argv, quiet=dist.rank() > 0)


if __name__ == "__main__":
    sys.exit(run_module("clue-ds predict", main))
