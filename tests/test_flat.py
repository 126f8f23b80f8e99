"""Batches without padding: the same rows, losses and gradients as the padded ones.

Tolerance: 1e-5 in fp32 (attention sums its keys in another order, and so do GEMMs of another size).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import make_corpus, pretrain_runs, read_log, run_ranks, tiny_config
from torch import Tensor

from clue_ds import dist
from clue_ds.data import Corpus, SampleStream
from clue_ds.data.flat import SHAPES, FlatStream, split
from clue_ds.data.sampling import IGNORED_LABEL
from clue_ds.model import BertForPreTraining, encoder, packed_attention
from clue_ds.presets import ModelConfig
from clue_ds.pretrain import batches, phases

KINDS = ("windows", "sentences", "documents", "packed", "nsp", "sop")
SEQ_LENGTH, NUM_ROWS = 48, 8
TOLERANCE = 1e-5
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Corpus:
    """Documents of 20 to 200 tokens, and the same as held-out text."""
    directory = make_corpus(tmp_path_factory.mktemp("flat"), sample_text)
    shutil.copytree(directory, directory.parent / "held_out")
    shutil.move(directory.parent / "held_out", directory / "held_out")
    return Corpus(directory)


@pytest.fixture(scope="module")
def model(corpus: Corpus) -> BertForPreTraining:
    """Heads of 4, an odd number of them, and large random weights and biases."""
    config = ModelConfig(
        vocab_size=corpus.vocab_size,
        hidden_size=52,
        num_hidden_layers=2,
        num_attention_heads=13,
        intermediate_size=72,
        max_position_embeddings=SEQ_LENGTH,
    ).replace(**NO_DROPOUT)
    torch.manual_seed(1)
    model = BertForPreTraining(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def flat_stream(corpus: Corpus, kind: str, size: int = 4, is_static: bool = False) -> FlatStream:
    options: dict[str, Any] = {"micro_batch_size": size, "is_static": is_static, "samples": kind}
    return FlatStream(corpus, SEQ_LENGTH, NUM_ROWS, 7, **options)


def padded_parts(corpus: Corpus, kind: str, step: int, size: int = 4) -> list[dict[str, Tensor]]:
    batch = SampleStream(corpus, SEQ_LENGTH, NUM_ROWS, 7, samples=kind).batch(step)
    return [{n: t[i : i + size] for n, t in batch.items()} for i in range(0, NUM_ROWS, size)]


def results(
    model: BertForPreTraining, micro_batches: list[dict[str, Tensor]]
) -> list[dict[str, Any]]:
    """Loss, counts, sums and gradients of each micro-batch."""
    found = []
    for inputs in micro_batches:
        model.zero_grad()
        output = model(**inputs)
        output.loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        figures = {n: t.detach() for n, t in output._asdict().items() if t is not None}
        found.append({**figures, **grads})
    return found


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            relative = 1e-5 if value.dim() == 0 else 0.0
            torch.testing.assert_close(
                ours[name], value, atol=TOLERANCE, rtol=relative, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("is_static", [False, True], ids=["exact", "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_padded_rows(
    corpus: Corpus, model: BertForPreTraining, kind: str, is_static: bool
) -> None:
    batch = flat_stream(corpus, kind, is_static=is_static).batch(3)
    expected = results(model, padded_parts(corpus, kind, 3))
    assert_same(results(model, split(batch)), expected)


def test_the_dense_back_end_and_parts_of_heads_compute_the_same(
    corpus: Corpus, model: BertForPreTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("packed", "sop"):
        expected = results(model, padded_parts(corpus, kind, 1))
        flat = split(flat_stream(corpus, kind, is_static=True).batch(1))
        with monkeypatch.context() as patch:
            # A limit below the scores of two heads, so heads are computed a few at a time.
            patch.setattr(packed_attention, "CACHED_SCORES", 3_000)
            assert_same(results(model, flat), expected)
        with monkeypatch.context() as patch:
            patch.setattr(packed_attention, "choose", lambda *_: "dense")
            assert_same(results(model, flat), expected)


def test_dropout_of_the_loop_leaves_its_gradient_right() -> None:
    """Against finite differences in fp64; equal seeds draw equal masks."""
    offsets = torch.tensor([0, 3, 6, 6, 10], dtype=torch.int32)
    queries = torch.tensor([0, 2, 3, 3, 3], dtype=torch.int32)
    layout = packed_attention.Layout(offsets, queries, 4, 2, "sdpa")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(10, 3, 2, 4, dtype=torch.float64, generator=generator)
    query = torch.randn(3, 2, 4, dtype=torch.float64, generator=generator)

    def attend(tokens: Tensor, query: Tensor | None = None) -> Tensor:
        torch.manual_seed(5)
        return packed_attention.packed_attention(tokens, layout, 0.3, True, query)

    dropped = attend(tokens)
    assert not torch.allclose(
        dropped, packed_attention.packed_attention(tokens, layout, 0.3, False)
    )
    assert torch.autograd.gradcheck(attend, (tokens.requires_grad_(),), fast_mode=True)
    kv = tokens.detach()[:, 1:].requires_grad_()
    assert torch.autograd.gradcheck(attend, (kv, query.requires_grad_()), fast_mode=True)


def test_flash_attention_is_registered_with_its_gradient(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, in the form in which FlashAttention takes it: every weight that rows
    without padding reach gets a gradient. The numbers need a GPU (tests/gpu)."""
    config = ModelConfig(
        vocab_size=corpus.vocab_size,
        hidden_size=12,  # heads of 6, which are padded to 8
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
    )
    with torch.device("meta"):
        model = BertForPreTraining(config).bfloat16()
    assert packed_attention.choose(torch.empty(3, 2, 8), "sdpa") == "rows"
    half = torch.empty(3, 2, 8, device="meta", dtype=torch.bfloat16)
    assert packed_attention.choose(half, "sdpa") == "flash"
    assert packed_attention.choose(half.float(), "sdpa") == "dense"
    batch = split(flat_stream(corpus, "documents").batch(0))[0]
    inputs = {n: t if n == "bounds" else t.to("meta") for n, t in batch.items()}
    model(**inputs).loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert all("pooler" in n or "seq_relationship" in n for n in missing)


