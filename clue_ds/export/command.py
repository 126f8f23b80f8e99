"""The verbs `export` and `import`, which write models for other programs and read theirs."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from clue_ds.errors import UserError
from clue_ds.export import archives
from clue_ds.export.embedder import Pooling
from clue_ds.export.onnx_model import DEFAULT_OPSET
from clue_ds.presets import HiddenAct, ModelConfig
from clue_ds.settings.arguments import PathOrName

if TYPE_CHECKING:
    from clue_ds.export.sources import OpenedModel

Server = Literal["transformers", "sentence-transformers", "tei", "vllm"]
GOOGLES_EPSILON = 1e-12
EMBEDDERS = ("sentence-transformers", "tei", "vllm")


def export(
    run: tyro.conf.Positional[Path],
    to: str = "hf",
    output: Path | None = None,
    force: bool = False,
    trim_vocab: bool = False,
    vocab: Path | None = None,
    drop_heads: bool = False,
    fp16: bool = False,
    legacy: bool = False,
    opset: int = DEFAULT_OPSET,
    quantize: Literal["int8"] | None = None,
    texts: Path | None = None,
    server: Annotated[Server | None, tyro.conf.arg(name="for")] = None,
    pooling: Pooling = "mean",
    zip: bool = False,
) -> None:
    """Write a run's newest checkpoint, or any model, in a layout that other programs load.

    Args:
        run: a run directory, one of its checkpoints, a model directory, a zip of one, or the name
            of a model on the Hugging Face hub.
        to: hf (config.json, model.safetensors, vocab.txt, tokenizer, model card), tf (Google's
            bert_model.ckpt.*, bert_config.json, vocab.txt), uer (UER's and TencentPretrain's
            model.bin), onnx (model.onnx; needs the extra clue_ds[onnx]), or all.
        output: where to write; default RUN/export/TO. With all, the directory that will hold one
            directory per layout.
        force: replace the output if it exists.
        trim_vocab: drop the embedding rows beyond vocab.txt, which no text ever uses.
        vocab: switch to this vocab.txt. Known tokens keep their rows; new tokens are listed.
        drop_heads: leave out the MLM and NSP heads; pretraining can't be continued from the result.
        fp16: store 2 bytes per weight instead of 4 (hf only).
        legacy: also write pytorch_model.bin, which programs that do not know safetensors need, such
            as transformers before 4.30 (hf only).
        opset: version of ONNX's operations, 17 to 21 (onnx only); onnxruntime 1.13 and later reads
            17.
        quantize: also write model_quantized.onnx with int8 weights, a quarter of the size, and say
            on the file of --texts what it changes (onnx only).
        texts: JSON lines for --quantize, such as the dev.json of the model's task.
        server: the program that will serve the directory (hf only). For one that embeds texts
            (sentence-transformers, tei, vllm) a pretrained model becomes a BertModel with pooling.
        pooling: with --for, how an embedder makes a vector of a text: mean over its tokens, or cls.
        zip: write OUTPUT.zip, the form in which CLUE publishes its models, instead of a directory.
    """
    # Here and below, what needs torch is imported in the functions, because `--help` needs none.
    from clue_ds.export import slim
    from clue_ds.export.layouts import LAYOUTS, check_layout
    from clue_ds.export.sources import opened

    targets = list(LAYOUTS) if to == "all" else [to]
    for target in targets:
        check_layout(target, fp16, legacy)
    check_quantization(quantize, texts, targets)
    if server is not None and "hf" not in targets:
        raise UserError("--for works with --to hf only; drop one of the two")
    output = _default_output(run, to) if output is None else output
    with opened(run) as model:
        before = slim.sizes(model)
        for note in [*model.notes, *_fresh_heads(model)]:
            print(note)
        model = _slimmed(model, trim_vocab, vocab, drop_heads)
        if to == "all":
            _leave_out(targets, model)
        for target in targets:
            place = output / target if to == "all" else output
            options: dict[str, Any] = {"half": fp16, "legacy": legacy}
            options |= {"opset": opset, "quantized_on": texts}
            options |= {"pooling": pooling if server in EMBEDDERS else None}
            _write(model, place, target, force, zip, **options)
        if trim_vocab or vocab or drop_heads or fp16:
            print(slim.table(before, slim.sizes(model, fp16)))


def _leave_out(targets: list[str], model: OpenedModel) -> None:
    """Remove the layouts that have no place for the model's fine-tuned head, and say so."""
    from clue_ds.model import weights

    for heads, layouts in ((weights.TASK_HEADS, ["uer"]), (weights.POINTER_HEAD, ["tf", "onnx"])):
        for layout in layouts:
            if any(name.startswith(heads) for name in model.state_dict) and layout in targets:
                targets.remove(layout)
                print(f"the layout {layout} is left out: it has no place for this fine-tuned head")


def check_quantization(kind: str | None, texts: Path | None, targets: list[str]) -> None:
    """UserError unless --quantize and --texts make sense together, and with the layouts."""
    if kind is None and texts is None:
        return
    if "onnx" not in targets:
        raise UserError("--quantize and --texts work with --to onnx or all only; drop them")
    if texts is None:
        raise UserError(
            "--quantize needs --texts FILE, on which the change of the answers is measured: JSON "
            "lines such as the dev.json of the model's task"
        )
    if kind is None:
        raise UserError("--texts is read for --quantize int8 only; drop it, or give both")


