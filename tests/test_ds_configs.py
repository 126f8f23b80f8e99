"""Each number has one owner: what a DeepSpeed JSON may set, and the error when it sets more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import tiny_config

from clue_ds.errors import UserError
from clue_ds.pretrain import ds_json

OWNED = [
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16.enabled",
    "fp16.enabled",
    "data_types.grad_accum_dtype",
]


def at(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


@pytest.mark.parametrize("name", ds_json.SHIPPED)
def test_shipped_files_leave_our_numbers_to_us(name: str) -> None:
    values = ds_json.read(name)
    assert [at(values, key) for key in OWNED] == ["auto"] * len(OWNED)
    assert not {"optimizer", "scheduler"} & set(values)


def test_every_shipped_file_has_a_name_and_every_name_a_file() -> None:
    folder = Path(__file__).resolve().parents[1] / "ds_configs"
    assert {path.stem for path in folder.glob("*.json")} == set(ds_json.SHIPPED)
    stages = {name: ds_json.zero_stage(ds_json.read(name)) for name in ds_json.SHIPPED}
    assert stages == {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero1_offload": 1}
    assert [n for n in ds_json.SHIPPED if ds_json.offloads(ds_json.read(n))] == ["zero1_offload"]


def test_our_numbers_fill_the_autos() -> None:
    config = tiny_config("corpus", "run", train={"precision": "bf16", "gradient_clipping": 0.5})
    filled = ds_json.fill(ds_json.read("zero2"), "zero2", config.train, world_size=2)
    assert [at(filled, key) for key in OWNED] == [8, 2, 2, 0.5, True, False, "fp32"]


def test_the_throughput_timer_is_off_unless_the_file_sets_it() -> None:
    train = tiny_config("corpus", "run").train
    filled = ds_json.fill(ds_json.read("zero1"), "zero1", train, world_size=1)
    assert at(filled, "timers.throughput.enabled") is False
    own = {"timers": {"throughput": {"enabled": True}}}
    assert at(ds_json.fill(own, "own", train, world_size=1), "timers.throughput.enabled") is True


@pytest.mark.parametrize(
    ("num_parameters", "size"), [(1, 2**20), (2**20 + 1, 2**21), (10**9, 500_000_000)]
)
def test_a_bucket_holds_the_gradients_and_not_more(num_parameters: int, size: int) -> None:
    for stage in (1, 2, 3):
        values: dict[str, Any] = {"zero_optimization": {"stage": stage}}
        ds_json.fit_buckets(values, num_parameters)
        assert at(values, "zero_optimization.reduce_bucket_size") == size


def test_a_bucket_size_of_the_file_stays_and_stage_0_has_none() -> None:
    values: dict[str, Any] = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 77}}
    ds_json.fit_buckets(values, 10**6)
    assert at(values, "zero_optimization.reduce_bucket_size") == 77
    values = {"zero_optimization": {"stage": 0}}
    ds_json.fit_buckets(values, 10**6)
    assert values == {"zero_optimization": {"stage": 0}}


def test_numbers_may_be_left_out_or_repeated(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": 2}}))
    train = tiny_config("corpus", "run").train
    filled = ds_json.fill(ds_json.read(str(path)), str(path), train, world_size=1)
    assert at(filled, "gradient_accumulation_steps") == 4


def test_all_disagreements_are_listed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    theirs = {
        "train_batch_size": 64,
        "gradient_clipping": 0.25,
        "bfloat16": {"enabled": True},
        "zero_optimization": {"stage": 1},
    }
    path.write_text(json.dumps(theirs))
    train = tiny_config("corpus", "run").train
    with pytest.raises(UserError) as error:
        ds_json.fill(ds_json.read(str(path)), str(path), train, world_size=1)
    message = str(error.value)
    for part in (
        str(path),
        "train_batch_size is 64, but train.global_batch_size gives 8",
        "gradient_clipping is 0.25, but train.gradient_clipping gives 1.0",
        "bf16.enabled is true, but train.precision gives False",
    ):
        assert part in message


MISTAKES: list[tuple[Any, str]] = [
    ({"optimizer": {"type": "AdamW"}}, 'remove the section "optimizer"; set train.optimizer'),
    ({"scheduler": {"type": "WarmupLR"}}, 'remove the section "scheduler"; set train.schedule'),
    ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}, "reduce_bucket_size"),
    ([1, 2], "must hold an object"),
    ("{", "not valid JSON"),
]


@pytest.mark.parametrize(("content", "expected"), MISTAKES, ids=[m[1] for m in MISTAKES])
def test_mistakes_in_a_file_name_it(tmp_path: Path, content: Any, expected: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=expected) as error:
        train = tiny_config("corpus", "run").train
        ds_json.fill(ds_json.read(str(path)), str(path), train, world_size=1)
    assert str(path) in str(error.value)


def test_unknown_names_and_missing_files_say_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither one of zero0, zero1"):
        ds_json.read("zero4")
    with pytest.raises(UserError, match="does not exist"):
        ds_json.read(str(tmp_path / "none.json"))
