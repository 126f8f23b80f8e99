"""A bomb in any file of a run, its hash correct, runs nothing and is one error naming the file."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import make_corpus, pretrain_runs, run_ranks, tiny_config

from clue_ds import files
from clue_ds.checkpoint import manifest, pickles
from clue_ds.checkpoint.deepspeed_import import import_deepspeed
from clue_ds.checkpoint.masters import load_weights
from clue_ds.errors import UserError

SHARDED = str(Path(__file__).with_name("zero3_sharded.json"))
CASES = [
    ("zero0", "fp32"),
    ("zero0", "bf16"),
    ("zero1", "bf16"),
    ("zero2", "fp32"),
    (SHARDED, "fp32"),
    ("zero1_offload", "fp32"),
]
# What is read when a run resumes; the last two are written by the same code at every stage.
READ = ("deepspeed/*.pt", "frozen.safetensors", "rng-rank00000.safetensors")


class Bomb:
    """An object whose unpickling makes the file `marker`."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def with_bomb(content: Any, marker: Path, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    value = {**content, "bomb": Bomb(str(marker))} if isinstance(content, dict) else content
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def put(
    directory: Path, key: str, content: bytes, verify: Callable[[Path], Any] = manifest.verify
) -> None:
    """Replace a file of a checkpoint and make the manifest fit."""
    (directory / key).write_bytes(content)
    path = directory / manifest.FILE
    values = json.loads(path.read_text())
    values["files"][key] = {"size": len(content), "sha256": files.sha256(directory / key)}
    path.write_text(manifest.seal(values))
    verify(directory)


def save_bomb_and_resume(folder: str, corpus: str) -> list[list[str | None]]:
    """For each case: save after one step, then [file, error] for a bomb in each file."""
    ends: list[list[str | None]] = []
    for number, (stage, precision) in enumerate(CASES):
        run = Path(folder, str(number))
        train = {"precision": precision, "steps": 1, "warmup_steps": 0}
        config = tiny_config(corpus, run, deepspeed=stage, train=train).model_dump()
        assert pretrain_runs([config]) == [None]
        made = run / "checkpoints" / manifest.name(1)
        found = sorted(
            p for pattern in (READ if number == 0 else READ[:1]) for p in made.glob(pattern)
        )
        for place, path in enumerate(found):
            copy = Path(folder, f"{number}-{place}")
            shutil.copytree(run, copy)
            key = path.relative_to(made).as_posix()
            bomb = pickle.dumps(Bomb(str(copy / "marker")))
            if path.suffix == ".pt":
                content = torch.load(path, map_location="cpu", weights_only=False)
                bomb = with_bomb(content, copy / "marker", zipped=place % 2 == 0)
            put(copy / "checkpoints" / made.name, key, bomb)
            (end,) = pretrain_runs([{**config, "run_dir": str(copy)}])
            ends.append([f"{number}-{place}", key, end])
    return ends


@pytest.fixture(scope="module")
def ends(
    tmp_path_factory: pytest.TempPathFactory, sample_text: str
) -> tuple[Path, list[list[str]]]:
    folder = tmp_path_factory.mktemp("pickles")
    corpus = make_corpus(folder, sample_text)
    (result,) = run_ranks(1, save_bomb_and_resume, str(folder), str(corpus))
    return folder, result


def test_resuming_from_a_bomb_runs_nothing_at_any_stage(
    ends: tuple[Path, list[list[str]]],
) -> None:
    folder, result = ends
    assert len({name.split("-")[0] for name, _, _ in result}) == len(CASES)
    assert sum(key.endswith("optim_states.pt") for _, key, _ in result) == len(CASES) - 2, (
        "not at stage 0"
    )
    for name, key, message in result:
        assert message is not None and key in message, (key, message)
        assert "Nothing in it was run" in message
        if key.endswith(".pt"):
            assert "posix.system, which no checkpoint of clue_ds contains" in message
        assert not (folder / name / "marker").exists(), key


def test_reading_the_weights_of_a_bomb_runs_nothing_at_any_stage(
    ends: tuple[Path, list[list[str]]],
) -> None:
    folder, result = ends
    for name, key, _ in result:
        if key.startswith("rng"):  # holds no weights
            continue
        # Stage 0 keeps weights and moments in one file; elsewhere each file is needed.
        with pytest.raises(UserError, match=key.rpartition("/")[2]):
            load_weights(folder / name)
        assert not (folder / name / "marker").exists(), key
    for number in range(len(CASES)):
        assert load_weights(folder / str(number))[1]


def test_every_way_of_loading_is_restricted_inside_and_as_before_outside(tmp_path: Path) -> None:
    path, marker = tmp_path / "states.pt", tmp_path / "marker"
    original, before = torch.load, torch.serialization.get_safe_globals()
    for zipped in (True, False):
        path.write_bytes(with_bomb({}, marker, zipped))
        calls: list[Callable[[], Any]] = [
            lambda: torch.load(path, weights_only=False),
            lambda: torch.load(str(path), "cpu", pickle, weights_only=False),
            lambda: torch.load(path.open("rb"), weights_only=False),
            lambda: torch.load(path, map_location="cpu", mmap=True, weights_only=False),
        ]
        for call in calls:
            with pytest.raises(UserError, match="states.pt"), pickles.guarded():
                call()
    assert not marker.exists()
    assert torch.load is original
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_a_loss_scaler_of_fp16_is_allowed(tmp_path: Path) -> None:
    """fp16 needs a GPU, but its shards need only this class."""
    import_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(2**16, 2.0, 1000, 1.0, 2)
    torch.save({"loss_scaler": scaler, "overflow": False}, tmp_path / "states.pt")
    loaded = pickles.load(tmp_path / "states.pt")["loss_scaler"]
    assert (type(loaded), loaded.cur_scale) == (DynamicLossScaler, 2**16)


def test_deepspeed_calls_torch_load_by_that_name() -> None:
    """`guarded` replaces the attribute of torch, so a name imported from torch would escape it."""
    root = Path(import_deepspeed().__file__).parent
    for part in ("runtime", "checkpoint", "utils"):
        for path in (root / part).rglob("*.py"):
            text = path.read_text("utf-8")
            assert "from torch import load" not in text, path
            assert "torch.serialization.load" not in text, path
    from deepspeed.runtime.checkpoint_engine import torch_checkpoint_engine
    from deepspeed.utils import zero_to_fp32

    assert torch_checkpoint_engine.torch is torch
    assert zero_to_fp32.torch is torch
