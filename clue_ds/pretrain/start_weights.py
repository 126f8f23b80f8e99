"""The initial weights of a run with `model.init`.

Guarantees: the network and the vocabulary of the source are those of this run, or one error lists
the differences; parameters that the source lacks keep their initial values and are reported.
"""

from __future__ import annotations

from clue_ds import files
from clue_ds.errors import UserError
from clue_ds.export import slim, sources
from clue_ds.model import weights
from clue_ds.model.bert import BertForPreTraining


def load(model: BertForPreTraining, where: str, expected_vocab: str) -> list[str]:
    """Load from a run, model directory, zip file or hub name; returns names that it lacks."""
    with sources.opened(where) as source:
        vocab_file = source.vocab_file
        # Without vocab.txt only the shapes can be checked.
        if vocab_file.is_file():
            if files.sha256(vocab_file) != expected_vocab:
                raise UserError(
                    f"model.init {where} has another vocabulary than the corpus; rebuild the "
                    f"corpus with it: clue-ds shard ... --vocab {vocab_file}"
                )
            source = slim.drop_unused_rows(source)
        return weights.load_into(model, source.config, source.state_dict, where)
