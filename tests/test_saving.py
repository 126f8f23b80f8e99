"""A save in the background has the same bytes, and the state of its step whatever comes after."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import make_corpus, read_log, run_ranks, tiny_config
from torch import Tensor

from clue_ds import config as run_config
from clue_ds.checkpoint import manifest
from clue_ds.checkpoint.snapshot import HostMemory, PendingFile
from clue_ds.data import Corpus
from clue_ds.pretrain.auto import memory

STEPS = 2
CASES = [
    ("zero0", "fp32"),
    ("zero1", "bf16"),
    ("zero2", "fp32"),
    ("zero3", "bf16"),
    ("zero1_offload", "fp32"),
]


def hashes(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def ranks_save(configs: list[dict[str, Any]]) -> list[int]:
    """On every rank: each run saves after its last step, in four ways; bytes of the copy in memory.

    `run_dir` is written in the background, `run_dir`-plain by DeepSpeed alone, `run_dir`-waits with
    async_save off, and `run_dir`-busy while another step changes everything.
    """
    return [save_in_four_ways(values) for values in configs]


def save_in_four_ways(values: dict[str, Any]) -> int:
    from clue_ds import dist
    from clue_ds.pretrain import train
    from clue_ds.pretrain.anomalies import spikes
    from clue_ds.pretrain.saving import Saver

    run = train.build(run_config.validate(values, "test config"))
    with run.saver:
        train.train(run)

    deepspeed = run.engine._deepspeed
    ours = deepspeed.checkpoint_engine
    deepspeed._configure_checkpointing()  # DeepSpeed's own engine again
    plain = Path(f"{values['run_dir']}-plain")
    deepspeed.save_checkpoint(str(plain), tag=manifest.TAG, save_latest=False)
    deepspeed.checkpoint_engine = ours

    texts = {spikes.FILE: run.spikes.state()}

    def saver(kind: str, **section: Any) -> Saver:
        changed = {**values, "run_dir": f"{values['run_dir']}-{kind}"}
        changed["checkpoint"] = {**values["checkpoint"], **section}
        config = run_config.validate(changed, "test config")
        return Saver(run.engine, dataclasses.replace(run.identity, config=config))

    with saver("waits", async_save=False) as waits:
        waits.save(STEPS, texts=texts)

    has_stepped = threading.Event()
    original = PendingFile.write
    PendingFile.write = lambda file: (has_stepped.wait(100), original(file))  # type: ignore
    with saver("busy") as busy:
        busy.save(STEPS, texts=texts)
        for micro_batch in run.engine.micro_batches(next(run.loader)):
            run.engine.backward(run.engine.forward(**micro_batch).loss)
        assert float(run.engine.step(0.1)) > 0
        has_stepped.set()
    PendingFile.write = original  # type: ignore[method-assign]
    run.loader.close()
    run.writers.close()
    dist.barrier()
    return run.engine._capture._memory.num_bytes


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> tuple[Path, list[int]]:
    """(folder with the runs of CASES, bytes of the copies on each rank and case)."""
    folder = tmp_path_factory.mktemp("saving")
    corpus = make_corpus(folder, sample_text)
    configs = [
        tiny_config(
            corpus,
            folder / f"{name}-{precision}",
            deepspeed=name,
            train={"steps": STEPS, "warmup_steps": 0, "precision": precision},
            checkpoint={"every": 1},
        ).model_dump()
        for name, precision in CASES
    ]
    return folder, run_ranks(2, ranks_save, configs)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_files_have_the_bytes_that_deepspeed_writes_itself(saved: Any, case: Any) -> None:
    run = saved[0] / "-".join(case)
    ours = hashes(run / "checkpoints" / manifest.name(STEPS))
    plain = hashes(run.with_name(f"{run.name}-plain"))
    assert plain and {key: ours[key] for key in plain} == plain


@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("kind", ["waits", "busy"])
def test_content_does_not_depend_on_the_way_of_saving(saved: Any, case: Any, kind: str) -> None:
    run = saved[0] / "-".join(case)
    names = (run, run.with_name(f"{run.name}-{kind}"))
    one, two = (manifest.verify(r / "checkpoints" / manifest.name(STEPS)).files for r in names)
    assert one.keys() == two.keys()
    differ = {key for key in one if one[key] != two[key]}
    assert differ <= {"config.yaml"}  # it names the run directory, and has the key itself


def test_the_copy_takes_as_much_memory_as_planned(saved: Any) -> None:
    folder, by_rank = saved
    for number, (name, precision) in enumerate(CASES):
        config = run_config.load(folder / f"{name}-{precision}" / "config.yaml")
        model = config.model.resolve(Corpus(folder / "corpus").vocab_size)
        stage = int(name[4])
        planned = [memory.copied_bytes(config, model, stage, 2, ranks) for ranks in (1, 2)]
        first, second = (sizes[number] for sizes in by_rank)
        # The pooler is not trained, and has no moments.
        assert first == pytest.approx(planned[0], rel=0.1), name
        assert first + second == pytest.approx(planned[1], rel=0.1), name


def test_log_has_the_newest_checkpoint(saved: Any) -> None:
    line = read_log(saved[0] / "zero1-bf16")[-1]
    # The save after step 1 was waited for by the one after step 2, whose line is written before.
    assert line.get("checkpoint_step", 1) == 1
    for key in ("age_s", "gib", "save_s", "wait_s"):
        assert line.get(f"checkpoint_{key}", 1.0) >= 0


def test_a_copy_keeps_shared_memory_and_changes_with_nothing() -> None:
    memory = HostMemory()
    flat = torch.arange(6.0)
    shared = {"name": "a"}
    tagged = torch.ones(3)
    tagged.owner = "weights"  # type: ignore[attr-defined]
    content = {
        "tagged": tagged,
        "flat": flat,
        "view": flat[2:4],
        "again": flat,
        "both": [shared, shared],
        "e": flat[:0],
    }
    copied = memory.copy(content)
    flat.fill_(-1)
    tagged.fill_(-1)
    assert copied["tagged"].tolist() == [1.0, 1.0, 1.0] and copied["tagged"].owner == "weights"
    shared["name"] = "b"
    assert copied["view"].tolist() == [2.0, 3.0]
    assert copied["again"] is copied["flat"] and copied["e"].numel() == 0
    assert copied["both"][0] is copied["both"][1] and copied["both"][0]["name"] == "a"
    copied["flat"][2] = 9
    assert copied["view"][0] == 9

    size = memory.num_bytes
    assert size == flat.untyped_storage().nbytes() + tagged.untyped_storage().nbytes()
    memory.reuse()
    again: dict[str, Tensor] = memory.copy(content)
    assert memory.num_bytes == size, "the second copy takes no further memory"
    assert again["flat"].data_ptr() == copied["flat"].data_ptr()
