"""The encoder against transformers' with the same weights, and against itself on fewer positions.

Tolerances: fp32 logits 1e-5 absolute (another order of summation in GEMMs of up to 1,248 terms);
gradients 2e-6 + 1e-4 relative (sums over the batch of values that are mostly below 1e-2).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig
from transformers import BertForPreTraining as Peer

from clue_ds.data.sampling import IGNORED_LABEL
from clue_ds.errors import UserError
from clue_ds.model import BertForPreTraining
from clue_ds.model.bert import pad_vocab
from clue_ds.model.encoder import key_mask, without_full_lengths
from clue_ds.model.weights import trim_vocab
from clue_ds.presets import ModelConfig

# 13 heads of 4: neither is a power of two or a multiple of 8, like the 26 of the tiny models.
SMALL = ModelConfig(
    vocab_size=203,
    hidden_size=52,
    num_hidden_layers=3,
    num_attention_heads=13,
    intermediate_size=72,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    max_position_embeddings=24,
)
LENGTHS = {"full": [17, 17, 17], "padded": [17, 1, 9]}


def peer_config(config: ModelConfig, **changes: Any) -> BertConfig:
    values = {name: getattr(config, name) for name in ModelConfig.__dataclass_fields__}
    return BertConfig(**values, attn_implementation="eager", **changes)


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Random biases and LayerNorms too, so that swapped parameters are noticed."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        parameter.normal_(0.0, 0.2, generator=generator)
        if name.endswith("LayerNorm.weight"):
            parameter.add_(1.0)


def both(config: ModelConfig, attention: str = "sdpa") -> tuple[BertForPreTraining, Peer]:
    ours = BertForPreTraining(config, attention=attention)
    randomize(ours)
    peer = Peer(peer_config(config))
    peer.load_state_dict(ours.state_dict())
    return ours, peer


def batch(lengths: list[int], num_predictions: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    num_rows, seq_length = len(lengths), max(lengths)
    ids = torch.randint(1, SMALL.vocab_size, (num_rows, seq_length), generator=generator)
    positions = torch.stack(
        [torch.arange(num_predictions) % length for length in lengths]
    )  # a length below P repeats positions, as unused slots do
    labels = ids.gather(1, positions)
    labels[:, -1] = IGNORED_LABEL
    return {
        "input_ids": ids,
        "token_type_ids": torch.randint(0, 2, ids.shape, generator=generator),
        "lengths": torch.tensor(lengths),
        "masked_positions": positions,
        "masked_labels": labels,
    }


def attention_mask(data: dict[str, torch.Tensor]) -> torch.Tensor:
    return (torch.arange(data["input_ids"].shape[1]) < data["lengths"][:, None]).long()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_state_dict_has_the_keys_and_ties_of_transformers() -> None:
    ours, peer = both(SMALL)
    assert list(ours.state_dict()) == list(peer.state_dict())
    state = ours.state_dict()
    words = state["bert.embeddings.word_embeddings.weight"]
    assert state["cls.predictions.decoder.weight"].data_ptr() == words.data_ptr()
    bias = state["cls.predictions.bias"]
    assert state["cls.predictions.decoder.bias"].data_ptr() == bias.data_ptr()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new"])
@pytest.mark.parametrize("attention", ["sdpa", "masked_softmax"])
def test_logits_and_every_gradient_equal_transformers(
    attention: str, hidden_act: str, lengths: list[int]
) -> None:
    ours, peer = both(SMALL.replace(hidden_act=hidden_act), attention)
    data = batch(lengths)
    mask = attention_mask(data)
    inputs = {name: data[name] for name in ("input_ids", "token_type_ids")}
    out = ours(**inputs, lengths=data["lengths"])
    expected = peer(**inputs, attention_mask=mask)
    real = mask.bool()
    torch.testing.assert_close(
        out.prediction_logits[real], expected.prediction_logits[real], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        out.seq_relationship_logits, expected.seq_relationship_logits, atol=1e-5, rtol=1e-5
    )
    for result in (out, expected):
        mlm = F.cross_entropy(result.prediction_logits[real], data["input_ids"][real])
        nsp = F.cross_entropy(result.seq_relationship_logits, torch.tensor([0, 1, 0]))
        (mlm + nsp).backward()
    assert gradients(ours).keys() == gradients(peer).keys()
    for name, grad in gradients(peer).items():
        torch.testing.assert_close(gradients(ours)[name], grad, atol=2e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_loss_and_gradients_at_masked_positions_equal_those_of_all_positions(
    lengths: list[int],
) -> None:
    ours, peer = both(SMALL)
    data = batch(lengths)
    out = ours(**data)
    out.loss.backward()
    assert out.prediction_logits is None

    logits = peer(data["input_ids"], attention_mask(data), data["token_type_ids"]).prediction_logits
    index = data["masked_positions"][..., None].expand(-1, -1, SMALL.vocab_size)
    gathered = logits.gather(1, index).flatten(0, 1)
    labels = data["masked_labels"].flatten()
    loss = F.cross_entropy(gathered, labels, reduction="sum") / labels.numel()
    loss.backward()
    torch.testing.assert_close(out.loss, loss, atol=1e-6, rtol=1e-6)
    assert int(out.num_correct) == int((gathered.argmax(-1) == labels).sum())
    assert int(out.num_predicted) == int((labels != IGNORED_LABEL).sum())
    # Pooler and NSP head didn't run, here and there.
    assert gradients(ours).keys() == gradients(peer).keys()
    assert not any("pooler" in n or "seq_relationship" in n for n in gradients(ours))
    for name, grad in gradients(peer).items():
        torch.testing.assert_close(gradients(ours)[name], grad, atol=2e-6, rtol=1e-4, msg=name)


def test_logits_at_masked_positions_equal_the_full_heads() -> None:
    ours, _ = both(SMALL)
    data = batch(LENGTHS["padded"])
    data.pop("masked_labels")
    positions = data["masked_positions"]
    some = ours(**data)
    data.pop("masked_positions")
    full = ours(**data)
    index = positions[..., None].expand(-1, -1, SMALL.vocab_size)
    torch.testing.assert_close(
        some.prediction_logits, full.prediction_logits.gather(1, index), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        some.seq_relationship_logits, full.seq_relationship_logits, atol=1e-5, rtol=1e-5
    )


def test_loss_of_a_batch_is_the_mean_of_its_parts() -> None:
    """Accumulation and ranks therefore change nothing, however the labels are distributed."""
    ours, _ = both(SMALL)
    data = batch([17, 17])
    data["masked_labels"][0, :] = IGNORED_LABEL
    whole = ours(**data).loss
    parts = [ours(**{n: t[i : i + 1] for n, t in data.items()}).loss for i in range(2)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())


def test_padded_vocabulary_changes_neither_loss_nor_gradients() -> None:
    ours, _ = both(SMALL)
    num_rows = pad_vocab(SMALL).vocab_size
    assert num_rows == 256
    padded = BertForPreTraining(SMALL, padded_vocab_size=num_rows)
    randomize(padded)
    real = trim_vocab(padded.state_dict(), SMALL.vocab_size)
    ours.load_state_dict(real)
    # Large logits in the padding rows would win if they were looked at.
    with torch.no_grad():
        padded.cls.predictions.bias[SMALL.vocab_size :] = 100.0
    data = batch(LENGTHS["padded"])
    outputs = [model(**data) for model in (ours, padded)]
    for out in outputs:
        out.loss.backward()
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
    assert int(outputs[0].num_correct) == int(outputs[1].num_correct)
    trimmed = trim_vocab(gradients(padded), SMALL.vocab_size)
    for name, grad in gradients(ours).items():
        torch.testing.assert_close(trimmed[name], grad, atol=2e-6, rtol=1e-4, msg=name)
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        assert torch.count_nonzero(gradients(padded)[name][SMALL.vocab_size :]) == 0
    data.pop("masked_labels")
    assert padded(**data).prediction_logits.shape[-1] == SMALL.vocab_size


def test_full_rows_need_no_lengths_and_no_mask() -> None:
    full, ragged = batch([9, 9]), batch([9, 5])
    assert without_full_lengths(full) == {k: v for k, v in full.items() if k != "lengths"}
    assert without_full_lengths(ragged) is ragged
    assert key_mask(full["lengths"], None, 9) is None
    assert key_mask(None, None, 9) is None
    mask = key_mask(ragged["lengths"], None, 9)
    assert mask is not None and mask.squeeze().sum(1).tolist() == [9, 5]


def test_attention_mask_and_lengths_agree_and_padding_does_not_matter() -> None:
    ours, _ = both(SMALL)
    data = batch(LENGTHS["padded"])
    by_length = ours(data["input_ids"], lengths=data["lengths"]).prediction_logits
    mask = attention_mask(data)
    by_mask = ours(data["input_ids"], attention_mask=mask).prediction_logits
    assert torch.equal(by_length, by_mask)
    other = torch.where(mask.bool(), data["input_ids"], 5)
    changed = ours(other, lengths=data["lengths"]).prediction_logits
    assert torch.equal(by_length[mask.bool()], changed[mask.bool()])


@pytest.mark.parametrize("attention", ["sdpa", "masked_softmax"])
def test_dropout_acts_in_training_only_and_follows_torchs_generator(attention: str) -> None:
    config = SMALL.replace(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    ours, peer = both(config, attention)
    data = batch([17, 17, 17])
    peer.eval()
    inputs = (data["input_ids"], None, data["lengths"])
    expected = peer(data["input_ids"]).prediction_logits
    torch.testing.assert_close(
        ours.eval()(*inputs).prediction_logits, expected, atol=1e-5, rtol=1e-5
    )
    ours.train()
    state = torch.get_rng_state()
    first = ours(**data).loss
    second = ours(**data).loss
    torch.set_rng_state(state)
    assert not torch.equal(first, second)
    assert torch.equal(ours(**data).loss, first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_in_half_precision_is_close_and_finite(dtype: torch.dtype) -> None:
    """The loss is fp32; it differs by the rounding of weights and activations (8 and 11 bits)."""
    ours, _ = both(SMALL)
    data = batch(LENGTHS["padded"])
    expected = ours(**data).loss
    half = ours.to(dtype)(**data).loss
    assert half.dtype == torch.float32
    relative = {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(half, expected, rtol=relative, atol=0.0)


def outputs_and_gradients(
    model: BertForPreTraining, data: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    model.zero_grad()
    output = model(**data)
    output.loss.backward()
    figures = [value for value in output if value is not None]
    return figures + [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_parts_give_the_same_numbers_and_gradients(backend: str) -> None:
    """Embeddings, blocks, head and loss; in training and in evaluation, with pairs and without."""
    torch.compiler.reset()
    ours, _ = both(SMALL.replace(num_hidden_layers=1 if backend == "inductor" else 2))
    data = batch(LENGTHS["padded"])
    batches = [data]
    if backend == "aot_eager":  # inductor takes 8 s for a batch of another kind
        batches.append({**data, "next_sentence_label": torch.tensor([0, 1, IGNORED_LABEL])})
    expected = [outputs_and_gradients(ours, inputs) for inputs in batches]
    held_out = ours.eval()(**data).loss
    keys = list(ours.state_dict())
    ours.train().compile_blocks(backend)
    torch._dynamo.utils.counters.clear()
    for values, inputs in zip(expected, batches, strict=True):
        found = outputs_and_gradients(ours, inputs)
        torch.testing.assert_close(found, values, atol=2e-6, rtol=1e-4)
    if backend == "aot_eager":
        with torch.no_grad():
            torch.testing.assert_close(ours.eval()(**data).loss, held_out, atol=1e-5, rtol=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert list(ours.state_dict()) == keys


def test_sequences_beyond_the_positions_are_an_error() -> None:
    model = BertForPreTraining(SMALL)
    with pytest.raises(UserError, match="25 tokens are longer than the model's 24 positions"):
        model(torch.ones(1, 25, dtype=torch.long))


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_any_length_equal_padded_rows(first_only: bool, dtype: torch.dtype) -> None:
    """On a CPU `of_lengths` lays the rows end to end; states and gradients stay those of rows.

    In bf16 there is one sequence more, which makes the 35 tokens a multiple of 64.
    """
    torch.manual_seed(0)
    bert = BertForPreTraining(SMALL).bert.train()
    ids = torch.randint(5, SMALL.vocab_size, (5, 12))
    types = torch.randint(0, 2, (5, 12))
    lengths = torch.tensor([12, 3, 1, 12, 7])
    real = torch.arange(12) < lengths[:, None]
    found = []
    for keeps_padding in (True, False):
        bert.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            if not keeps_padding:
                hidden = bert.of_lengths(ids, types, lengths, first_only)
            elif first_only:
                hidden = bert(ids, types, lengths)[:, :1]
            else:
                hidden = bert(ids, types, lengths)
        states = hidden[:, 0] if first_only else hidden[real]
        (states * torch.linspace(-1, 1, SMALL.hidden_size)).sum().backward()
        found.append({"states": states.detach(), **gradients(bert)})
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for name, padded in found[0].items():
        assert (found[1][name] - padded).norm() <= tolerance * (1 + padded.norm()), name
    if not first_only:
        assert not hidden[~real].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["masked", "end to end"])
@pytest.mark.parametrize("first_only", [False, True])
def test_rows_of_any_length_wait_for_no_device(first_only: bool, dtype: torch.dtype) -> None:
    """Off the CPU nothing looks at `lengths`; on the meta device looking is an error."""
    bert = BertForPreTraining(SMALL).bert.to("meta", dtype)
    ids = torch.zeros(5, 12, dtype=torch.int64, device="meta")
    hidden = bert.of_lengths(ids, None, torch.ones_like(ids[:, 0]), first_only)
    assert hidden.shape == (5, 1 if first_only else 12, SMALL.hidden_size)
