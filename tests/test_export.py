"""Models that we write load in transformers without a warning; models from elsewhere load here."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from transformers import BertConfig, BertTokenizer

import clue_ds.export as export
from clue_ds.cli import main
from clue_ds.errors import UserError
from clue_ds.model import BertForPreTraining
from clue_ds.model.weights import WEIGHT_FILES, load_pretrained, read_pretrained, tie
from clue_ds.presets import ModelConfig

VOCAB = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"今天气很好a", "##b", "é"]
CONFIG = ModelConfig(
    vocab_size=len(VOCAB),
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=40,
    hidden_act="gelu_new",
    max_position_embeddings=32,
)
TEXTS = ("今天天气[MASK]好", "AB é 好，")


@pytest.fixture
def vocab_file(tmp_path: Path) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def model() -> BertForPreTraining:
    torch.manual_seed(0)
    model = BertForPreTraining(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture
def exported(tmp_path: Path, vocab_file: Path, model: BertForPreTraining) -> Path:
    return export.save(CONFIG, model.state_dict(), vocab_file, tmp_path / "hf")


def logits(model: BertForPreTraining) -> torch.Tensor:
    return model(torch.arange(len(VOCAB))[None]).prediction_logits


# Heads that are in the file and that the class has no place for. transformers reports those for
# every complete BERT, Google's included: leaving them out would make other classes start with
# random heads, which is what must never happen.
UNUSED = {
    "BertModel": ("cls.",),
    "BertForMaskedLM": ("bert.pooler.", "cls.seq_relationship."),
    "AutoModelForMaskedLM": ("bert.pooler.", "cls.seq_relationship."),
    "BertForPreTraining": (),
    "AutoModelForPreTraining": (),
}


@pytest.mark.parametrize("name", UNUSED)
def test_transformers_loads_every_weight_it_has_a_place_for(
    name: str, exported: Path, model: BertForPreTraining, caplog: pytest.LogCaptureFixture
) -> None:
    transformers.logging.enable_propagation()
    with caplog.at_level(logging.INFO):
        peer, info = getattr(transformers, name).from_pretrained(exported, output_loading_info=True)
        tokenizer = BertTokenizer.from_pretrained(exported)
    transformers.logging.disable_propagation()
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert not info["missing_keys"] and not info["mismatched_keys"]
    unused = {n for n in model.state_dict() if n.startswith(UNUSED[name]) and "decoder" not in n}
    assert set(info["unexpected_keys"]) == (unused if UNUSED[name] else set())
    assert bool(warnings) == bool(UNUSED[name])
    assert all("MISSING" not in w and "MISMATCH" not in w for w in warnings)
    ids = torch.arange(len(VOCAB))[None]
    outputs = peer.eval()(ids)
    if name == "BertModel":
        found, expected = outputs.last_hidden_state, model.bert(ids)
    else:
        found = outputs.logits if "Masked" in name else outputs.prediction_logits
        expected = logits(model)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert peer.dtype == torch.float32 and peer.config.hidden_act == "gelu_new"
    assert len(tokenizer) == len(VOCAB) and tokenizer.model_max_length == 32


@pytest.mark.parametrize("lower_case", [True, False])
def test_tokenizer_is_berts_with_the_case_of_the_corpus(
    lower_case: bool, tmp_path: Path, vocab_file: Path, model: BertForPreTraining
) -> None:
    directory = tmp_path / "hf"
    export.save(CONFIG, model.state_dict(), vocab_file, directory, lower_case=lower_case)
    expected = BertTokenizer(dict(zip(VOCAB, range(99), strict=False)), do_lower_case=lower_case)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    for tokenizer in (BertTokenizer.from_pretrained(directory), fast):
        for text in TEXTS:
            assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    assert export.open_model(directory).lower_case is lower_case


def test_file_holds_fp32_and_every_tied_entry_once(
    tmp_path: Path, vocab_file: Path, model: BertForPreTraining
) -> None:
    directory = export.save(CONFIG, model.bfloat16().state_dict(), vocab_file, tmp_path / "hf")
    with safetensors.safe_open(directory / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
        assert {str(file.get_tensor(n).dtype) for n in names} == {"torch.float32"}
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert names == set(model.state_dict()) - tied


@pytest.mark.parametrize("heads", ["all", "none"])
def test_old_format_holds_the_same_weights_with_tied_keys(
    heads: str, tmp_path: Path, vocab_file: Path, model: BertForPreTraining
) -> None:
    """pytorch_model.bin is for readers down to torch 1.4, which can't read zips or tie weights."""
    state = model.state_dict()
    if heads == "none":
        state = {name: tensor for name, tensor in state.items() if name.startswith("bert.")}
    # As the parameters of an engine are: views of one buffer, which must not be written whole.
    buffer = torch.cat([tensor.flatten() for tensor in state.values()])
    sizes = [tensor.numel() for tensor in state.values()]
    views = dict(zip(state, buffer.split(sizes), strict=True))
    state = {name: views[name].view(tensor.shape) for name, tensor in state.items()}
    directory = export.save(CONFIG, tie(state, tmp_path), vocab_file, tmp_path / "hf", legacy=True)
    path = directory / "pytorch_model.bin"
    assert not zipfile.is_zipfile(path)
    found = torch.load(path, weights_only=True)
    assert sorted(found) == sorted(state)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    num_bytes = 4 * sum(tensor.numel() for tensor in model.parameters())
    assert path.stat().st_size < num_bytes + 30_000, "tied tensors are stored once"


