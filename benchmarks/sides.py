"""The two sides of the comparison of training steps, and rows for both of them.

Ours is BertForPreTraining; the peer is transformers' BertForMaskedLM with our weights. Both see the
same rows and predict the same tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clue_ds.data import Corpus, SampleStream
from clue_ds.data.sampling import IGNORED_LABEL, num_predictions
from clue_ds.model import BertForPreTraining
from clue_ds.model.bert import pad_vocab
from clue_ds.model.weights import trim_vocab
from clue_ds.presets import ModelConfig

MASK_PROB = 0.15
FIRST_REAL_ID = 104  # below are the special tokens of Google's and CLUE's vocabularies
# Relative difference of losses from equal weights: fp32 sums are in another order, and bf16 keeps 8
# bits of every activation.
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """What both sides share."""

    config: ModelConfig
    device: torch.device
    precision: str
    compile: bool

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


class Side(NamedTuple):
    """One side of the comparison: its network and how it computes the loss of a batch."""

    name: str
    network: nn.Module
    loss: Callable[[Batch], Tensor]


def make_ours(setting: Setting, seed: int) -> Side:
    torch.manual_seed(seed)
    rows = pad_vocab(setting.config).vocab_size
    network = BertForPreTraining(setting.config, padded_vocab_size=rows).to(setting.device)

    def loss(batch: Batch) -> Tensor:
        return network(
            batch["input_ids"],
            lengths=batch.get("lengths"),
            masked_positions=batch["masked_positions"],
            masked_labels=batch["masked_labels"],
        ).loss

    return Side("clue_ds", network, loss)


def _spare_the_peer_absent_masks() -> None:
    """Where no attention mask is given, let compiled code of the peer have none.

    transformers 5.17 builds a mask of ones there when it is compiled (5.23 does not), and with a
    mask attention on a GPU takes slower paths, for heads of 26 the slowest.
    """
    from transformers.models.bert import modeling_bert

    make: Any = getattr(modeling_bert, "create_bidirectional_mask", None)
    if make is None or make.__module__ == __name__:
        return

    def create_bidirectional_mask(*arguments: Any, **options: Any) -> Any:
        if "attention_mask" in options and options["attention_mask"] is None:
            return None
        return make(*arguments, **options)

    vars(modeling_bert)["create_bidirectional_mask"] = create_bidirectional_mask


def peer_network(config: ModelConfig) -> nn.Module:
    """transformers' BertForMaskedLM with random weights."""
    import transformers  # here, so that our own steps can be measured without it

    _spare_the_peer_absent_masks()
    values: dict[str, Any] = dataclasses.asdict(config) | {"attn_implementation": "sdpa"}
    network: nn.Module = transformers.BertForMaskedLM(transformers.BertConfig(**values))
    return network


def make_peer(setting: Setting, ours: nn.Module) -> Side:
    """transformers' BertForMaskedLM with our weights."""
    network = peer_network(setting.config).to(setting.device)
    state = trim_vocab(ours.state_dict(), setting.config.vocab_size)
    network.load_state_dict({name: state[name] for name in network.state_dict()})

    def loss(batch: Batch) -> Tensor:
        return network(
            batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).loss

    return Side("transformers BertForMaskedLM", network, loss)


def without_mask(peer: Side) -> Side:
    """The same network without an attention mask, for batches whose rows are all full.

    Eagerly, transformers finds out by itself that such a mask masks nothing. Compiled, it hands the
    mask to attention, which for some head sizes then takes torch's slow path.
    """

    def loss(batch: Batch) -> Tensor:
        return peer.network(batch["input_ids"], labels=batch["labels"]).loss

    return Side(f"{peer.name}, no mask", peer.network, loss)


def random_rows(config: ModelConfig, num_rows: int, seq_length: int, seed: int) -> Batch:
    """Full rows of random tokens, of which a fixed number is to be predicted."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, seq_length)
    input_ids = torch.randint(FIRST_REAL_ID, config.vocab_size, shape, generator=generator)
    order = torch.rand(shape, generator=generator).argsort(1)
    positions = order[:, : num_predictions(seq_length, MASK_PROB)].sort(1).values
    return {
        "input_ids": input_ids,
        "lengths": torch.full((num_rows,), seq_length),
        "masked_positions": positions,
        "masked_labels": input_ids.gather(1, positions),
    }


def corpus_rows(corpus: Path, num_rows: int, seq_length: int, seed: int) -> Batch:
    """The first samples of a corpus, as training would see them."""
    return SampleStream(Corpus(corpus), seq_length, num_rows, seed).batch(0)


def for_both(rows: Batch, device: torch.device) -> Batch:
    """Add what the peer reads: labels for all positions and an attention mask."""
    labels = torch.full_like(rows["input_ids"], IGNORED_LABEL)
    used = rows["masked_labels"] != IGNORED_LABEL
    row_index = torch.arange(len(labels))[:, None].expand_as(used)
    labels[row_index[used], rows["masked_positions"][used]] = rows["masked_labels"][used]
    seq_length = labels.shape[1]
    mask = (torch.arange(seq_length) < rows["lengths"][:, None]).long()
    batch = {**rows, "labels": labels, "attention_mask": mask}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def check_same_loss(ours: Side, peer: Side, batch: Batch, setting: Setting) -> tuple[float, float]:
    """Both losses with dropout off; RuntimeError if they differ, as timing is then pointless."""
    losses = []
    for side in (ours, peer):
        side.network.eval()
        with torch.no_grad(), setting.autocast():
            losses.append(side.loss(batch).float().item())
        side.network.train()
    num_slots = batch["masked_labels"].numel()
    num_used = int((batch["masked_labels"] != IGNORED_LABEL).sum())
    # Our loss is divided by the number of all slots, the peer's by the number of used ones.
    mine, theirs = losses[0] * num_slots / num_used, losses[1]
    if abs(mine - theirs) > LOSS_TOLERANCE[setting.precision] * theirs:
        raise RuntimeError(f"the two sides compute different losses: {mine} and {theirs}")
    return mine, theirs
