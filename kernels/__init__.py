"""Fused operations for BERT encoders. Depends on torch (and, for the Triton kernels, triton) only.

Public: the operations, `reference` (each of them in plain torch), `set_backend` and `available`
(which of the two runs), and modules that put them into networks of others. Importing works without
Triton; the operations are then their twins.
"""

if __name__ != "clue_ds.kernels":
    from .namesake import give_way

    give_way(__name__, __path__[0])
else:
    # `functional` before its names: a kernel's module is called as its operation, and importing it
    # binds that name here.
    from . import functional, reference  # isort: skip
    from .backend import available, get_backend, set_backend, use_triton
    from .functional import (
        bias_dropout_add_layer_norm,
        bias_gelu,
        embedding_layer_norm,
        layer_norm,
        masked_softmax,
    )
    from .modules import FusedLayerNorm, FusedScaleMaskSoftmax, apply_kernels_to_bert

__all__ = [
    "FusedLayerNorm",
    "FusedScaleMaskSoftmax",
    "apply_kernels_to_bert",
    "available",
    "bias_dropout_add_layer_norm",
    "bias_gelu",
    "embedding_layer_norm",
    "functional",
    "get_backend",
    "layer_norm",
    "masked_softmax",
    "reference",
    "set_backend",
    "use_triton",
]
