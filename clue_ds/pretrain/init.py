"""Where a run's weights begin when it names `model.init`.

Guarantees: the network and the vocabulary of the source agree with this run's, or one error says in
what they don't; what the source lacks keeps its fresh weights and is reported by name.
"""

from __future__ import annotations

from pathlib import Path

from clue_ds.data.vocab import vocab_sha256
from clue_ds.errors import UserError
from clue_ds.model import weights
from clue_ds.model.bert import BertForPreTraining
from clue_ds.pretrain import checkpoint


def load(model: BertForPreTraining, directory: str, expected_vocab: str) -> list[str]:
    """Load a Hugging Face directory, a run or a checkpoint; returns the names that it lacks."""
    path = Path(directory)
    if (path / "config.json").is_file():
        _check_vocab(path / "vocab.txt", expected_vocab)
        return weights.load_pretrained(model, path)
    if not path.is_dir():
        raise UserError(
            f"model.init {directory} is not a directory; give a Hugging Face directory or a run"
        )
    config, state, vocab_file = checkpoint.load_weights(path)
    weights.check_same_shape(model.config, config, path)
    _check_vocab(vocab_file, expected_vocab)
    num_rows = len(model.state_dict()[weights.WORD_EMBEDDINGS])
    model.load_state_dict(weights.pad_vocab_rows(state, num_rows))
    return []


def _check_vocab(vocab_file: Path, expected: str) -> None:
    """Ids must mean the same tokens; a directory without vocab.txt is taken at its shape."""
    if vocab_file.is_file() and vocab_sha256(vocab_file) != expected:
        raise UserError(
            f"model.init {vocab_file.parent} has another vocabulary than the corpus; make the "
            f"corpus again with it: clue-ds shard ... --vocab {vocab_file}"
        )
