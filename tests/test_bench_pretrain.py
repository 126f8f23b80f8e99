"""The benchmark gives both sides the same task, and refuses to time sides with other losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clue_ds import presets
from clue_ds.benchmarks import pretrain as bench
from clue_ds.cli import main
from clue_ds.data.sampling import IGNORED_LABEL

CONFIG = presets.get("roberta_tiny_clue").replace(num_hidden_layers=1)
SETTING = bench.Setting(CONFIG, torch.device("cpu"), "fp32", compile=False)


def test_the_peers_labels_are_ours_at_their_positions() -> None:
    rows = bench.random_rows(CONFIG, 3, 32, seed=1)
    rows["masked_labels"][1, 2:] = IGNORED_LABEL
    rows["masked_positions"][1, 2:] = 0
    both = bench.for_both(rows, torch.device("cpu"))
    for row in range(3):
        used = rows["masked_labels"][row] != IGNORED_LABEL
        positions = rows["masked_positions"][row][used]
        assert torch.equal(both["labels"][row][positions], rows["masked_labels"][row][used])
        assert int((both["labels"][row] != IGNORED_LABEL).sum()) == int(used.sum())
    assert both["attention_mask"].all()


def test_both_sides_compute_the_same_loss_and_a_wrong_one_is_caught() -> None:
    rows = bench.random_rows(CONFIG, 4, 32, seed=1)
    rows["lengths"][1] = 20
    outside = rows["masked_positions"] >= rows["lengths"][:, None]
    rows["masked_labels"][outside] = IGNORED_LABEL
    rows["masked_positions"][outside] = 0
    batch = bench.for_both(rows, torch.device("cpu"))
    ours = bench.make_ours(SETTING, seed=1)
    peer = bench.make_peer(SETTING, ours.network)
    mine, theirs = bench.check_same_loss(ours, peer, batch, SETTING)
    assert mine == pytest.approx(theirs, rel=1e-5)
    with torch.no_grad():
        peer.network.bert.encoder.layer[0].output.dense.bias.add_(0.5)
        peer.network.cls.predictions.transform.dense.bias[0].add_(1.0)
    with pytest.raises(RuntimeError, match="different losses"):
        bench.check_same_loss(ours, peer, batch, SETTING)


def test_the_compiled_peer_gives_attention_no_mask_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers 5.17 builds one in compiled code."""
    masks = []

    def attention(query: torch.Tensor, *others: Any, attn_mask: Any = None, **more: Any) -> Any:
        masks.append(attn_mask)
        return query

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    rows = bench.for_both(bench.random_rows(CONFIG, 2, 16, seed=1), torch.device("cpu"))
    ours = bench.make_ours(SETTING, seed=1)
    peer = bench.without_mask(bench.make_peer(SETTING, ours.network))
    peer.network.compile(backend="eager", dynamic=False)
    peer.loss(rows)
    assert masks == [None]


def test_a_batch_with_short_rows_keeps_the_peers_mask(tmp_path: Path) -> None:
    rows = bench.random_rows(CONFIG, 4, 32, seed=1)
    rows["lengths"][1] = 20
    rows["masked_labels"][rows["masked_positions"] >= rows["lengths"][:, None]] = IGNORED_LABEL
    both = bench.for_both(rows, torch.device("cpu"))
    result = bench.compare(SETTING, both, 2, steps=1, seed=1)
    assert result["peer"]["name"] == "transformers BertForMaskedLM"
    assert result["peer_with_mask"] is None and result["ratio_to_peer_with_mask"] is None


def test_verb_writes_figures_with_their_environment(tmp_path: Path) -> None:
    output = tmp_path / "results" / "pretrain.json"
    argv = ["bench", "pretrain", "--seq-length", "16", "--micro-batch-size", "2", "--steps", "3"]
    threads = torch.get_num_threads()
    assert main([*argv, "--output", str(output)]) == 0
    torch.set_num_threads(threads)
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["environment"]["versions"]["torch"]
    assert result["setting"]["preset"] == "roberta_tiny_clue"
    # Every row is full, so the peer runs without a mask, and beside that with one.
    assert result["peer"]["name"].endswith("no mask")
    assert result["peer_with_mask"]["name"].endswith("mask of ones")
    assert result["ours"]["mfu"] is None and 0 < result["ours"]["share_of_gemm_rate"]
    # We leave out work at positions that are not predicted; the peer does it all.
    per_step = {
        side: result[side]["executed_flops_per_second"]
        * result[side]["milliseconds_per_step"]["median"]
        for side in ("ours", "peer", "peer_with_mask")
    }
    assert per_step["ours"] < 0.75 * per_step["peer"]
    assert per_step["peer"] == pytest.approx(per_step["peer_with_mask"])
    for side in ("ours", "peer"):
        rate, time = result[side]["tokens_per_second"], result[side]["milliseconds_per_step"]
        assert rate["p20"] <= rate["median"] <= rate["p80"]
        assert rate["median"] * time["median"] == pytest.approx(2 * 16 * 1000, rel=1e-6)
    assert str(tmp_path) not in output.read_text(encoding="utf-8")
