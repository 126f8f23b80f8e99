"""Where a run's weights begin when it names `model.init`.

Guarantees: the network and the vocabulary of the source agree with this run's, or one error says in
what they don't; what the source lacks keeps its fresh weights and is reported by name.
"""

from __future__ import annotations

from clue_ds import files
from clue_ds.errors import UserError
from clue_ds.export import slim, sources
from clue_ds.model import weights
from clue_ds.model.bert import BertForPreTraining


def load(model: BertForPreTraining, where: str, expected_vocab: str) -> list[str]:
    """Load a run, a model directory, a zip or a hub name; returns the names that it lacks."""
    with sources.opened(where) as source:
        vocab_file = source.vocab_file
        # A directory without vocab.txt is taken at its shape.
        if vocab_file.is_file():
            if files.sha256(vocab_file) != expected_vocab:
                raise UserError(
                    f"model.init {where} has another vocabulary than the corpus; make the corpus "
                    f"again with it: clue-ds shard ... --vocab {vocab_file}"
                )
            source = slim.drop_unused_rows(source)
        return weights.load_into(model, source.config, source.state_dict, where)
