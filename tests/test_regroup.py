"""Masters and moments are the same bits on any number of ranks, at any ZeRO stage.

First against shards that are made here, straight from DeepSpeed's description of them; then with
DeepSpeed's own on four, two and four ranks.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import make_corpus, pretrain_runs, read_log, tiny_config
from test_manifest import described
from torch import Tensor
from zygote import Zygote

from clue_ds import config as run_config
from clue_ds.checkpoint import manifest, regroup, shards
from clue_ds.checkpoint.layout import cut_pieces, flat_pieces
from clue_ds.checkpoint.manifest import TAG
from clue_ds.checkpoint.shards import MASTER, SavedState
from clue_ds.errors import UserError

ZERO3 = str(Path(__file__).with_name("zero3_sharded.json"))
KEYS = (MASTER, "exp_avg", "exp_avg_sq")
# More ranks than elements in the second group, odd sizes, and a parameter that ends at a border.
GROUPS = {"matrix": (5, 7), "square": (4, 4), "long": (3, 11)}, {"bias": (3,), "one": (1,)}

# ------------------------------------------------------------------------------ shards made here

State = dict[tuple[str, str], Tensor]


def state(seed: int = 0) -> State:
    """(key, name) -> flat values, all different."""
    torch.manual_seed(seed)
    names = {name: shape for group in GROUPS for name, shape in group.items()}
    return {(k, n): torch.randn(torch.Size(s).numel()) for n, s in names.items() for k in KEYS}


def padded(parts: list[Tensor], multiple: int) -> Tensor:
    flat = torch.cat(parts)
    return torch.cat([flat, torch.full((-flat.numel() % multiple,), torch.nan)])


def flat_group(values: State, key: str, names: list[str], world: int, align: int) -> list[Tensor]:
    """A group as stages 1 and 2 cut it, one part a rank."""
    parts = [padded([values[key, name]], align) for name in names[:-1]]
    return list(padded([*parts, values[key, names[-1]]], 2 * world).chunk(world))


def cut_group(values: State, key: str, names: list[str], world: int) -> list[Tensor]:
    """A group as stage 3 cuts it, one part a rank."""
    pieces = [padded([values[key, name]], world).chunk(world) for name in names]
    return [torch.cat([piece[rank] for piece in pieces]) for rank in range(world)]


def write(
    folder: Path, values: State, stage: int, world: int, precision: str, align: int = 1
) -> SavedState:
    """The files that DeepSpeed would have written, opened."""
    counters = dict(zip(shards.COUNTERS, (7, 56, 2), strict=True))
    orders = [list(group) for group in GROUPS]
    if align > 1:  # as with round_robin_gradients
        orders = [order[::2] + order[1::2] for order in orders]
    shapes = [{name: torch.Size(GROUPS[i][name]) for name in o} for i, o in enumerate(orders)]
    model = {**counters, "param_shapes": shapes, "module": {}, "optimizer": None}
    step = {"step": torch.tensor(5.0)}
    saved = dataclasses.replace(
        described(7), zero_stage=stage, world_size=world, precision=precision, group_names=orders
    )
    if stage == 0:
        names = [name for order in orders for name in order]
        masters = {n: values[MASTER, n].view(shapes[n in orders[1]][n]) for n in names}
        moments = {
            i: {**step, **{k: values[k, n].view(masters[n].shape) for k in KEYS[1:]}}
            for i, n in enumerate(names)
        }
        inner: dict[str, Any] = {"state": moments, "param_groups": []}
        if precision != "fp32":
            groups = [[masters[n] for n in order] for order in orders]
            inner = {"optimizer_state_dict": inner, "fp32_groups": groups, "cur_scale": 512.0}
            masters = {n: m.bfloat16() for n, m in masters.items()}
        model |= {"module": masters, "optimizer": inner}
    cut = {
        key: [
            cut_group(values, key, order, world)
            if stage == 3
            else flat_group(values, key, order, world, align)
            for order in orders
        ]
        for key in KEYS
    }
    for rank in range(world if stage else 0):
        masters_here = [parts[rank] for parts in cut[MASTER]]
        inner = {
            "state": {
                i: {**step, **{k: cut[k][i][rank] for k in KEYS[1:]}} for i in range(len(orders))
            },
            "param_groups": [],
        }
        if stage == 3:
            content = {"fp32_flat_groups": masters_here, "optimizer_state_dict": inner}
        else:
            content = {"base_optimizer_state": inner}
            if precision != "bf16":  # without the padding behind the last parameter
                sizes = [[torch.Size(s).numel() for s in g.values()] for g in shapes]
                paddings = [[*(-size % align for size in group[:-1]), 0] for group in sizes]
                totals = [sum(a) + sum(b) for a, b in zip(sizes, paddings, strict=True)]
                masters_here = [
                    m[: max(0, total - rank * m.numel())]
                    for m, total in zip(masters_here, totals, strict=True)
                ]
                content["param_alignment_paddings"] = paddings
            content["single_partition_of_fp32_groups"] = masters_here
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": content}, folder / name)
    at_3 = stage == 3
    torch.save(model, folder / (shards.MODEL_STATES_OF_STAGE_3 if at_3 else shards.MODEL_STATES))
    return SavedState(folder, saved)


@pytest.mark.parametrize(
    ("stage", "precision", "align"),
    [
        (0, "fp32", 1),
        (0, "bf16", 1),
        (1, "bf16", 1),
        (1, "fp32", 1),
        (2, "fp16", 4),
        (3, "fp32", 1),
    ],
)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_every_rank_of_any_other_layout_gets_the_saved_bits(
    tmp_path: Path, stage: int, precision: str, align: int, world: int
) -> None:
    values = state()
    saved = write(tmp_path, values, stage, world, precision, align)
    for key, name in values:
        assert torch.equal(saved.read(key, name), values[key, name]), (key, name)
        assert saved.keys(name) == list(KEYS[1:])
        assert saved.scalars(name) == {"step": torch.tensor(5.0)}
        assert saved.shape(name) == torch.Size((GROUPS[0] | GROUPS[1])[name])
    assert saved.counters == {"global_steps": 7, "global_samples": 56, "skipped_steps": 2}
    orders = [list(group) for group in GROUPS]
    total = 4 * sum(value.numel() for value in values.values())
    for now in (1, 2, 3, 8):
        read = saved.num_bytes
        for key in KEYS:
            for order in orders:
                sizes = {name: saved.sizes[name] for name in order}
                wanted = cut_group(values, key, order, now), flat_group(values, key, order, now, 1)
                for rank in range(now):
                    length = wanted[1][rank].numel()
                    flat = flat_pieces(sizes, [0] * len(sizes), rank, length)
                    for pieces, want in (
                        (cut_pieces(sizes, rank, now), wanted[0][rank]),
                        (flat, wanted[1][rank]),
                    ):
                        got = torch.full_like(want, torch.nan)
                        for piece in pieces:
                            end = piece.at + piece.end - piece.begin
                            saved.copy_to(got[piece.at : end], key, piece.name, piece.begin)
                        assert torch.equal(got.nan_to_num(99), want.nan_to_num(99))
        assert saved.num_bytes - read == 2 * total, "each element once, for each of two layouts"


def test_a_shard_that_lacks_something_is_an_error_that_names_it(tmp_path: Path) -> None:
    saved = write(tmp_path, state(), 3, 4, "fp32")
    with pytest.raises(UserError, match="holds nothing of other, which this run trains"):
        saved.keys("other")
    with pytest.raises(
        UserError, match=r"only 0 of 35 elements of max_exp_avg_sq of matrix.*4 ran"
    ):
        saved.read("max_exp_avg_sq", "matrix")
    path = tmp_path / "zero_pp_rank_2_mp_rank_00_optim_states.pt"
    content = torch.load(path)
    content["optimizer_state_dict"]["fp32_flat_groups"][0] = torch.zeros(12)
    torch.save(content, path)
    again = SavedState(tmp_path, dataclasses.replace(saved._saved))
    with pytest.raises(UserError, match="holds only 24 of 33 elements of master of long"):
        again.read(MASTER, "long")
    torch.save({"optimizer_state_dict": {}}, path)
    with pytest.raises(UserError, match="does not hold what DeepSpeed saves at ZeRO stage 3"):
        SavedState(tmp_path, saved._saved).read(MASTER, "matrix")
    path.unlink()
    with pytest.raises(UserError, match="0 shards of rank 2 instead of 1"):
        again = SavedState(tmp_path, saved._saved)
        again.read(MASTER, "matrix")


def test_loss_scales_have_one_form(tmp_path: Path) -> None:
    assert write(tmp_path, state(), 0, 1, "fp16").loss_scale == {"cur_scale": 512.0}
    assert write(tmp_path, state(), 0, 1, "bf16").loss_scale == {}
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig

    saved = write(tmp_path, state(), 2, 1, "fp16")
    path = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = torch.load(path)
    scaler = DynamicLossScaler(2**9, 100, 1, 2, False)
    content["optimizer_state_dict"]["loss_scaler"] = scaler
    scaler.cur_iter, scaler.last_overflow_iter, scaler.cur_hysteresis = 90, 41, 1
    torch.save(content, path)
    saved = SavedState(tmp_path, saved._saved)
    numbers = {"cur_scale": 512, "cur_iter": 90, "last_overflow_iter": 41, "cur_hysteresis": 1}
    assert saved.loss_scale == numbers
    # Stage 0 keeps the same numbers, except hysteresis, in an object of another class.
    config = LossScaleConfig(torch.float16, True, 1.0, None)
    regroup.set_loss_scale(SimpleNamespace(loss_scale_config=config), saved)
    assert (config.cur_scale, config.cur_iter, config.last_overflow_iter) == (512, 90, 41)
    fresh = DynamicLossScaler(2**16, 100, 1, 2, False)
    regroup.set_loss_scale(SimpleNamespace(loss_scaler=fresh), saved)
    assert vars(fresh) == vars(scaler)


def memory(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(kind))


def test_a_rank_has_only_its_own_part_in_memory(tmp_path: Path) -> None:
    names, size, ranks = [list(group) for group in GROUPS], 1 << 20, 16
    values = {(k, n): torch.ones(size) for group in names for n in group for k in KEYS}
    saved = write_large(tmp_path, values, ranks)
    del values
    before = memory("VmRSS:")
    targets = [torch.empty(size // ranks) for _ in range(15)]
    for target, (key, name) in zip(
        targets, ((k, n) for g in names for n in g for k in KEYS), strict=True
    ):
        saved.copy_to(target, key, name, 3 * target.numel())
    own = 15 * 4 * size // ranks
    # The part itself and the pages of the files that it comes from; all of it is 16 times as much.
    assert memory("VmRSS:") - before < 4 * own
    assert saved.num_bytes == own


def write_large(folder: Path, values: State, ranks: int) -> SavedState:
    torch.save(
        {
            **dict.fromkeys(shards.COUNTERS, 0),
            "param_shapes": [
                {name: torch.Size((values[MASTER, name].numel(),)) for name in group}
                for group in GROUPS
            ],
        },
        folder / shards.MODEL_STATES_OF_STAGE_3,
    )
    orders = [list(group) for group in GROUPS]
    for rank in range(ranks):
        cut = {
            k: [torch.cat([values[k, n].chunk(ranks)[rank] for n in o]) for o in orders]
            for k in KEYS
        }
        states = {i: {k: cut[k][i] for k in KEYS[1:]} for i in range(len(orders))}
        content = {"fp32_flat_groups": cut[MASTER], "optimizer_state_dict": {"state": states}}
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": content}, folder / name)
    saved = dataclasses.replace(described(7), zero_stage=3, world_size=ranks)
    return SavedState(folder, saved)


# --------------------------------------------------------------------------- DeepSpeed's own shards

STEPS = 50
LINK = """
import json, sys
import test_regroup
getattr(test_regroup, sys.argv[1])(*json.loads(sys.argv[2]))
"""


def on_ranks(
    zygote: Zygote, number: int, function: Callable[..., None], values: list[Any], folder: Path
) -> None:
    """Call a function of this file on so many ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    variables = [{**common, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(number)]
    logs = [folder / f"{r}.err" for r in range(number)]
    arguments = [function.__name__, json.dumps(values)]
    statuses = zygote.run(LINK, arguments, variables, logs)
    assert statuses == [0] * number, "\n".join(log.read_text() for log in logs)


def train_all(configs: list[dict[str, Any]]) -> None:
    results = pretrain_runs(configs)
    assert results == [None] * len(configs), results


def pass_on(regrouped: list[dict[str, Any]], trained: dict[str, Any]) -> None:
    """Load each run's newest checkpoint and save it again at once; train the last one.

    What was loaded stays in was-0, was-1 and so on.
    """
    from clue_ds import dist
    from clue_ds.pretrain import saving, train

    for values in regrouped:
        run = train.build(run_config.validate(values, "test config"))
        checkpoints = Path(values["run_dir"], manifest.FOLDER)
        dist.barrier()
        if dist.rank() == 0:
            was = Path(values["run_dir"], f"was-{len(list(checkpoints.parent.glob('was-*')))}")
            (checkpoints / manifest.name(run.start_step)).rename(was)
        dist.barrier()
        with saving.Saver(run.engine, run.identity) as saver:
            saver.save(run.start_step)
        run.loader.close()
        run.writers.close()
    train_all([trained])


def gathered(directory: Path) -> tuple[State, dict[str, Any]]:
    """All of a checkpoint's masters and moments, and its other numbers."""
    saved = SavedState(directory / TAG, manifest.verify(directory))
    found = {(k, n): saved.read(k, n) for n in saved.sizes for k in (MASTER, *saved.keys(n))}
    return found, {**saved.counters, **{name: saved.scalars(name) for name in saved.sizes}}


class Chain:
    """Runs that were passed on from four ranks to two and back to four."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder, self.corpus = folder, corpus

    def config(self, name: str, deepspeed: str, **sections: Any) -> dict[str, Any]:
        _, precision, optimizer = name.split("-")
        train = {"precision": precision, "optimizer": optimizer}
        sections["train"] = {**train, **sections.get("train", {})}
        run_dir = self.folder / name
        return tiny_config(self.corpus, run_dir, deepspeed=deepspeed, **sections).model_dump()

    def long(self, deepspeed: str, **train: Any) -> dict[str, Any]:
        sections: dict[str, Any] = {"train": {"steps": STEPS, **train}}
        sections["model"] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        sections["checkpoint"] = {"every": 20}
        return self.config("long-fp32-adamw", deepspeed, **sections)

    def cut_after(self, step: int) -> None:
        for directory in manifest.published(self.folder / "long-fp32-adamw" / "checkpoints"):
            if manifest.step_of(directory) > step:
                shutil.rmtree(directory)


def round_robin(folder: Path) -> str:
    """Stage 2 with another order of parameters, which DeepSpeed would take for its own."""
    path = folder / "round_robin.json"
    path.write_text('{"zero_optimization": {"stage": 2, "round_robin_gradients": true}}')
    return str(path)


ADAMW, MUON, BF16 = "state-fp32-adamw", "state-fp32-muon", "state-bf16-adamw"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote, sample_text: str) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    chain = Chain(folder, make_corpus(folder, sample_text))
    short = {"checkpoint": {"every": 6}}
    first = [chain.config(name, "zero1", **short) for name in (ADAMW, MUON, BF16)]
    on_ranks(zygote, 4, train_all, [[*first, chain.long("zero1")]], folder)
    shutil.copy(folder / "long-fp32-adamw/log.jsonl", folder / "undisturbed.jsonl")
    chain.cut_after(20)
    second = [
        *(chain.config(ADAMW, s) for s in (ZERO3, round_robin(folder), "zero1_offload", "zero2")),
        *(chain.config(MUON, stage) for stage in (ZERO3, "zero1_offload")),
        *(chain.config(BF16, stage) for stage in (ZERO3, "zero0")),
    ]
    on_ranks(zygote, 2, pass_on, [second, chain.long(ZERO3, micro_batch_size=4)], folder)
    chain.cut_after(40)
    third = [
        chain.config(ADAMW, "zero3"),
        *(chain.config(MUON, stage) for stage in ("zero0", "zero1")),
        chain.config(BF16, "zero1"),
    ]
    on_ranks(zygote, 4, pass_on, [third, chain.long("zero3")], folder)
    return chain


@pytest.mark.parametrize("name", [ADAMW, MUON, BF16])
def test_state_is_the_same_bits_after_four_two_and_four_ranks(chain: Chain, name: str) -> None:
    run = chain.folder / name
    want, other = gathered(run / "was-0")
    kinds = {"exp_avg", "exp_avg_sq", MASTER} | ({"momentum_buffer"} if name == MUON else set())
    assert {key for key, _ in want} == kinds
    links = sorted(run.glob("was-*"), key=lambda path: int(path.name[4:]))[1:]
    for directory in [*links, run / "checkpoints" / manifest.name(6)]:
        got, got_other = gathered(directory)
        assert set(got) == set(want) and got_other == other
        for place, values in got.items():
            assert torch.equal(values, want[place]), (directory, place)


def test_losses_are_those_of_an_undisturbed_run(chain: Chain) -> None:
    shutil.copy(chain.folder / "undisturbed.jsonl", chain.folder / "log.jsonl")
    want = read_log(chain.folder)
    got = read_log(chain.folder / "long-fp32-adamw")
    assert [line["step"] for line in got] == list(range(1, STEPS + 1))
    assert want[-1]["loss"] < want[0]["loss"] - 0.4, "it must have learned, or moments count little"
    for line, undisturbed in zip(got, want, strict=True):
        assert line["samples"] == undisturbed["samples"]
        assert line["loss"] == pytest.approx(undisturbed["loss"], abs=1e-4)
