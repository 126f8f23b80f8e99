"""A Hugging Face directory, written file by file.

    config.json  model.safetensors  README.md
    vocab.txt  tokenizer.json  tokenizer_config.json
    pytorch_model.bin                                     with `legacy`

Guarantees: the weights are fp32 unless fp16 was requested, and config.json names the GELU that the
model was trained with. The weights are stored once, in model.safetensors, with tied entries once.
`legacy` stores them a second time, in torch's old format with the tied keys, for readers down to
transformers 2.5.1 (torch 1.4). The same model gives the same bytes.

Rejected: transformers' save_pretrained (its tokenizer writes no vocab.txt, a bf16 model is exported
as bf16, and it no longer writes a .bin).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import safetensors.torch
import tokenizers
import torch
from tokenizers import decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from clue_ds.errors import UserError
from clue_ds.export import embedder
from clue_ds.export.card import model_card, name_of
from clue_ds.export.legacy import torch_file
from clue_ds.export.publish import (
    check_state,
    copy_vocab,
    read_tokens,
    staged,
    write_model_json,
)
from clue_ds.model.finetuned import QUESTION_ANSWERING, SEQUENCE, FineTuned, unnamed
from clue_ds.model.weights import (
    CLASSIFIER_WEIGHT,
    DECODER_WEIGHT,
    NEXT_SENTENCE_WEIGHT,
    PREDICTION_BIAS,
    QA_WEIGHT,
    TASK_HEADS,
    TIED,
    StateDict,
    is_tied,
    tie,
)
from clue_ds.presets import ModelConfig
from clue_ds.vocab_file import SPECIAL_TOKENS, TOKENIZER_CONFIG

# What transformers calls SPECIAL_TOKENS, in the same order.
TOKEN_KEYS = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


def write(
    config: ModelConfig,
    state: StateDict,
    vocab_file: str | Path,
    directory: str | Path,
    lower_case: bool = True,
    force: bool = False,
    finetuned: FineTuned | None = None,
    half: bool = False,
    legacy: bool = False,
    pooling: embedder.Pooling | None = None,
) -> Path:
    """Write the directory and return its path.

    `state` has the names of model/weights.py, without padding rows; heads that it lacks are not
    written. `finetuned` says what a classifier in it is for. `half` stores fp16, `legacy` also
    writes pytorch_model.bin, and `pooling` makes a directory for programs that embed texts
    (embedder.py). UserError when the vocabulary has another size than the model,
    `directory` exists and `force` is false, a weight is beyond fp16's range, or the disk is full.
    """
    directory = Path(directory)
    tokens = read_tokens(vocab_file, config.vocab_size)
    check_state(config, state, finetuned)
    dtype = torch.float16 if half else torch.float32
    with staged(directory, force) as place:
        place.mkdir()
        is_embedder = pooling is not None and CLASSIFIER_WEIGHT not in state
        if is_embedder and pooling is not None:
            embedder.write(config, pooling, lower_case, place)
            state = {name: t for name, t in state.items() if name.startswith("bert.")}
        written = embedder.encoder_alone(state) if is_embedder else state
        _write_weights(written, dtype, place, legacy)
        fast_tokenizer(tokens, lower_case).save(str(place / "tokenizer.json"))
        write_model_json(place / TOKENIZER_CONFIG, tokenizer_config(config, lower_case, finetuned))
        values = config_json(config, state, finetuned) | {"torch_dtype": str(dtype)[6:]}
        write_model_json(place / "config.json", values)
        copy_vocab(vocab_file, place)
        name, made_in = name_of(directory, finetuned), Path(vocab_file).parent
        card = model_card(name, values, state, made_in, finetuned)
        (place / "README.md").write_text(card, encoding="utf-8")
    return directory


def _write_weights(state: StateDict, dtype: torch.dtype, place: Path, legacy: bool) -> None:
    """Write model.safetensors, and with `legacy` pytorch_model.bin, which holds tied copies too."""
    left_out = TIED if is_tied(state, DECODER_WEIGHT) else {}
    tensors = {n: t.detach().to(dtype).contiguous() for n, t in state.items() if n not in left_out}
    for name, tensor in tensors.items():
        if dtype == torch.float16 and not torch.isfinite(tensor).all():
            raise UserError(f"{name} has weights beyond fp16's range (65,504); export it in fp32")
    # safetensors refuses two entries that share storage.
    alone = {n: t.clone() if n in TIED else t for n, t in tensors.items()}
    path = place / "model.safetensors"
    safetensors.torch.save_file(alone, path, {"format": "pt"})
    # safetensors creates the file with mode 0600; give it the directory's, which follows the umask.
    path.chmod(place.stat().st_mode & 0o666)
    if legacy:
        torch_file.save(tie(dict(tensors), place), place / "pytorch_model.bin")


def architecture_of(state: StateDict) -> str:
    """The transformers class for which `state` has every weight."""
    if CLASSIFIER_WEIGHT in state:
        return SEQUENCE
    if QA_WEIGHT in state:
        return QUESTION_ANSWERING
    has_mlm = PREDICTION_BIAS in state
    if has_mlm and NEXT_SENTENCE_WEIGHT in state:
        return "BertForPreTraining"
    return "BertForMaskedLM" if has_mlm else "BertModel"


def config_json(
    config: ModelConfig,
    state: StateDict,
    finetuned: FineTuned | None = None,
) -> dict[str, Any]:
    """The content of config.json."""
    values: dict[str, Any] = {
        "architectures": [architecture_of(state)],
        "model_type": "bert",
        **dataclasses.asdict(config),
        "classifier_dropout": None,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": is_tied(state, DECODER_WEIGHT),
        "use_cache": True,
    }
    return values | classes_of(state, finetuned)


def classes_of(state: StateDict, finetuned: FineTuned | None) -> dict[str, Any]:
    """The keys of a config that say what the fine-tuned head in `state` is; {} if it has none.

    Without them transformers takes a classifier for one of two classes.
    """
    if not any(name.startswith(TASK_HEADS) for name in state):
        return {}
    labels = unnamed(len(state.get(CLASSIFIER_WEIGHT, ())))
    return (finetuned or FineTuned(labels, architecture=architecture_of(state))).config_values()


def tokenizer_config(
    config: ModelConfig, lower_case: bool, finetuned: FineTuned | None = None
) -> dict[str, Any]:
    """The content of tokenizer_config.json; a classifier's texts are as long as in its training."""
    longest = config.max_position_embeddings
    if finetuned is not None and finetuned.max_length is not None:
        longest = min(longest, finetuned.max_length)
    return {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": lower_case,
        "model_max_length": longest,
        "tokenize_chinese_chars": True,
        **dict(zip(TOKEN_KEYS, SPECIAL_TOKENS, strict=True)),
    }


def fast_tokenizer(tokens: list[str], lower_case: bool) -> tokenizers.Tokenizer:
    """BERT's tokenizer in the `tokenizers` library, for tokenizer.json."""
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
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer
