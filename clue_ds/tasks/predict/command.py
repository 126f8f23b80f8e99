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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text as Styled

from clue_ds import dist, files
from clue_ds.errors import UserError, existing_file, run_module
from clue_ds.job import watchdog
from clue_ds.presets import Kernels
from clue_ds.settings import arguments
from clue_ds.settings.sections import DEFAULT_HEALTH, HealthSection
from clue_ds.tasks import features, records
from clue_ds.tasks.kinds import Answer, Example, Kind
from clue_ds.tasks.task import Record

if TYPE_CHECKING:
    from clue_ds.tasks.predict.predictor import Predictor

CHUNK = 4096  # lines that are read, sorted by length and computed together
FIELDS_WITHOUT_TASK = (("sentence1", "sentence2"), ("sentence",), ("text",))


class Answered(NamedTuple):
    """An example of the input, whether the model read only a part, and its answer or embedding."""

    example: Example
    truncated: bool
    answer: Answer | np.ndarray


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
    kernels: Kernels = "torch",
    force: bool = False,
    health: HealthSection = DEFAULT_HEALTH,
) -> None:
    """Answer a task, fill in masked tokens, or embed or compare texts with a trained model.

    To split a large file over several GPUs or ranks:
    clue-ds launch --local 2 -- predict --model M --file in.jsonl --output out.jsonl

    Args:
        model: a run directory, one of its checkpoints, a Hugging Face directory, or a zip of one.
        task: the task of a fine-tuned model: a task of CLUE or a YAML file; default the one that
            the model was fine-tuned for.
        text: texts to classify (or embed); for a task of pairs, alternate first and second texts.
        file: instead of --text, a file of JSON lines, CSV or TSV with the task's fields, or in a
            format of CLUE's task; without a task the fields are "sentence", "text", or "sentence1"
            and "sentence2".
        output: the file for the answers, one JSON object per line, or with --embed also an array
            (.npy). Without it the answers are printed.
        fill_mask: texts with [MASK] for each token to fill in.
        embed: write the embedding of every text (the mean over its tokens) instead of an answer.
        similarity: two texts to compare by the cosine of their embeddings.
        top_k: number of candidates to show for each mask.
        batch_size: number of texts that the model computes together.
        max_length: most tokens to read of a text; default the length that the model was
            fine-tuned with.
        kernels: implementation of the fused operations: triton, torch, or auto (triton on a GPU).
        force: replace the output if it exists.
        health: deadlines for the ranks of a job.
    """
    # Here and below, what needs torch is imported in the functions, because `--help` needs none.
    from clue_ds.model import ops
    from clue_ds.tasks.predict.predictor import Predictor

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
    kind = predictor.kind
    name = kind.task.name or "the task of this model" if kind is not None else ""
    size = kind.num_texts if kind is not None else 1
    if kind is not None and size == 0:
        fields = ", ".join(kind.task.fields)
        raise UserError(f"{name} reads {fields}; give them as JSON lines with --file")
    if len(texts) % size:
        raise UserError(
            f"{name} is about pairs of texts, but {len(texts)} is an odd number of texts; "
            "alternate first and second texts"
        )
    return [
        Example(number, _plain(kind, texts[i : i + size], f"--text {number + 1}"), None)
        for number, i in enumerate(range(0, len(texts), size))
    ]


def _plain(kind: Kind | None, texts: tuple[str, ...], where: str) -> Any:
    return records.checked(texts[0], where) if kind is None else kind.plain(texts, where)


def read_unlabelled(predictor: Predictor, path: Path, embed: bool = False) -> Iterator[Example]:
    """The examples of a file, one at a time; a UserError names file and line."""
    number = -1
    for number, (where, record) in enumerate(_located(predictor, path, embed)):
        text = text_of_record(predictor, record, where, embed)
        id_of = records.id_of if predictor.kind is None else predictor.kind.id_of
        yield Example(id_of(record, number, where), text, None)
    if number < 0:
        raise UserError(f"{path} has no examples: it is empty; give one JSON object per line")


