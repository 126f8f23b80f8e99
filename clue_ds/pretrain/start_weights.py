"""The initial weights of a run with `model.init`.

Guarantees: the network and the words of the source are those of this run, compared token by token,
or one error says what differs; a source whose words are unknown is refused. Parameters that the
source lacks keep their initial values and are reported.
"""

from __future__ import annotations

from pathlib import Path

from clue_ds import config as run_config
from clue_ds import presets
from clue_ds.config import RunConfig
from clue_ds.errors import UserError
from clue_ds.export import slim, sources
from clue_ds.export.sources import OpenedModel
from clue_ds.model import weights
from clue_ds.model.bert import BertForPreTraining
from clue_ds.settings import program
from clue_ds.vocab_file import difference, vocab_lines

# Rows beyond the vocabulary: this many are padding, fewer may be lines that were removed from it.
LEAST_PADDING = 8


def adopt_activation(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The config with the activation of the model that it starts from, and a note if it is another.

    An activation that the user set stays. A run that is continued keeps the one that it has, even
    if the model that it started from is gone.
    """
    section = config.model
    if section.init is None or section.hidden_act is not None:
        return config, []
    found = _activation_so_far(config)
    if found is None:
        found = sources.hidden_act(section.init)
    if found == presets.get(section.preset).hidden_act:
        return config, []
    adopted = section.model_copy(update={"hidden_act": found})
    note = (
        f"hidden_act is {found}, which {section.init} was trained with; to train with another one, "
        "set model.hidden_act"
    )
    return config.model_copy(update={"model": adopted}), [note]


def _activation_so_far(config: RunConfig) -> str | None:
    """The activation of the run in `run_dir` that started from the same model; None without one."""
    path = Path(config.run_dir) / "config.yaml"
    if not path.is_file():
        return None
    try:
        saved = run_config.load(path).model
    except UserError:  # a config that was damaged or edited decides nothing
        return None
    if saved.init != config.model.init:
        return None
    return saved.hidden_act or presets.get(saved.preset).hidden_act


def load(
    model: BertForPreTraining, where: str, vocab_file: str | Path, lower_case: bool
) -> list[str]:
    """Load from a run, model directory, zip file or hub name; returns notes for the user.

    `vocab_file` and `lower_case` are those of the corpus.
    """
    with sources.opened(where) as source:
        num_rows = _compare_words(source, where, vocab_file)
        notes = [f"starting from the weights in {where}", *source.notes]
        if num_rows:
            notes.append(f"{where} has {num_rows:,} rows beyond its vocabulary, which are left out")
        if source.lower_case != lower_case:
            notes.append(_other_case(where, lower_case))
        source = slim.drop_unused_rows(source)
        missing = weights.load_into(model, source.config, source.state_dict, where)
    return notes + [f"{where} has no {name}, which starts from fresh weights" for name in missing]


def _compare_words(source: OpenedModel, where: str, vocab_file: str | Path) -> int:
    """The number of rows that the source has beyond its vocabulary, which is the corpus's."""
    if not source.vocab_file.is_file():
        raise UserError(
            f"model.init {where} has no vocab.txt and no tokenizer.json, so its words can't be "
            "compared with the corpus; copy the vocabulary that it was trained with into it"
        )
    theirs, ours = vocab_lines(source.vocab_file), vocab_lines(vocab_file)
    found = difference(theirs, ours)
    if found is not None:
        raise UserError(
            f"model.init {where} has another vocabulary than the corpus ({found}); write the "
            f"model's vocabulary with: {program.command('import', where)} --output DIR, and make "
            "the corpus again with it: clue-ds shard ... --vocab DIR/vocab.txt"
        )
    num_rows = source.config.vocab_size - len(theirs)
    if 0 < num_rows < LEAST_PADDING:
        raise UserError(
            f"model.init {where} has {source.config.vocab_size:,} words but its vocabulary has "
            f"{len(theirs):,} tokens. If lines were removed from it, every id after them means "
            "another row: put them back as [unused-a] and so on, and make the corpus again with "
            f"it. Only if the last {num_rows} rows are padding, drop them with "
            f"`{program.command('import', where)}` and start from the result"
        )
    return num_rows


def _other_case(where: str, lower_case: bool) -> str:
    """A note: the corpus was tokenized otherwise than the texts that the model was trained on."""
    if lower_case:
        return (
            f"{where} keeps case and accents, but the corpus was lower-cased, so the model's words "
            "with capital letters are not trained; to keep case, make the corpus again with "
            "clue-ds shard ... --no-lower-case"
        )
    return (
        f"{where} was trained on lower-cased text, but the corpus keeps case and accents; to "
        "lower-case it, make the corpus again with clue-ds shard ... --lower-case"
    )