def test_padding_is_a_sequence_of_its_own_on_a_gpu(
    corpus: Corpus, model: BertForPreTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of any length without a mask, as a GPU computes them, and with one, as a CPU does."""
    parts = padded_parts(corpus, "documents", 2)
    assert any(bool((part["lengths"] < SEQ_LENGTH).any()) for part in parts)
    expected = results(model, parts)
    tagged = [model.bert(p["input_ids"], lengths=p["lengths"]).detach() for p in parts]
    monkeypatch.setattr(encoder, "choose", lambda *_: "triton")
    monkeypatch.setattr(encoder, "key_mask", lambda *_: pytest.fail("a mask was made"))
    assert_same(results(model, parts), expected)
    for part, states in zip(parts, tagged, strict=True):
        real = torch.arange(SEQ_LENGTH) < part["lengths"][:, None]
        found = model.bert(part["input_ids"], lengths=part["lengths"]).detach()
        torch.testing.assert_close(found[real], states[real], atol=TOLERANCE, rtol=0.0)


@pytest.mark.parametrize("has_queries", [False, True], ids=["all", "queries"])
def test_the_kernel_and_the_loop_compute_what_the_dense_back_end_does(
    kernel_device: torch.device, has_queries: bool
) -> None:
    """With spare sequences, one without queries and one of a single token; heads of 26."""
    lengths, counts = [5, 1, 17, 3, 9, 0, 0], [3, 1, 4, 0, 2, 0, 0]

    def offsets(numbers: list[int]) -> Tensor:
        ends = torch.tensor([0, *numbers]).cumsum(0)
        return ends.to(kernel_device, torch.int32)

    layout = packed_attention.Layout(offsets(lengths), offsets(counts), 17, 4, "sdpa")
    torch.manual_seed(0)
    tokens = torch.randn(sum(lengths), 2 if has_queries else 3, 2, 26, device=kernel_device)
    query = torch.randn(sum(counts), 2, 26, device=kernel_device) if has_queries else None
    found: dict[str, list[Tensor]] = {}
    backends: list[packed_attention.Backend] = ["dense", "triton"]
    backends += ["rows"] if kernel_device.type == "cpu" else []
    for backend in backends:
        leaves = [t.clone().requires_grad_() for t in (tokens, query) if t is not None]
        out = packed_attention.packed_attention(
            leaves[0], layout, 0.0, True, *leaves[1:], backend=backend
        )
        found[backend] = [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]
    for backend in backends[1:]:
        torch.testing.assert_close(found[backend], found["dense"], atol=TOLERANCE, rtol=0.0)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    step=st.integers(0, 10_000),
    size=st.sampled_from([1, 2, 4, 8]),
    is_static=st.booleans(),
)
def test_every_slot_lies_in_a_sequence_and_real_ones_hold_the_rows(
    corpus: Corpus, kind: str, step: int, size: int, is_static: bool
) -> None:
    stream = flat_stream(corpus, kind, size, is_static)
    batch = stream.batch(step)
    assert int(batch["bounds"][2]) == size * stream.num_predictions
    lengths: list[int] = []
    for flat, rows in zip(split(batch), padded_parts(corpus, kind, step, size), strict=True):
        offsets, queries = flat["cu_seqlens"].numpy(), flat["cu_predictions"].numpy()
        longest, most, _ = flat["bounds"].tolist()
        for ends, total, limit in (
            (offsets, len(flat["input_ids"]), longest),
            (queries, len(flat["masked_labels"]), most),
        ):
            assert ends[0] == 0 and ends[-1] == total
            assert 0 <= np.diff(ends).min() and np.diff(ends).max() <= limit
        # A query lies in the sequence that it is counted for.
        owner = np.searchsorted(queries, np.arange(len(flat["masked_labels"])), side="right") - 1
        at = flat["masked_positions"].numpy()
        assert (offsets[owner] <= at).all() and (at < offsets[owner + 1]).all()
        begins = offsets[np.searchsorted(offsets, np.arange(offsets[-1]), side="right") - 1]
        assert np.array_equal(flat["position_ids"].numpy(), np.arange(offsets[-1]) - begins)
        # The rows follow each other; behind them is only padding that predicts nothing.
        num_real = int(rows["lengths"].sum())
        real = torch.arange(SEQ_LENGTH) < rows["lengths"][:, None]
        for name in ("input_ids", "token_type_ids"):
            if name in flat:
                assert torch.equal(flat[name][:num_real].long(), rows[name][real])
        assert not flat["input_ids"][num_real:].any()
        first = torch.cumsum(rows["lengths"], 0) - rows["lengths"]
        used, flat_used = (part["masked_labels"] != IGNORED_LABEL for part in (rows, flat))
        expected = (rows["masked_positions"] + first[:, None])[used]
        assert torch.equal(flat["masked_positions"][flat_used].long(), expected)
        assert torch.equal(flat["masked_labels"][flat_used], rows["masked_labels"][used])
        sequences = rows["cu_seqlens"].diff() if kind == "packed" else rows["lengths"]
        lengths += sequences[sequences > 0].tolist()
    assert batch["lengths"].tolist() == lengths


def test_the_number_of_tokens_decides_all_shapes_of_200_static_batches(corpus: Corpus) -> None:
    """Windows have one shape. Of packed rows the number of sequences varies too."""
    for kind in ("windows", "documents", "sop", "packed"):
        stream = flat_stream(corpus, kind, NUM_ROWS, is_static=True)
        shapes: dict[int, set[tuple[tuple[str, int], ...]]] = {}
        for step in range(200):
            batch = stream.batch(step)
            named = tuple((n, len(t)) for n, t in batch.items() if n not in ("lengths", "sizes"))
            shapes.setdefault(len(batch["input_ids"]), set()).add(named)
        assert max(shapes) <= NUM_ROWS * SEQ_LENGTH
        assert len(shapes) <= (1 if kind == "windows" else SHAPES), kind
        for number in shapes.values():
            assert len(number) <= (SEQ_LENGTH // 8 if kind == "packed" else 1), kind


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Path:
    """Two ranks with two micro-batches each. Dropout is on in `whole` and `halves`, which is the
    same run in two parts; the first part of `switched` keeps its padding."""
    folder = tmp_path_factory.mktemp("runs")
    sharded = str(Path(__file__).with_name("zero3_sharded.json"))

    def config(name: str, padding: str, **sections: Any) -> dict[str, Any]:
        data = {"seq_length": 32, "samples": "documents", "padding": padding}
        where = str(corpus.directory)
        more = {"evaluate": {"every": 3, "batches": 2}, **sections}
        return tiny_config(where, folder / name, data=data, **more).model_dump()

    wsd = {"schedule": "wsd"}
    half = {**wsd, "steps": 3}
    configs = [
        config("keep", "keep", model=NO_DROPOUT),
        config("zero1", "auto", model=NO_DROPOUT),
        config("zero3", "remove", model=NO_DROPOUT, deepspeed=sharded),
        config("whole", "remove", train=wsd),
        config("halves", "remove", train=half),
        config("halves", "remove", train=wsd),
        config("switched", "keep", train=half, model=NO_DROPOUT),
        config("switched", "remove", train=wsd, model=NO_DROPOUT),
        config("unswitched", "keep", train=wsd, model=NO_DROPOUT),
    ]
    assert run_ranks(2, pretrain_runs, configs) == [[None] * len(configs)] * 2
    return folder


@pytest.mark.parametrize(
    ("name", "other"), [("keep", "zero1"), ("keep", "zero3"), ("unswitched", "switched")]
)
def test_runs_on_two_ranks_learn_and_evaluate_as_with_padding(
    runs: Path, name: str, other: str
) -> None:
    lines, others = read_log(runs / name), read_log(runs / other)
    assert len(lines) == len(others) == 6
    for one, two in zip(lines, others, strict=True):
        for key in ("loss", "grad_norm", "held_out_loss"):
            if key in one:
                assert two[key] == pytest.approx(one[key], rel=2e-5), (key, one["step"])


def test_in_bf16_micro_batches_have_few_shapes_on_a_cpu_too(corpus: Corpus, tmp_path: Path) -> None:
    shapes = {}
    for precision in ("fp32", "bf16"):
        data = {"samples": "documents", "seq_length": SEQ_LENGTH}
        train = {"precision": precision, "global_batch_size": 4, "micro_batch_size": 4}
        config = tiny_config(corpus.directory, tmp_path, data=data, train=train)
        stream = batches.make_stream(config, corpus)
        shapes[precision] = {tuple(stream.batch(step)["sizes"][0].tolist()) for step in range(40)}
    assert len({tokens for tokens, _, _ in shapes["bf16"]}) <= SHAPES
    if dist.device().type == "cpu":
        assert len(shapes["bf16"]) < len(shapes["fp32"])


def test_shapes_follow_the_precision_that_auto_turns_out_to_be(
    corpus: Corpus, tmp_path: Path
) -> None:
    data = {"samples": "documents", "seq_length": SEQ_LENGTH}
    given = tiny_config(corpus.directory, tmp_path, data=data, train={"precision": "auto"})
    stream = batches.make_stream(given, corpus)
    assert isinstance(stream, FlatStream)
    for precision in ("bf16", "fp32"):
        train = given.train.model_copy(update={"precision": precision})
        known = given.model_copy(update={"train": train})
        (part,) = phases.parts(known.model_dump())
        phases.with_settings([phases.RunPhase(part, 1, given, stream, None)], known)
        assert stream.is_static == batches.is_static(known)
        assert stream.is_static == (precision == "bf16" or dist.device().type != "cpu")


def test_a_run_without_padding_resumes_bit_for_bit(runs: Path) -> None:
    whole, halves = ([line["loss"] for line in read_log(runs / n)] for n in ("whole", "halves"))
    assert whole == halves


def test_the_benchmark_compares_equal_losses_in_real_tokens(corpus: Corpus, tmp_path: Path) -> None:
    from clue_ds.benchmarks.padding import padding

    output = tmp_path / "padding.json"
    padding(corpus.directory, seq_length=32, micro_batch_size=2, steps=2, output=output)
    result = json.loads(output.read_text(encoding="utf-8"))
    assert 0 < result["real_tokens"] < 1
    losses = result["loss_with_dropout_off"]
    assert losses["flat"] == pytest.approx(losses["padded"], rel=1e-5)
