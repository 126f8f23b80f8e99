"""Checkpoints as other people's training leaves them: many in a folder, wrapped, in UER's names."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import NSP, random_model, same_bits, without, write_vocab

from clue_ds import export
from clue_ds.cli import main
from clue_ds.config import DataSection, ModelSection, RunConfig
from clue_ds.config import save as save_config
from clue_ds.errors import UserError
from clue_ds.export import sources
from clue_ds.export.legacy import uer
from clue_ds.export.tf_files import bundle
from clue_ds.model.weights import StateDict
from clue_ds.presets import ModelConfig
from clue_ds.pretrain import start_weights

CONFIG = ModelConfig(
    vocab_size=30,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=32,
    hidden_act="gelu_new",
)


@pytest.fixture
def vocab_file(tmp_path: Path) -> Path:
    return write_vocab(tmp_path / "vocab.txt", CONFIG.vocab_size)


@pytest.fixture
def states() -> list[StateDict]:
    return [dict(random_model(CONFIG, seed).state_dict()) for seed in (0, 1)]


def same(one: StateDict, other: StateDict) -> bool:
    return sorted(one) == sorted(other) and all(same_bits(one[n], other[n]) for n in one)


@pytest.fixture
def folder(tmp_path: Path, vocab_file: Path, states: list[StateDict]) -> Path:
    """A folder as TensorFlow's trainer leaves it: model.ckpt-0 and model.ckpt-1."""
    target = export.save(CONFIG, states[0], vocab_file, tmp_path / "tf0", to="tf")
    other = export.save(CONFIG, states[1], vocab_file, tmp_path / "tf1", to="tf")
    for number, source in enumerate((target, other)):
        for path in list(source.glob("bert_model.ckpt.*")):
            end = path.name.removeprefix("bert_model.ckpt")
            path.rename(target / f"model.ckpt-{number}{end}")
    return target


def test_checkpoint_names_the_newest_of_several(folder: Path, states: list[StateDict]) -> None:
    with pytest.raises(UserError, match=r"several checkpoints \(model.ckpt-0, model.ckpt-1\)"):
        export.load(folder)
    lines = ['model_checkpoint_path: "/data/of/the/trainer/model.ckpt-0"', ""]
    (folder / "checkpoint").write_text("\n".join(lines), encoding="utf-8")
    assert same(export.load(folder)[1], states[0])


@pytest.mark.parametrize("end", ["", ".index"])
def test_one_of_several_checkpoints_is_given(
    end: str, folder: Path, states: list[StateDict], tmp_path: Path
) -> None:
    given = str(folder / f"model.ckpt-1{end}")
    assert main(["import", given, "--output", str(tmp_path / "out")]) == 0
    assert same(export.load(tmp_path / "out")[1], states[1])


def test_format_v1_is_called_that(folder: Path) -> None:
    for path in folder.glob("model.ckpt-*"):
        path.unlink()
    (folder / "model.ckpt").write_bytes(b"\0" * 100)
    (folder / "model.ckpt.meta").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"model.ckpt is of format V1.*write_version=2"):
        export.load(folder)


def test_moving_averages_are_left_out_and_called_that(folder: Path) -> None:
    prefix = folder / "model.ckpt-0"
    reader = bundle.Reader(prefix)
    tensors = {name: reader.read(name) for name in reader.entries}
    name = "bert/pooler/dense/bias"
    tensors |= {f"{name}/ExponentialMovingAverage": tensors[name] * 2, "other": np.zeros(3)}
    bundle.write(prefix, sorted(tensors.items()))
    with sources.opened(prefix) as model:
        assert any("left out 1 moving averages" in note for note in model.notes)
        assert any("left out 1 tensors that are not BERT's: other" in n for n in model.notes)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_state_dict_beside_an_optimizer_is_found(
    key: str, tmp_path: Path, vocab_file: Path, states: list[StateDict]
) -> None:
    directory = export.save(CONFIG, states[0], vocab_file, tmp_path / "hf")
    (directory / "model.safetensors").unlink()
    content = {"epoch": 3, key: states[0], "optimizer": {"state": {}, "lr": 1e-3}}
    torch.save(content, directory / "pytorch_model.bin")
    assert same(export.load(directory)[1], states[0])


@pytest.mark.parametrize("heads", ["all", "no NSP", "none"])
def test_uer_and_back(
    heads: str, tmp_path: Path, vocab_file: Path, states: list[StateDict]
) -> None:
    state = states[0]
    if heads != "all":
        state = without(state, NSP, "cls." if heads == "none" else NSP)
    directory = export.save(CONFIG, state, vocab_file, tmp_path / "uer", to="uer")
    values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    assert (values["heads_num"], values["layers_num"], values["hidden_act"]) == (3, 2, "gelu_fast")
    stored = torch.load(directory / "model.bin", weights_only=True)
    types = stored["embedding.seg.embedding.weight"]
    assert len(types) == CONFIG.type_vocab_size + 1 and not types[0].any()
    config, found = export.load(directory)
    assert config == CONFIG and same(found, state)
    # The names of before 2022, and a file name like those that UER publishes.
    new = {today: old for old, today in uer.OLD_NAMES.items() if "sp_linear" not in old}
    renamed = {}
    for name, tensor in stored.items():
        begin = next((begin for begin in new if name.startswith(begin)), None)
        renamed[name if begin is None else new[begin] + name.removeprefix(begin)] = tensor
    (directory / "model.bin").unlink()
    torch.save(renamed, directory / "google_zh_model.bin")
    assert same(export.load(directory)[1], state)
    assert main(["import", str(directory), "--output", str(tmp_path / "hf")]) == 0
    assert same(export.load(tmp_path / "hf")[1], state)


