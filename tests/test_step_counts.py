"""What a training step asks of a GPU, counted on tensors without memory: gates for every change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from clue_ds import presets
from clue_ds.benchmarks import counts
from clue_ds.benchmarks.sides import peer_network
from clue_ds.kernels import functional
from clue_ds.model import BertForPreTraining
from clue_ds.model.bert import pad_vocab
from clue_ds.pretrain import optim

META = torch.device("meta")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "step_counts.json"
ROWS, LENGTH, NUM_PREDICTIONS = 1_024, 128, 20


def ids(positions: int) -> Tensor:
    return torch.empty(ROWS, positions, dtype=torch.long, device=META)


@pytest.fixture(scope="module")
def steps() -> dict[str, tuple[counts.Recorder, counts.Recorder]]:
    """An eager bf16 step of tiny on 131,072 tokens, forward and backward; ours and the peer's."""
    config = presets.get("roberta_tiny_clue")
    with META:
        ours = BertForPreTraining(config, padded_vocab_size=pad_vocab(config).vocab_size)
        ours.to(torch.bfloat16).train()
        optim.freeze_unused(ours)
        peer = peer_network(config).to(torch.bfloat16).train()
        inputs = {"masked_positions": ids(NUM_PREDICTIONS), "masked_labels": ids(NUM_PREDICTIONS)}
        return {
            "ours": counts.count_eager(lambda: ours(ids(LENGTH), **inputs).loss),
            "peer": counts.count_eager(lambda: peer(ids(LENGTH), labels=ids(LENGTH)).loss),
        }


def total(step: tuple[counts.Recorder, counts.Recorder]) -> dict[str, float]:
    return counts.totals([launch for recorder in step for launch in recorder.launches])


def test_the_host_never_waits_for_the_device_in_a_step(steps: Any) -> None:
    assert [recorder.waits for recorder in steps["ours"]] == [[], []]


def test_a_step_launches_moves_and_computes_less_than_the_peers(steps: Any) -> None:
    ours, peer = total(steps["ours"]), total(steps["peer"])
    assert ours["launches"] <= 240 and ours["launches"] <= peer["launches"]
    assert ours["gb"] <= 0.68 * peer["gb"]
    flops = [figures["gemm_tflop"] + figures["attention_tflop"] for figures in (ours, peer)]
    assert flops[0] <= 0.61 * flops[1]


def test_counts_of_a_product_and_of_attention() -> None:
    """Against arithmetic: [6, 8] @ [8, 4], and heads of 26 that are padded to 32."""
    with META:
        a = torch.empty(6, 8, dtype=torch.bfloat16, requires_grad=True)
        b = torch.empty(8, 4, dtype=torch.bfloat16, requires_grad=True)
        forward, backward = counts.count_eager(lambda: (a @ b).sum())
        assert [(x.name, x.flops) for x in forward.launches] == [("mm", 2 * 6 * 8 * 4), ("sum", 0)]
        assert forward.launches[0].num_bytes == 2 * (6 * 8 + 8 * 4 + 6 * 4)
        assert sum(x.flops for x in backward.launches) == 2 * 2 * 6 * 8 * 4
        q = torch.empty(2, 3, 16, 26, dtype=torch.bfloat16, requires_grad=True)
        forward, _ = counts.count_eager(
            lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.1).sum()
        )
    (attention,) = (x for x in forward.launches if x.kind == "attention")
    assert attention.flops == 2 * 2 * (2 * 3 * 16 * 16 * 32)


def test_an_operation_of_ours_counts_with_every_kernel_it_launches(
    kernel_device: torch.device,
) -> None:
    """Against arithmetic: 40 tokens in 3 sequences, 2 heads of 6, bf16; LayerNorm of 40 x 12."""
    with FakeTensorMode(), kernel_device:
        qkv = torch.empty(40, 3, 2, 6, dtype=torch.bfloat16)
        out, offsets = torch.empty(40, 2, 6, dtype=torch.bfloat16), torch.empty(4, dtype=torch.int)
        lse, seed = torch.empty(2, 40), torch.empty(1, dtype=torch.long)
        saved = (out, qkv, offsets, seed, out, lse, 20, 0.1)
        of_attention = counts.count_operation(lambda: functional.fused_attention.backward(*saved))
        x, weight, statistics = out.flatten(1), torch.empty(12), torch.empty(2, 40)
        saved = (x, x, weight, weight, statistics)
        of_norm = counts.count_operation(lambda: functional.fused_norm.backward(*saved))
    one = 2 * out.numel()
    small = 2 * 4 * 4 + 8 + 2 * 4 * lse.numel()  # offsets of queries and of keys, seed, lse, delta
    assert [(launch.name, launch.num_bytes) for launch in of_attention] == [
        ("dq_kernel", 6 * one + small),  # reads q, k, v, out and its gradient, writes dq
        ("dkv_kernel", 6 * one + small),  # reads q, k, v and out's gradient, writes dk and dv
    ]
    assert [launch.name for launch in of_norm] == ["backward_kernel", "sum"]


@pytest.fixture(scope="module")
def shapes() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text("utf-8"))["shapes"]


def test_the_compiled_step_moves_less_than_the_peers_by_the_committed_counts(shapes: Any) -> None:
    for shape in shapes:
        where = f"{shape['preset']}, length {shape['length']}"
        ours = ("compiled", "compiled, kernels", "packed, kernels")
        forms = ("peer, eager", "peer, compiled", *ours)  # from most to least
        step = {name: shape[name]["step"] for name in (*forms, "eager")}
        sizes = [step[name]["gb"] for name in forms]
        assert sizes == sorted(sizes, reverse=True), where
        launches = [step[name]["launches"] for name in ours]
        assert launches == sorted(launches, reverse=True), where
        assert step["compiled"]["gb"] < step["eager"]["gb"], where
        assert step["compiled"]["launches"] < step["eager"]["launches"], where
        if shape["preset"] == "roberta_tiny_clue":
            assert shape["bytes_of_peer"] <= 0.62, where


def test_the_packed_block_keeps_its_limits_by_the_committed_counts(shapes: Any) -> None:
    (tiny,) = (x for x in shapes if (x["preset"], x["length"]) == ("roberta_tiny_clue", 128))
    assert tiny["rows"] * tiny["length"] == 131_072
    block = tiny["packed, kernels"]["parts"]["block"]
    assert block["gb"] <= 9.0
    # 31 calls, of which four launch two kernels.
    assert block["calls"] <= 31 and block["launches"] <= 35
