"""Reading a run's weights: fp32 masters of every ZeRO stage and precision, by name.

Guarantees: no process group and no engine is needed; DeepSpeed's pickles are opened only after
their hashes were compared (manifest.py), and so that they can't run code (pickles.py).

Rejected: DeepSpeed's module weights at stage 0 in bf16, which differ from the masters by 2.6e-3;
own code for the masters of stages 1 to 3 where deepspeed.utils.zero_to_fp32 works, which is exact.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from torch import Tensor

from clue_ds.checkpoint import manifest as manifests
from clue_ds.checkpoint import pickles
from clue_ds.checkpoint.deepspeed_import import import_deepspeed
from clue_ds.checkpoint.manifest import FROZEN, TAG, Choice
from clue_ds.errors import UserError
from clue_ds.model import pairs, weights
from clue_ds.presets import ModelConfig
from clue_ds.settings import program

MODEL_STATES = "mp_rank_00_model_states.pt"
# At stages 1 to 3 each rank writes one such file.
OPTIMIZER_SHARDS = "*_optim_states.pt"


def newest_checkpoint(run_dir: str | Path) -> Path:
    """Directory of the newest intact checkpoint of a run; a UserError when there is none."""
    return choose(Path(run_dir)).directory


def load_weights(directory: str | Path) -> tuple[ModelConfig, dict[str, Tensor], Path]:
    """(shape, fp32 weights, vocab.txt) of a run's newest checkpoint, or of one checkpoint.

    The names are those of transformers' BertForPreTraining. Tied entries share storage, and the
    vocabulary rows that only pad the matrix multiplications are removed.
    """
    choice = choose(Path(directory))
    saved = choice.manifest
    state = _masters(choice)
    state |= pickles.load_tensors(choice.directory / FROZEN)
    # The head for labelled pairs is used only in training.
    state = {name: t for name, t in state.items() if not name.startswith(pairs.HEAD)}
    config = ModelConfig(**saved.model)
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
    import_deepspeed()
    saved = choice.manifest
    if saved.zero_stage == 0:
        return _masters_of_stage_0(choice)
    if (saved.zero_stage, saved.offload, saved.precision) == (1, False, "bf16"):
        return _masters_of_bf16_stage_1(choice.directory / TAG, saved.world_size)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    silence = io.StringIO()
    with (
        contextlib.redirect_stdout(silence),
        contextlib.redirect_stderr(silence),
        pickles.guarded(),
    ):
        state = get_fp32_state_dict_from_zero_checkpoint(str(choice.directory), tag=TAG)
    return {name: tensor.float() for name, tensor in state.items()}


def _masters_of_stage_0(choice: Choice) -> dict[str, Tensor]:
    """zero_to_fp32 fails here: the masters are lists without names, in the order of our groups."""
    content = pickles.load(choice.directory / TAG / MODEL_STATES)
    state = {name: tensor.float() for name, tensor in content["module"].items()}
    if choice.manifest.precision == "fp32":
        return state
    groups = content["optimizer"]["fp32_groups"]
    for names, group in zip(choice.manifest.group_names, groups, strict=True):
        state |= {name: p.detach() for name, p in zip(names, group, strict=True)}
    # The second name of a tied tensor still has the rounded weights.
    return state | {alias: state[original] for alias, original in weights.TIED.items()}


def _bf16_shard(rank: int) -> str:
    return f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def _masters_of_bf16_stage_1(folder: Path, world_size: int) -> dict[str, Tensor]:
    """The masters that DeepSpeed's BF16_Optimizer saves in a form which zero_to_fp32 refuses.

    Each group is one flat vector, split evenly over the ranks and padded at its end.
    """
    shards = [
        pickles.load(folder / _bf16_shard(r))["optimizer_state_dict"] for r in range(world_size)
    ]
    state = {}
    for number, shapes in enumerate(pickles.load(folder / MODEL_STATES)["param_shapes"]):
        flat = torch.cat([s["single_partition_of_fp32_groups"][number].detach() for s in shards])
        begin = 0
        for name, shape in shapes.items():
            state[name] = flat[begin : begin + shape.numel()].view(shape).clone()
            begin += shape.numel()
    return state