def _default_output(run: Path, to: str) -> Path:
    if not run.exists():
        raise UserError(
            f"{run} is not a directory; give a run directory (for a model on the hub, also give "
            "--output DIR)"
        )
    if not ((run / "checkpoints").is_dir() or (run / "config.yaml").is_file()):
        raise UserError(f"{run} is not a run directory, so there is no default; give --output DIR")
    return run / "export" if to == "all" else run / "export" / to


def _fresh_heads(model: OpenedModel) -> list[str]:
    """A sentence for each head that the model lacks and that others fill with random weights.

    A fine-tuned model needs no heads of pretraining.
    """
    from clue_ds.model import weights

    is_finetuned = any(name.startswith(weights.TASK_HEADS) for name in model.state_dict)
    return [
        f"the model has no {head} ({', '.join(missing)}); programs that need it start it from "
        "random weights"
        for head, missing in weights.lacking(model.config, model.state_dict).items()
        if not is_finetuned or (head == "pooler" and weights.CLASSIFIER_WEIGHT in model.state_dict)
    ]


def _slimmed(
    model: OpenedModel, trim_vocab: bool, vocab: Path | None, drop_heads: bool
) -> OpenedModel:
    from clue_ds.export import slim

    if trim_vocab:
        model = slim.drop_unused_rows(model)
    if vocab is not None:
        model, unknown = slim.change_vocab(model, vocab)
        print(f"{len(unknown):,} tokens of {vocab} are new: {' '.join(unknown)}")
    return slim.drop_heads(model) if drop_heads else model


def _write(
    model: OpenedModel, place: Path, to: str, force: bool, is_zip: bool, **options: Any
) -> None:
    """Write a model and say where; `options` are those of `export.save` for this layout."""
    from clue_ds.export.layouts import save
    from clue_ds.export.publish import staged
    from clue_ds.model.weights import TIED

    config, state, vocab_file, lower_case, _, about = model
    if is_zip:
        place = place if place.suffix == ".zip" else place.with_name(f"{place.name}.zip")
        with staged(place, force) as archive:
            folder = archive.with_suffix("")
            save(config, state, vocab_file, folder, to, lower_case, finetuned=about, **options)
            archives.pack(folder, archive)
    else:
        save(config, state, vocab_file, place, to, lower_case, force, finetuned=about, **options)
    for note in _unsaid(config, to):
        print(note)
    num_parameters = sum(t.numel() for n, t in state.items() if n not in TIED)
    print(f"wrote {place}: {num_parameters:,} parameters, {config.vocab_size:,} words")


def _unsaid(config: ModelConfig, to: str) -> list[str]:
    """A sentence for each thing about a model that a layout can't say."""
    if to == "uer":
        from clue_ds.export.legacy import uer

        return [uer.NOTE]
    if to != "tf":
        return []
    notes = []
    if config.hidden_act == "gelu":
        notes.append(
            "the model was trained with the erf GELU; results in programs that compute the tanh "
            "form, such as Google's BERT, differ by about 1e-3"
        )
    if config.layer_norm_eps != GOOGLES_EPSILON:
        notes.append(
            f"the model was trained with layer_norm_eps {config.layer_norm_eps:g}; Google's BERT "
            f"always computes with {GOOGLES_EPSILON:g}, so its results differ slightly"
        )
    return notes


def import_model(
    model: tyro.conf.Positional[PathOrName],
    output: Path | None = None,
    layout: Annotated[Literal["hf", "tf"] | None, tyro.conf.arg(name="from")] = None,
    hidden_act: HiddenAct | None = None,
    force: bool = False,
) -> None:
    """Convert a BERT from elsewhere to a directory that clue-ds and transformers load.

    Embedding rows beyond vocab.txt are dropped, because no text ever uses them.

    Args:
        model: a directory or a zip in the layout of Google, Hugging Face or UER, one of several
            TensorFlow checkpoints or .h5 files, the name of a model on the Hugging Face hub
            (clue/roberta_chinese_clue_tiny) or on ModelScope (modelscope:ORG/NAME), or the preset
            that CLUE published under such a name (roberta_tiny_clue).
        output: where to write; default NAME-imported in the current directory.
        layout: which weights to read, hf or tf, where a directory holds both; default the hf ones.
        hidden_act: gelu (erf) or gelu_new (tanh), to override the config; by default a TensorFlow
            config that says gelu means tanh, and a Hugging Face config means what it says.
        force: replace the output if it exists.
    """
    from clue_ds.export import slim
    from clue_ds.export.sources import opened

    if output is None:
        # Not Path.resolve, which fails on a link that leads to itself.
        name = Path(os.path.abspath(model)).name
        output = Path(f"{name.removesuffix('.zip').removesuffix('.h5')}-imported")
    with opened(model, layout) as opened_model:
        before = slim.sizes(opened_model)
        for note in [*opened_model.notes, *_fresh_heads(opened_model)]:
            print(note)
        trimmed = slim.drop_unused_rows(opened_model)
        config = trimmed.config
        if hidden_act is not None:
            config = config.replace(hidden_act=hidden_act)
        after = slim.sizes(trimmed)
        if after != before:
            dropped = before.words - after.words
            print(f"dropped {dropped:,} rows beyond vocab.txt\n{slim.table(before, after)}")
            print(
                "this is right only if these rows are padding: if lines were removed from the "
                "vocabulary, every id after them now means another word; put the lines back as "
                "[unused-a] and so on, and import it again"
            )
        _write(trimmed._replace(config=config), output, "hf", force, is_zip=False)
        quoted = shlex.quote(str(output))
        print(f"hidden_act is {config.hidden_act}; continue pretraining with --model.init {quoted}")
