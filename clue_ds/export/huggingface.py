"""A Hugging Face directory, written by us file by file.

    config.json  model.safetensors  vocab.txt  tokenizer.json  tokenizer_config.json

Guarantees: fp32, tied entries once, the true GELU in config.json; the directory appears complete or
not at all (staged beside it, then renamed); an existing one is replaced only when that was asked.

Rejected: transformers' save_pretrained (its tokenizer writes no vocab.txt, and a bf16 model is
exported as bf16).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from clue_ds.errors import UserError, existing_file
from clue_ds.model.weights import TIED, WORD_EMBEDDINGS, StateDict, expected_shapes
from clue_ds.presets import ModelConfig

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
CLASSIFIER_WEIGHT = "classifier.weight"


def write(
    config: ModelConfig,
    state: StateDict,
    vocab_file: str | Path,
    directory: str | Path,
    lower_case: bool = True,
    force: bool = False,
    labels: list[str] | None = None,
    task: str | None = None,
) -> Path:
    """Write the directory and return its path.

    `state` has our names (see model/weights.py), without padding rows; heads that it lacks are not
    written. `labels` names the classes of a `classifier` in it and `task` what it was trained for.
    UserError when the vocabulary
    disagrees, when `directory` exists and `force` is false, or when the disk is full.
    """
    directory = Path(directory)
    tokens = read_tokens(vocab_file, config.vocab_size)
    _check_state(config, state)
    _check_target(directory, force)
    directory.parent.mkdir(parents=True, exist_ok=True)
    # mkdtemp's own directories are private (0700); one inside it gets the user's umask.
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as scratch:
        staged = Path(scratch) / "new"
        staged.mkdir()
        try:
            tensors = {n: t.float().contiguous() for n, t in state.items() if n not in TIED}
            safetensors.torch.save_file(tensors, staged / "model.safetensors", {"format": "pt"})
            fast_tokenizer(tokens, lower_case).save(str(staged / "tokenizer.json"))
            _write_json(staged / "tokenizer_config.json", tokenizer_config(config, lower_case))
            _write_json(staged / "config.json", config_json(config, state, labels, task))
            shutil.copyfile(vocab_file, staged / "vocab.txt")
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(
                f"can't write {staged}: {error}; free some space or choose another --output"
            ) from None
        if directory.exists():
            directory.rename(Path(scratch) / "old")
        staged.rename(directory)
    return directory


def _check_target(directory: Path, force: bool) -> None:
    if not directory.exists():
        return
    if not force:
        raise UserError(f"{directory} exists; give --force to replace it, or another --output")
    replaceable = directory.is_dir() and (
        (directory / "config.json").is_file() or not any(directory.iterdir())
    )
    if not replaceable:
        raise UserError(
            f"{directory} exists and is not a model directory; --force replaces only those"
        )


def read_tokens(vocab_file: str | Path, vocab_size: int) -> list[str]:
    """The lines of vocab.txt; UserError unless there are `vocab_size`, special tokens included."""
    path = existing_file(vocab_file, "vocabulary")
    tokens = path.read_text(encoding="utf-8").split("\n")
    if tokens[-1] == "":
        tokens.pop()
    if len(tokens) != vocab_size:
        raise UserError(
            f"vocabulary {path} has {len(tokens):,} lines but the model has {vocab_size:,} words; "
            "give the vocab.txt that it was trained with"
        )
    missing = [token for token in SPECIAL_TOKENS.values() if token not in tokens]
    if missing:
        raise UserError(f"{path} is not a BERT vocabulary: it lacks {', '.join(missing)}")
    return tokens


def _check_state(config: ModelConfig, state: StateDict) -> None:
    """Refuse what a reader would silently fill with random numbers or can't load."""
    if WORD_EMBEDDINGS not in state:
        raise UserError(f"the state dict has no {WORD_EMBEDDINGS}: it is not a BERT encoder")
    expected = expected_shapes(config)
    for name, tensor in state.items():
        if name in expected and tensor.shape != expected[name]:
            raise UserError(
                f"{name} is {tuple(tensor.shape)} but the config says {tuple(expected[name])}"
            )
        if name not in expected and not name.startswith("classifier."):
            raise UserError(f"the state dict holds {name}, which BertForPreTraining has not")


def architecture(state: StateDict) -> str:
    """The transformers class whose weights `state` holds, none missing."""
    if CLASSIFIER_WEIGHT in state:
        return "BertForSequenceClassification"
    has_mlm = "cls.predictions.bias" in state
    if has_mlm and "cls.seq_relationship.weight" in state:
        return "BertForPreTraining"
    return "BertForMaskedLM" if has_mlm else "BertModel"


def config_json(
    config: ModelConfig,
    state: StateDict,
    labels: list[str] | None = None,
    task: str | None = None,
) -> dict[str, Any]:
    """The content of config.json."""
    values: dict[str, Any] = {
        "architectures": [architecture(state)],
        "model_type": "bert",
        **dataclasses.asdict(config),
        "classifier_dropout": None,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        "use_cache": True,
    }
    if labels is not None:
        values["id2label"] = {str(i): label for i, label in enumerate(labels)}
        values["label2id"] = {label: i for i, label in enumerate(labels)}
    if task is not None:
        values["finetuning_task"] = task
    return values


def tokenizer_config(config: ModelConfig, lower_case: bool) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    return {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": lower_case,
        "model_max_length": config.max_position_embeddings,
        "tokenize_chinese_chars": True,
        **SPECIAL_TOKENS,
    }


def fast_tokenizer(tokens: list[str], lower_case: bool) -> tokenizers.Tokenizer:
    """BERT's tokenizer as the `tokenizers` library has it, for tokenizer.json."""
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    return tokenizer


def _write_json(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