def test_weights_of_transformers_tensorflow_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """tf_model.h5, and what TensorFlow computed from it (tests/data/README.md)."""
    pytest.importorskip("h5py", reason="tf_model.h5 needs the [keras] extra")
    there = tmp_path / "there"
    with tarfile.open(Path(__file__).parent / "data" / "tf_model_h5.tar.xz") as archive:
        archive.extractall(there, filter="data")
    write_vocab(there / "vocab.txt", 30)
    assert main(["import", str(there), "--output", str(tmp_path / "ours")]) == 0
    peer, info = transformers.BertForPreTraining.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = np.load(there / "expected.npz")
    with torch.no_grad():
        found = peer.eval()(torch.from_numpy(expected["ids"]))
    for name in ("prediction_logits", "seq_relationship_logits"):
        np.testing.assert_allclose(found[name].numpy(), expected[name], atol=2e-6)
    whole = (there / "tf_model.h5").read_bytes()
    (there / "tf_model.h5").write_bytes(whole[: len(whole) // 2])
    assert main(["import", str(there), "--output", str(tmp_path / "cut")]) == 2
    assert "tf_model.h5 can't be read as the weights of a Keras" in capsys.readouterr().err


def test_uer_layers_and_config_must_agree(tmp_path: Path, vocab_file: Path) -> None:
    state = dict(random_model(CONFIG, 0).state_dict())
    directory = export.save(CONFIG, state, vocab_file, tmp_path / "uer", to="uer")
    values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps(values | {"layers_num": 1}))
    with pytest.raises(UserError, match="has 2 layers, but its config says layers_num 1"):
        export.load(directory)


@pytest.mark.parametrize(
    ("to", "changes", "said"),
    [
        ("tf", {"layer_norm_eps": 1e-5}, "Google's BERT always computes with 1e-12"),
        ("tf", {"hidden_act": "gelu"}, "trained with the erf GELU"),
        ("uer", {}, "UER's LayerNorm"),
        ("hf", {"layer_norm_eps": 1e-5}, None),
    ],
)
def test_what_a_layout_cannot_say_is_told(
    to: str,
    changes: dict[str, Any],
    said: str | None,
    tmp_path: Path,
    vocab_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = CONFIG.replace(**changes)
    state = dict(random_model(config, 0).state_dict())
    model = export.save(config, state, vocab_file, tmp_path / "hf")
    assert main(["export", str(model), "--to", to, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert said in printed if said else "LayerNorm" not in printed and "1e-12" not in printed


def test_uer_has_no_place_for_a_classifier(tmp_path: Path, vocab_file: Path) -> None:
    state = without(dict(random_model(CONFIG, 0).state_dict()), "cls.")
    state |= {"classifier.weight": torch.ones(2, 24), "classifier.bias": torch.ones(2)}
    with pytest.raises(UserError, match="uer has no place for a fine-tuned head"):
        export.save(CONFIG, state, vocab_file, tmp_path / "out", to="uer")


def run_config(init: Path, run_dir: Path, **model: str) -> RunConfig:
    section = ModelSection(init=str(init), **model)  # type: ignore[arg-type]
    return RunConfig(run_dir=str(run_dir), data=DataSection(corpus="c"), model=section)


@pytest.mark.parametrize("to", ["tf", "hf", "uer"])
def test_run_takes_the_activation_of_the_model_that_it_starts_from(
    to: str, tmp_path: Path, vocab_file: Path, states: list[StateDict]
) -> None:
    """`--model.init RoBERTa-tiny-clue.zip` needs no other option, although its GELU is tanh."""
    model = export.save(CONFIG, states[0], vocab_file, tmp_path / "model", to=to)
    config = run_config(model, tmp_path / "run")
    adopted, notes = start_weights.adopt_activation(config)
    assert adopted.model.hidden_act == "gelu_new" and str(model) in notes[0]
    assert adopted.model_copy(update={"model": config.model}) == config
    # What the user set stays.
    told = run_config(model, tmp_path / "run", hidden_act="gelu")
    assert start_weights.adopt_activation(told) == (told, [])
    # A run that is continued needs the model no more.
    (tmp_path / "run").mkdir()
    save_config(adopted, tmp_path / "run" / "config.yaml")
    (model / "vocab.txt").parent.rename(tmp_path / "gone")
    assert start_weights.adopt_activation(config)[0] == adopted


def test_directories_of_finetuning_are_models(
    tmp_path: Path, vocab_file: Path, states: list[StateDict]
) -> None:
    run = tmp_path / "ft" / "tnews" / "seed=42"
    model = export.save(CONFIG, states[0], vocab_file, run / "model")
    (run / "run.json").write_text("{}", encoding="utf-8")
    (run.parent / "best").symlink_to(run.name)
    for place in (run.parent, run.parent / "best", run, model):
        assert same(export.load(place)[1], states[0])
    (run.parent / "seed=43").mkdir()
    (run.parent / "seed=43" / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="without a model.*give .*/best"):
        export.load(run.parent / "seed=43")