def _located(predictor: Predictor, path: Path, embed: bool) -> Iterator[tuple[str, Record]]:
    if predictor.kind is None or (embed and not predictor.classifies):
        return ((f"{path}:{line}", record) for line, record in records.records(path))
    return predictor.kind.records(path)


def text_of_record(predictor: Predictor, record: Record, where: str, embed: bool = False) -> Any:
    """What the model reads of a record: the task's text, or without a task the usual fields.

    Only texts and pairs can be embedded, so the fields of other kinds don't count then.
    """
    kind = predictor.kind
    if kind is not None and (predictor.task is not None if predictor.classifies else not embed):
        return kind.text(record, where)
    for fields in FIELDS_WITHOUT_TASK:
        if all(name in record for name in fields):
            texts = [record[name] for name in fields]
            return records.checked(texts[0] if len(texts) == 1 else (texts[0], texts[1]), where)
    raise UserError(
        f"{where}: no field 'sentence' or 'text', nor 'sentence1' and 'sentence2' "
        f"(has {', '.join(record) or 'none'})"
    )


def predict_file(
    predictor: Predictor, file: Path, out: Path | None, embed: bool = False, force: bool = False
) -> None:
    """Answer every line of a file, into `out` or on the terminal, and print how many."""
    begin = time.perf_counter()
    rows = read_unlabelled(predictor, existing_file(file, "input"), embed)
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
        yield _embedded(predictor, chunk) if embed else _answered(predictor, chunk)


def _answered(predictor: Predictor, chunk: list[Example]) -> list[Answered]:
    encoded = predictor.encode_examples(chunk)
    raws = _shared(predictor, encoded.units, predictor.raws)
    answers = predictor.answers_of(encoded, raws)
    return list(map(Answered, chunk, encoded.truncated(), answers))


def _embedded(predictor: Predictor, chunk: list[Example]) -> list[Answered]:
    from clue_ds.tasks.predict.predictor import check_finite

    encoded = predictor.encode([example.text for example in chunk])
    vectors = _shared(predictor, encoded, predictor.pool)
    for example, vector in zip(chunk, vectors, strict=True):
        check_finite(vector, f"the text with id {example.id!r}")
    return list(map(Answered, chunk, [feature.truncated for feature in encoded], vectors))


def _shared(
    predictor: Predictor, units: Sequence[Any], compute: Callable[[Sequence[Any]], Iterable[Any]]
) -> list[Any]:
    """What `compute` gives for each unit.

    Ranks share whole batches, the same ones that a single process makes, because the last bits of
    an answer depend on the other texts in its batch.
    """
    batches = features.batches_by_length(units, predictor.batch_size)
    mine = [i for batch in batches[dist.rank() :: dist.world_size()] for i in batch]
    result: list[Any] = [None] * len(units)
    for indices, found in dist.all_gather((mine, compute([units[i] for i in mine]))):
        for i, one in zip(indices, found, strict=True):
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
        for example, truncated, answer in chunk:
            line = {"id": example.id, **_details(answer, names or {}), "truncated": truncated}
            stream.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            num_cut += truncated
        num_texts += len(chunk)
    return num_texts, num_cut


def _details(answer: Answer | np.ndarray, names: Mapping[str, str]) -> dict[str, Any]:
    if isinstance(answer, Answer):
        details = {name: rounded(value) for name, value in answer.details.items()}
        label = details.get("label")
        if not isinstance(label, str) or label not in names:
            return details
        shown = {names[one]: p for one, p in details["probabilities"].items()}
        return {"label": label, "name": names[label], "probabilities": shown}
    return {"embedding": [round(float(value), 6) for value in answer]}


def rounded(value: Any) -> Any:
    """JSON data with six digits after the point."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


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
        num_cut += sum(truncated for _, truncated, _ in chunk)
    stream.seek(0)
    np.lib.format.write_array_header_1_0(stream, {**header, "shape": (num_texts, width)})
    assert stream.tell() == begin, "the header grew over the first row"
    return num_texts, num_cut


def _print_candidates(predictor: Predictor, texts: tuple[str, ...], top_k: int) -> None:
    from clue_ds.tasks.predict.predictor import MASK

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
