"""Saving, resuming, and reading weights back: DeepSpeed's checkpoints inside ours.

Guarantees: a checkpoint that exists is complete (see manifest.py); saving either publishes a new
one or leaves the earlier ones as they were; resuming at the same world size continues bit for bit,
dropout included; `load_weights` gives the fp32 master weights of every ZeRO stage and precision,
without a process group. Ours is JSON, YAML and safetensors; DeepSpeed's pickles are opened only
after their hashes were compared.

Rejected: DeepSpeed's `latest` (written before the last barrier, not atomically); its module weights
at stage 0 in bf16 (2.6e-3 off the masters); reading the masters of stages 1 to 3 ourselves
where deepspeed.utils.zero_to_fp32 can (it is exact).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from clue_ds import config as run_config
from clue_ds import dist
from clue_ds.data.samples import STREAM_VERSION
from clue_ds.errors import UserError
from clue_ds.model import pairs, weights
from clue_ds.presets import ModelConfig
from clue_ds.pretrain import manifest as manifests
from clue_ds.pretrain.engine import Engine, import_deepspeed
from clue_ds.pretrain.manifest import Choice, Manifest
from clue_ds.pretrain.resume import Source

TAG = "deepspeed"
MODEL_STATES = "mp_rank_00_model_states.pt"
FROZEN = "frozen.safetensors"
VERSIONS_OF = ("clue_ds", "torch", "deepspeed", "numpy")


def newest_checkpoint(run_dir: str | Path) -> Path:
    """Directory of the newest intact checkpoint of a run; a UserError when there is none."""
    return _choose(Path(run_dir)).directory


# ---------------------------------------------------------------------------------------- saving


def save(engine: Engine, source: Source, step: int) -> Path:
    """Publish the state after `step` updates and delete the oldest; every rank must call it."""
    folder = Path(source.config.run_dir) / manifests.FOLDER
    final = folder / manifests.name(step)
    staging = final.with_name(final.name + ".tmp")
    dist.agree(_prepare(staging, engine) if dist.rank() == 0 else None)
    with _clear_write_errors(staging):
        with contextlib.redirect_stdout(io.StringIO()):
            engine.deepspeed.save_checkpoint(str(staging), tag=TAG, save_latest=False)
        safetensors.torch.save_file(_random_state(), staging / _random_file(dist.rank()))
        if dist.rank() == 0:
            run_config.save(source.config, staging / "config.yaml")
            shutil.copyfile(source.vocab_file, staging / "vocab.txt")
            tokenizer = json.dumps({"do_lower_case": source.lower_case})
            (staging / "tokenizer_config.json").write_text(tokenizer + "\n", encoding="utf-8")
            safetensors.torch.save_file(engine.frozen, staging / FROZEN)
    dist.barrier()
    error = None
    if dist.rank() == 0:
        error = _missing_shards(staging, engine)
        with _clear_write_errors(staging):
            if error is None:
                manifests.publish(staging, final, _describe(engine, source, step))
                manifests.delete_old(folder, source.config.checkpoint.keep)
    dist.agree(error)
    return final


def _prepare(staging: Path, engine: Engine) -> str | None:
    """Make an empty staging directory; what is wrong when there is no room for a checkpoint."""
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return no_room_for(engine, staging)


def no_room_for(engine: Engine, directory: Path) -> str | None:
    """None, or the message that a checkpoint of `engine` doesn't fit on `directory`'s disk."""
    # Weights, fp32 masters and two moments; the rest is small.
    return no_room(directory, num_bytes=16 * engine.num_parameters + (16 << 20))


def no_room(directory: Path, num_bytes: int) -> str | None:
    """None, or the message that `directory`'s disk has less than `num_bytes` free."""
    free = shutil.disk_usage(directory).free
    if free >= num_bytes:
        return None
    return (
        f"the disk of {directory} has {free / 2**30:.2f} GiB free, but a checkpoint needs about "
        f"{num_bytes / 2**30:.2f} GiB; the earlier checkpoints are untouched. Free some space (or "
        "lower checkpoint.keep) and start the same command again: it resumes"
    )


@contextlib.contextmanager
def _clear_write_errors(staging: Path) -> Iterator[None]:
    """A failing disk is the user's to mend: one message, and the half-written files go."""
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        # torch's zip writer reports a failed write as a RuntimeError that names itself.
        if isinstance(error, RuntimeError) and not _failed_write(error):
            raise
        if dist.rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise UserError(
            f"can't write the checkpoint {staging}: {str(error).splitlines()[0]}; the earlier "
            "checkpoints are untouched. Make room on that disk (or move run_dir) and start the "
            "same command again: it resumes"
        ) from error


def _failed_write(error: RuntimeError) -> bool:
    return any(word in str(error) for word in ("PytorchStreamWriter", "inline_container", "write"))


def _missing_shards(staging: Path, engine: Engine) -> str | None:
    """Each rank writes a shard; rank 0 must see them all."""
    expected = dist.world_size() if engine.stage else 0
    found = len(list((staging / TAG).glob("*_optim_states.pt")))
    if found == expected:
        return None
    return (
        f"{staging} holds the shards of {found} ranks instead of {expected}: run_dir must be on a "
        "disk that all machines of the run share"
    )


