"""A Hugging Face directory for programs that embed texts: sentence-transformers, TEI and vLLM.

    modules.json  sentence_bert_config.json  1_Pooling/config.json

One form suits all three, that of the published embedders of BERT's shape (BAAI's bge): the
architecture is BertModel, which vLLM lists and BertForPreTraining is not; the names of the weights
have no "bert." before them; the heads of pretraining, which no embedder reads, are left out; and
1_Pooling says how a text's vector is made, which TEI refuses to guess. A classifier needs none of
this: all of them serve BertForSequenceClassification as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from clue_ds.presets import ModelConfig

if TYPE_CHECKING:
    from clue_ds.model.weights import StateDict

Pooling = Literal["mean", "cls"]
POOLINGS: tuple[str, ...] = get_args(Pooling)
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


def encoder_alone(state: StateDict) -> StateDict:
    """The weights of the encoder and its pooler under the names that BertModel's own file has."""
    return {n.removeprefix("bert."): t for n, t in state.items() if n.startswith("bert.")}


def write(config: ModelConfig, pooling: Pooling, lower_case: bool, place: Path) -> None:
    """Write the three files into `place`."""
    from clue_ds.export.publish import write_model_json  # here, because `--help` needs no torch

    text: dict[str, Any] = {
        "max_seq_length": config.max_position_embeddings,
        "do_lower_case": lower_case,
    }
    write_model_json(place / "sentence_bert_config.json", text)
    folder = place / "1_Pooling"
    folder.mkdir()
    write_model_json(
        folder / "config.json",
        {
            "word_embedding_dimension": config.hidden_size,
            "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_mean_tokens": pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    )
    write_model_json(place / "modules.json", MODULES)
