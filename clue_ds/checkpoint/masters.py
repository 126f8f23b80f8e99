"""Reading a run's weights: fp32 masters of every ZeRO stage and precision, by name.

Guarantees: no process group and no engine is needed; DeepSpeed's pickles are opened only after
their hashes were compared (manifest.py), and so that they can't run code (pickles.py).

Rejected: DeepSpeed's module weights at stage 0 in bf16, which differ from the masters by 2.6e-3;
deepspeed.utils.zero_to_fp32, which knows stages 1 to 3 only and refuses bf16 at stage 1. shards.py
reads every layout, because a run that continues in another one needs that for its moments too.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from clue_ds.checkpoint import manifest as manifests
from clue_ds.checkpoint import pickles
from clue_ds.checkpoint.manifest import FROZEN, TAG, Choice
from clue_ds.checkpoint.shards import MASTER, SavedState
from clue_ds.errors import UserError
from clue_ds.model import pairs, weights
from clue_ds.presets import ModelConfig
from clue_ds.settings import program


def load_weights(where: str | Path | Choice) -> tuple[ModelConfig, dict[str, Tensor], Path]:
    """(shape, fp32 weights, vocab.txt) of a run's newest checkpoint, or of one checkpoint.

    `where`: the directory of either, or what `choose` returned for it.

    The names are those of transformers' BertForPreTraining. Tied entries share storage, and the
    vocabulary rows that only pad the matrix multiplications are removed.
    """
    choice = where if isinstance(where, Choice) else choose(Path(where))
    state = _masters(choice)
    state |= pickles.load_tensors(choice.directory / FROZEN)
    # The head for labelled pairs is used only in training.
    state = {name: t for name, t in state.items() if not name.startswith(pairs.HEAD)}
    config = ModelConfig(**choice.manifest.model)
    state = weights.trim_vocab(weights.tie(state, choice.directory), config.vocab_size)
    return config, state, choice.directory / "vocab.txt"


def choose(directory: Path) -> Choice:
    """The checkpoint `directory`, or the newest intact checkpoint of the run `directory`."""
    if (directory / manifests.FILE).is_file():
        try:
            return Choice(directory, manifests.verify(directory), {})
        except manifests.Damaged as error:
            raise UserError(f"checkpoint {directory} is damaged: {error}") from None
    choice = manifests.newest(directory)
    if choice is None and (directory / "config.yaml").is_file():
        raise UserError(
            f"the run {directory} has saved no checkpoint yet; it does so every checkpoint.every "
            f"steps and at its end; see how far it is: {program.command('status', directory)}"
        )
    if choice is None:
        raise UserError(
            f"{directory} holds no checkpoint; give a run directory that has "
            f"{manifests.FOLDER}/step-NNNNNNNN, or one such directory"
        )
    return choice


def _masters(choice: Choice) -> dict[str, Tensor]:
    """fp32 masters of all trained parameters, by name."""
    saved = SavedState(choice.directory / TAG, choice.manifest)
    return {name: saved.read(MASTER, name).view(saved.shape(name)) for name in saved.sizes}