def _describe(engine: Engine, source: Source, step: int) -> Manifest:
    return Manifest(
        format=manifests.FORMAT,
        step=step,
        samples=step * source.config.train.global_batch_size,
        world_size=dist.world_size(),
        zero_stage=engine.stage,
        offload=engine.offload,
        precision=engine.precision,
        config=source.config.model_dump(),
        model=dataclasses.asdict(source.model),
        vocab_sha256=source.vocab_sha256,
        corpus_fingerprint=source.corpus_fingerprint,
        group_names=engine.group_names,
        versions={package: importlib.metadata.version(package) for package in VERSIONS_OF},
        files={},
        stream_version=STREAM_VERSION,
    )


def seed_dropout(seed: int, step: int) -> None:
    """Start this rank's generators: other draws on every rank, and after every resume."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + dist.rank())


def _random_file(rank: int) -> str:
    return f"rng-rank{rank:05d}.safetensors"


def _random_state() -> dict[str, Tensor]:
    """State of the generators that dropout draws from on this rank."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


# -------------------------------------------------------------------------------------- resuming


def load(engine: Engine, choice: Choice) -> None:
    """Put a chosen checkpoint's weights, moments and generator states into a fresh engine."""
    engine.load(choice.directory, TAG)
    engine.frozen = safetensors.torch.load_file(choice.directory / FROZEN)
    if choice.manifest.world_size != dist.world_size():
        # Stage 0 on another number of ranks: new, but reproducible, draws.
        seed_dropout(int(choice.manifest.config["seed"]), choice.manifest.step)
        return
    states = safetensors.torch.load_file(choice.directory / _random_file(dist.rank()))
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# --------------------------------------------------------------------------------------- weights


def load_weights(directory: str | Path) -> tuple[ModelConfig, dict[str, Tensor], Path]:
    """(shape, fp32 weights, vocab.txt) of a run's newest checkpoint, or of one checkpoint.

    Keys are transformers' BertForPreTraining's; tied entries share storage; vocabulary rows that
    only padded the GEMMs are gone.
    """
    choice = _choose(Path(directory))
    saved = choice.manifest
    state = _masters(choice)
    state |= safetensors.torch.load_file(choice.directory / FROZEN)
    # Labelled pairs are a means of training; the model is the BERT.
    state = {name: t for name, t in state.items() if not name.startswith(pairs.HEAD)}
    config = ModelConfig(**saved.model)
    state = weights.trim_vocab(weights.tie(state, choice.directory), config.vocab_size)
    return config, state, choice.directory / "vocab.txt"


def _choose(directory: Path) -> Choice:
    """What `directory` means: a checkpoint, or a run whose newest intact checkpoint counts."""
    if (directory / manifests.FILE).is_file():
        try:
            return Choice(directory, manifests.verify(directory), {})
        except manifests.Damaged as error:
            raise UserError(f"checkpoint {directory} is damaged: {error}") from None
    choice = manifests.newest(directory)
    if choice is None:
        raise UserError(
            f"{directory} holds no checkpoint; give a run directory that has "
            f"{manifests.FOLDER}/step-NNNNNNNN, or one such directory"
        )
    return choice


def _masters(choice: Choice) -> dict[str, Tensor]:
    """fp32 weights of everything that was trained, by name."""
    import_deepspeed()
    saved = choice.manifest
    if saved.zero_stage == 0:
        return _masters_of_stage_0(choice)
    if (saved.zero_stage, saved.offload, saved.precision) == (1, False, "bf16"):
        return _masters_of_bf16_stage_1(choice.directory / TAG, saved.world_size)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        state = get_fp32_state_dict_from_zero_checkpoint(str(choice.directory), tag=TAG)
    return {name: tensor.float() for name, tensor in state.items()}


def _unpickle(path: Path) -> dict[str, Any]:
    """DeepSpeed's files hold more than tensors; their hashes were compared before."""
    return torch.load(path, map_location="cpu", weights_only=False)


def _masters_of_stage_0(choice: Choice) -> dict[str, Tensor]:
    """zero_to_fp32 fails here; the masters are lists without names, in our groups' order."""
    content = _unpickle(choice.directory / TAG / MODEL_STATES)
    state = {name: tensor.float() for name, tensor in content["module"].items()}
    if choice.manifest.precision == "fp32":
        return state
    groups = content["optimizer"]["fp32_groups"]
    for names, group in zip(choice.manifest.group_names, groups, strict=True):
        state |= {name: p.detach() for name, p in zip(names, group, strict=True)}
    # The other name of a tied tensor still holds the rounded weights.
    return state | {alias: state[original] for alias, original in weights.TIED.items()}


def _bf16_shard(rank: int) -> str:
    return f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def _masters_of_bf16_stage_1(folder: Path, world_size: int) -> dict[str, Tensor]:
    """What DeepSpeed's BF16_Optimizer saves (it adds up in fp32), which zero_to_fp32 refuses.

    Each group is one flat vector, cut evenly over the ranks and padded at its end.
    """
    shards = [_unpickle(folder / _bf16_shard(r))["optimizer_state_dict"] for r in range(world_size)]
    state = {}
    for number, shapes in enumerate(_unpickle(folder / MODEL_STATES)["param_shapes"]):
        flat = torch.cat([s["single_partition_of_fp32_groups"][number].detach() for s in shards])
        begin = 0
        for name, shape in shapes.items():
            state[name] = flat[begin : begin + shape.numel()].view(shape).clone()
            begin += shape.numel()
    return state
