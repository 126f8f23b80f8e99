"""Fused operations for BERT encoders. Depends on torch (and, for the Triton kernels, triton) only.

`reference` holds every operation in plain torch; the public names are what the model calls.
"""

from . import reference
from .reference import (
    bias_dropout_add_layer_norm,
    bias_gelu,
    embedding_layer_norm,
    layer_norm,
    masked_softmax,
)

__all__ = [
    "bias_dropout_add_layer_norm",
    "bias_gelu",
    "embedding_layer_norm",
    "layer_norm",
    "masked_softmax",
    "reference",
]
