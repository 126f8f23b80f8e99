"""`clue-ds report`: one page about a corpus, about pretraining runs, or about fine-tuning runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from clue_ds import files
from clue_ds.data.corpus import MANIFEST
from clue_ds.errors import UserError
from clue_ds.report import page, pretraining

CONFIG = "config.yaml"  # what only a pretraining run has
FILE = "report.html"


def report(
    places: Annotated[tuple[Path, ...], tyro.conf.Positional], output: Path | None = None
) -> None:
    """Write one page about runs, which needs nothing beside it: no network, no other file.

    About pretraining: loss, accuracy, held-out text, learning rate, speed, waiting for data,
    memory, saves and restarts, settings and what differs from the defaults, corpus, versions and
    machine. Several runs stand side by side. About fine-tuning: curves, confusion matrix, F1 of
    every class, data and settings. About a corpus: what was read, kept and dropped, lengths, and
    what the vocabulary lacks.

    Args:
        places: directories of pretraining runs; or a corpus; or a fine-tuning run, an output
            directory of `clue-ds finetune`, or a fine-tuned model (a directory or a zip).
        output: the file to write; default PLACE/report.html, of the first place, or of a model
            without its run PLACE-report.html.
    """
    if not places:
        raise UserError("give the directory of a run; several pretraining runs stand side by side")
    target = output if output is not None else places[0] / FILE
    are_runs = [(place / CONFIG).is_file() for place in places]
    if any(are_runs):
        runs = [pretraining.read(place) for place in places]
        title = "Pretraining: " + ", ".join(place.absolute().name for place in places)
        text = page.page(title, pretraining.body(runs))
    elif (places[0] / MANIFEST).is_file():
        from clue_ds.report import corpus

        if len(places) > 1:
            raise UserError("a page is about one corpus; give one directory")
        text = page.page(f"Corpus: {places[0].absolute().name}", corpus.body(places[0]))
    else:
        from clue_ds.tasks.finetune import score

        if output is None and score.is_alone(places[0]):
            target = places[0].with_name(f"{places[0].name.removesuffix('.zip')}-{FILE}")
        elif output is None:
            target = score.run_of(places[0]) / FILE
        text = score.as_html(score.collect(places), details=True)
    if target.is_dir():
        raise UserError(f"{target} is a directory; give the path of a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(target, text)
    print(f"wrote {target}")
