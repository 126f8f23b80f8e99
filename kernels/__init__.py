"""Fused operations for BERT encoders. Depends on torch (and, for the Triton kernels, triton) only.

Public: the operations, `reference` (the same operations in plain torch), `set_backend` and
`available` (which of the two runs), and modules for other projects' networks (README.md has an
example of each). The package also imports without Triton; every operation then runs in torch.
"""

if __name__ != "clue_ds.kernels":
    from .namesake import give_way

    give_way(__name__, __path__[0])
else:
    # `functional` comes before its names, because a kernel's module has the name of its operation,
    # and importing the module binds that name here.
    from . import functional, reference  # isort: skip
    from .backend import available, get_backend, refuse, set_backend, use_triton
    from .functional import (
        attention,
        attention_to,
        bias_dropout_add_layer_norm,
        bias_gelu,
        embedding_layer_norm,
        layer_norm,
        masked_softmax,
        takes_attention,
    )
    from .modules import FusedLayerNorm, FusedScaleMaskSoftmax, apply_kernels_to_bert

__all__ = [
    "FusedLayerNorm",
    "FusedScaleMaskSoftmax",
    "apply_kernels_to_bert",
    "attention",
    "attention_to",
    "available",
    "bias_dropout_add_layer_norm",
    "bias_gelu",
    "embedding_layer_norm",
    "functional",
    "get_backend",
    "layer_norm",
    "masked_softmax",
    "reference",
    "refuse",
    "set_backend",
    "takes_attention",
    "use_triton",
]
