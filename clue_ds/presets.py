"""The config of a model, and the presets: the shapes that CLUE publishes, by name.

Shapes follow CLUEPretrainedModels. The parameter counts in the docstrings are those of BertModel
(without pretraining heads), and tests/test_presets.py compares them. The `*_pair` presets are the
same networks trained further on sentence pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from clue_ds.errors import UserError

# gelu: erf, Hugging Face's; gelu_new: tanh, which TensorFlow's BERT calls gelu.
HiddenAct = Literal["gelu", "gelu_new"]
# How attention is computed, and which implementation of the fused operations runs (model/ops.py).
Attention = Literal["sdpa", "masked_softmax"]
Kernels = Literal["auto", "triton", "torch"]

CLUE_VOCAB_SIZE = 8_021
GOOGLE_VOCAB_SIZE = 21_128


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a post-LN BERT. Fields have the names and meanings of Hugging Face's BertConfig.

    `hidden_act` is one of HiddenAct. `vocab_size` is the number of lines of vocab.txt: rows that a
    trainer adds in memory are not counted.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}; change one of them"
            )
        if self.hidden_act not in get_args(HiddenAct):
            names = " or ".join(get_args(HiddenAct))
            raise UserError(f"hidden_act must be {names}, not {self.hidden_act!r}")

    @property
    def gelu_approximation(self) -> str:
        """The form of GELU under torch's name: "none" (erf) or "tanh"."""
        return "none" if self.hidden_act == "gelu" else "tanh"

    def replace(self, **changes: Any) -> ModelConfig:
        return dataclasses.replace(self, **changes)


def _shape(
    layers: int, hidden: int, heads: int, intermediate: int, vocab: int = CLUE_VOCAB_SIZE
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
    )


def roberta_tiny_clue() -> ModelConfig:
    """4 layers of 312: 7,449,936 parameters."""
    return _shape(4, 312, 12, 1248)


def roberta_tiny_pair() -> ModelConfig:
    """roberta_tiny_clue trained further on sentence pairs: 7,449,936 parameters."""
    return roberta_tiny_clue()


def roberta_tiny3l312_clue() -> ModelConfig:
    """3 layers of 312: 6,277,752 parameters."""
    return _shape(3, 312, 12, 1248)


def roberta_tiny3l768_clue() -> ModelConfig:
    """3 layers of 768: 28,410,624 parameters."""
    return _shape(3, 768, 12, 3072)


def bert_base_clue() -> ModelConfig:
    """BERT-base with the CLUE vocabulary: 92,201,472 parameters."""
    return _shape(12, 768, 12, 3072)


def bert_base_google() -> ModelConfig:
    """BERT-base with Google's Chinese vocabulary: 102,267,648 parameters."""
    return _shape(12, 768, 12, 3072, vocab=GOOGLE_VOCAB_SIZE)


def roberta_large_clue() -> ModelConfig:
    """24 layers of 1024: 312,100,864 parameters."""
    return _shape(24, 1024, 16, 4096)


def roberta_large_pair() -> ModelConfig:
    """roberta_large_clue trained further on sentence pairs: 312,100,864 parameters."""
    return roberta_large_clue()


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    function.__name__: function
    for function in (
        roberta_tiny_clue,
        roberta_tiny_pair,
        roberta_tiny3l312_clue,
        roberta_tiny3l768_clue,
        bert_base_clue,
        bert_base_google,
        roberta_large_clue,
        roberta_large_pair,
    )
}
NAMES: tuple[str, ...] = tuple(PRESETS)


def get(name: str) -> ModelConfig:
    """The ModelConfig called `name`; for an unknown name a UserError lists the presets."""
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}; presets: {', '.join(NAMES)}")
    return PRESETS[name]()
