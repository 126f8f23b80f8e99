"""Initial weights: BERT's initialization, reproducible from the seed and the shapes.

Guarantees: random numbers are drawn on the CPU in fp32, in the order of `named_parameters`, so
device, dtype, world size and vocabulary padding don't change the weights. A parameter's name
decides: *LayerNorm.weight is 1, every bias is 0, and everything else is N(0, initializer_range);
the [PAD] row and padding rows are 0.
"""

from __future__ import annotations

import torch
from torch import nn

from clue_ds.presets import ModelConfig

_WORD_EMBEDDINGS_ENDING = "embeddings.word_embeddings.weight"


@torch.no_grad()
def initialize_parameters(module: nn.Module, config: ModelConfig, seed: int) -> None:
    """Initialize any module whose parameters have BERT's names (an encoder, a head, or both)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.endswith("LayerNorm.weight"):
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        elif name.endswith(_WORD_EMBEDDINGS_ENDING):
            real = torch.empty(config.vocab_size, config.hidden_size)
            real.normal_(0.0, config.initializer_range, generator=generator)
            real[config.pad_token_id] = 0.0
            parameter.zero_()
            parameter[: config.vocab_size] = real.to(parameter)
        else:
            values = torch.empty(parameter.shape)
            values.normal_(0.0, config.initializer_range, generator=generator)
            parameter.copy_(values)


def initialize(model: nn.Module, seed: int) -> None:
    """Initialize a model that has a `config`: BertForPreTraining or a task model."""
    config = model.config
    assert isinstance(config, ModelConfig)
    initialize_parameters(model, config, seed)