def test_files_are_readable_for_whom_the_umask_says(exported: Path) -> None:
    """safetensors 0.8 creates its file with mode 0600, which locks out others on a shared disk."""
    modes = {path.name: path.stat().st_mode & 0o777 for path in exported.iterdir()}
    assert set(modes.values()) == {modes["vocab.txt"]}, modes


def test_card_says_what_is_known_in_both_languages(exported: Path) -> None:
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert "language:\n- zh" in card and "pipeline_tag: fill-mask" in card
    assert "| layers | 2 |" in card and "| 层数 | 2 |" in card
    assert "## Training" not in card, "a model without a run says nothing of one"
    loading = card.split("```python\n")[1].split("```")[0].replace('"hf"', repr(str(exported)))
    names: dict[str, Any] = {}
    exec(loading, names)
    assert len(names["tokenizer"]) == len(VOCAB)
    assert type(names["model"]).__name__ == "BertForPreTraining"


def test_load_returns_what_was_saved(exported: Path, model: BertForPreTraining) -> None:
    config, state = export.load(exported)
    assert config == CONFIG
    assert list(sorted(state)) == sorted(model.state_dict())
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())


def old_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names that wrappers and TensorFlow conversions used in 2019."""
    renamed = {}
    for name, tensor in state.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        renamed["module." + name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    return renamed | {"module.bert.embeddings.position_ids": torch.arange(32)[None]}


def rewrite(directory: Path, layout: str) -> None:
    """Replace model.safetensors by a file with the same weights in another layout."""
    path = directory / "model.safetensors"
    state = safetensors.torch.load_file(path)
    path.unlink()
    if layout == "sharded":
        names = sorted(state)
        halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for shard, half in halves.items():
            safetensors.torch.save_file({n: state[n] for n in half}, directory / shard)
        index = {"weight_map": {n: shard for shard, half in halves.items() for n in half}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    elif layout == "bin":
        torch.save(state, directory / "pytorch_model.bin")
    elif layout == "legacy bin":
        torch.save(
            old_names(state), directory / "pytorch_model.bin", _use_new_zipfile_serialization=False
        )
    elif layout == "half":
        safetensors.torch.save_file({n: t.bfloat16() for n, t in state.items()}, path)


@pytest.mark.parametrize("layout", ["sharded", "bin", "legacy bin", "half"])
def test_every_layout_of_weights_loads(
    layout: str, exported: Path, model: BertForPreTraining
) -> None:
    rewrite(exported, layout)
    _, state = export.load(exported)
    assert sorted(state) == sorted(model.state_dict())
    for name, tensor in model.state_dict().items():
        expected = tensor.bfloat16().float() if layout == "half" else tensor
        assert torch.equal(state[name], expected), name


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
def test_what_transformers_saves_loads_here(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    peer = getattr(transformers, name)(
        BertConfig(**{f: getattr(CONFIG, f) for f in ModelConfig.__dataclass_fields__})
    ).eval()
    peer.save_pretrained(tmp_path / "peer")
    ours = BertForPreTraining(CONFIG, padded_vocab_size=64)
    fresh = {n: t.clone() for n, t in ours.state_dict().items()}
    missing = load_pretrained(ours, tmp_path / "peer")
    expected_missing = {
        "BertModel": [n for n in fresh if n.startswith("cls.") and "decoder" not in n],
        "BertForMaskedLM": [n for n in fresh if "pooler" in n or "seq_relationship" in n],
        "BertForPreTraining": [],
    }[name]
    assert [n for n in missing if "decoder" not in n] == expected_missing
    for entry in expected_missing:
        assert torch.equal(ours.state_dict()[entry], fresh[entry])
    ids = torch.arange(len(VOCAB))[None]
    if name == "BertModel":
        found, expected = ours.eval().bert(ids), peer(ids).last_hidden_state
    else:
        outputs = peer(ids)
        expected = outputs.logits if name == "BertForMaskedLM" else outputs.prediction_logits
        found = ours.eval()(ids).prediction_logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_encoder_without_heads_is_exported_as_one(
    tmp_path: Path, vocab_file: Path, model: BertForPreTraining
) -> None:
    state = {n: t for n, t in model.state_dict().items() if n.startswith("bert.")}
    directory = export.save(CONFIG, state, vocab_file, tmp_path / "hf")
    assert json.loads((directory / "config.json").read_text())["architectures"] == ["BertModel"]
    _, info = transformers.BertModel.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def drop_weight(directory: Path, name: str) -> None:
    state = safetensors.torch.load_file(directory / "model.safetensors")
    del state[name]
    safetensors.torch.save_file(state, directory / "model.safetensors")


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save({"a": Path("x")}, directory / "pytorch_model.bin")


MISTAKES = {
    "no config": (lambda d: (d / "config.json").unlink(), "not a model directory"),
    "config not JSON": (lambda d: truncate(d / "config.json"), "config.json is not valid JSON"),
    "another model": (lambda d: edit_config(d, model_type="gpt2"), "gpt2 model"),
    "another activation": (lambda d: edit_config(d, hidden_act="relu"), "hidden_act 'relu'"),
    "no weights": (lambda d: (d / WEIGHT_FILES[0]).unlink(), "no weights"),
    "truncated": (lambda d: truncate(d / "model.safetensors"), "truncated or damaged"),
    "vocabulary": (lambda d: edit_config(d, vocab_size=99), "vocab_size 99"),
    "shape": (lambda d: edit_config(d, intermediate_size=41), r"intermediate.dense.bias is \("),
    "fewer layers in the file": (lambda d: edit_config(d, num_hidden_layers=3), "lack 16 tensors"),
    "encoder incomplete": (
        lambda d: drop_weight(d, "bert.encoder.layer.1.output.dense.bias"),
        "layer.1.output.dense.bias",
    ),
    "Python objects": (pickled, "never loaded"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_bad_directory_is_an_error_that_says_what_is_wrong(mistake: str, exported: Path) -> None:
    spoil, message = MISTAKES[mistake]
    spoil(exported)
    with pytest.raises(UserError, match=message):
        read_pretrained(exported)


def test_untied_decoder_is_read_but_not_loaded(exported: Path) -> None:
    path = exported / "model.safetensors"
    state = safetensors.torch.load_file(path)
    words = state["bert.embeddings.word_embeddings.weight"]
    safetensors.torch.save_file(state | {"cls.predictions.decoder.weight": words + 1}, path)
    found = read_pretrained(exported)[1]
    assert torch.equal(found["cls.predictions.decoder.weight"], words + 1)
    with pytest.raises(UserError, match="tied decoders only"):
        load_pretrained(BertForPreTraining(CONFIG), exported)


def test_loading_another_network_lists_the_differences(exported: Path) -> None:
    other = BertForPreTraining(CONFIG.replace(num_attention_heads=3, hidden_act="gelu"))
    with pytest.raises(UserError, match="num_attention_heads is 2 there and 3 here.*hidden_act"):
        load_pretrained(other, exported)


def test_save_refuses_what_readers_would_choke_on(
    tmp_path: Path, vocab_file: Path, model: BertForPreTraining
) -> None:
    state = model.state_dict()
    with pytest.raises(UserError, match="layouts: hf, tf, uer, onnx"):
        export.save(CONFIG, state, vocab_file, tmp_path / "out", to="gguf")
    with pytest.raises(UserError, match="14 tokens but the model has 16"):
        export.save(CONFIG.replace(vocab_size=16), state, vocab_file, tmp_path / "out")
    padded = BertForPreTraining(CONFIG, padded_vocab_size=64).state_dict()
    with pytest.raises(UserError, match=r"word_embeddings.weight is \(64, 24\)"):
        export.save(CONFIG, padded, vocab_file, tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        export.save(CONFIG, state, tmp_path / "none.txt", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vocab.txt"]


def test_existing_directory_needs_force_and_must_be_a_model(
    exported: Path, vocab_file: Path, model: BertForPreTraining
) -> None:
    state = model.state_dict()
    (exported / "stale.bin").write_bytes(b"old")
    with pytest.raises(UserError, match="--force"):
        export.save(CONFIG, state, vocab_file, exported)
    export.save(CONFIG, state, vocab_file, exported, force=True)
    assert not (exported / "stale.bin").exists()
    precious = exported.parent / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="not a model directory"):
        export.save(CONFIG, state, vocab_file, precious, force=True)
    assert (precious / "thesis.txt").read_text() == "years"


def test_run_is_exported_with_its_vocabulary_and_case(tmp_path: Path, sample_text: str) -> None:
    """From raw text to a directory that transformers loads, with the commands of a user."""
    (tmp_path / "text.txt").write_text(sample_text, encoding="utf-8")
    shape = "--model.hidden_size 24 --model.num_hidden_layers 1 --model.intermediate_size 40"
    steps = "--train.steps 3 --train.warmup_steps 1 --train.global_batch_size 4"
    for command in (
        "vocab learn text.txt --size 400 --output vocab.txt",
        "shard text.txt --vocab vocab.txt --output corpus --no-lower-case --workers 1",
        f"pretrain --run_dir run --data.corpus corpus --data.seq_length 16 {shape} {steps} "
        "--train.micro_batch_size 4",
        "export run",
    ):
        # Its own process: DeepSpeed keeps global state.
        argv = [sys.executable, "-m", "clue_ds.cli", *command.split()]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
    directory = tmp_path / "run" / "export" / "hf"
    words = (tmp_path / "vocab.txt").read_text(encoding="utf-8")
    assert (directory / "vocab.txt").read_text(encoding="utf-8") == words
    assert not BertTokenizer.from_pretrained(directory).do_lower_case
    card = (directory / "README.md").read_text(encoding="utf-8")
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert "| steps | 3 |" in card and "| 训练步数 | 3 |" in card
    assert f"| MLM loss at the end | {last['loss']:.4f} |" in card
    assert "torch " + torch.__version__.partition("+")[0] in card  # +cu130 in one of them only
    run, exported = export.load(tmp_path / "run"), export.load(directory)
    assert run[0] == exported[0] and run[0].vocab_size == words.count("\n")
    assert all(torch.equal(tensor, exported[1][name]) for name, tensor in run[1].items())
    _, info = transformers.BertForPreTraining.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_verb_exports_and_ends_mistakes_with_status_2(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    assert main(["export", str(exported), "--to", "hf", "--output", str(copy)]) == 0
    assert "14 words" in capsys.readouterr().out
    assert all(
        torch.equal(tensor, export.load(exported)[1][name])
        for name, tensor in export.load(copy)[1].items()
    )
    assert main(["export", str(exported), "--to", "hf", "--output", str(copy)]) == 2
    assert main(["export", str(exported), "--to", "tf9", "--output", str(copy)]) == 2
    assert main(["export", str(tmp_path / "nowhere")]) == 2
    assert "Traceback" not in capsys.readouterr().err
