"""Small random models and vocabularies for tests of conversion."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor

from clue_ds.model import BertForPreTraining
from clue_ds.model.weights import StateDict
from clue_ds.presets import ModelConfig

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
DECODER = "cls.predictions.decoder.weight"
DECODER_BIAS = "cls.predictions.decoder.bias"
POOLER, NSP, MLM = "bert.pooler.", "cls.seq_relationship.", "cls.predictions."

TINY_CONFIG = ModelConfig(
    vocab_size=30,
    hidden_size=24,
    num_hidden_layers=1,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=16,
)


def write_vocab(path: Path, num_tokens: int) -> Path:
    """The five special tokens and Chinese characters."""
    tokens = [*SPECIAL, *(chr(0x4E00 + i) for i in range(num_tokens - len(SPECIAL)))]
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return path


def random_config(draw: random.Random) -> ModelConfig:
    heads = draw.randint(1, 5)
    return ModelConfig(
        vocab_size=draw.randint(6, 90),
        hidden_size=heads * draw.randint(1, 7),
        num_hidden_layers=draw.choice([1, 1, 2, 2, 3, 11]),
        num_attention_heads=heads,
        intermediate_size=draw.randint(1, 50),
        hidden_act=draw.choice(["gelu", "gelu_new"]),
        hidden_dropout_prob=draw.choice([0.0, 0.1]),
        max_position_embeddings=draw.randint(8, 40),
        type_vocab_size=draw.randint(1, 3),
        initializer_range=draw.choice([0.02, 0.5]),
        layer_norm_eps=draw.choice([1e-12, 1e-5]),
        pad_token_id=draw.choice([0, 3]),
    )


def random_model(config: ModelConfig, seed: int) -> BertForPreTraining:
    """Random biases and LayerNorms too, so that a swap shows."""
    torch.manual_seed(seed)
    model = BertForPreTraining(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def without(state: StateDict, *prefixes: str) -> StateDict:
    return {name: t for name, t in state.items() if not name.startswith(prefixes)}


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))
