"""Models from elsewhere are read in all their forms; damaged and hostile ones are refused."""

from __future__ import annotations

import builtins
import collections
import json
import os
import pickle
import shutil
import stat
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models import random_model, same_bits, write_vocab

from clue_ds import export
from clue_ds.cli import main
from clue_ds.errors import UserError
from clue_ds.export import archives, sources
from clue_ds.model import BertForPreTraining
from clue_ds.model.weights import StateDict, load_pretrained, pad_vocab_rows
from clue_ds.presets import ModelConfig

CONFIG = ModelConfig(
    vocab_size=30,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=32,
)
BUCKET = 4  # more rows than vocab.txt has lines, as upstream's large model has


@pytest.fixture
def state() -> StateDict:
    return dict(random_model(CONFIG, 0).state_dict())


@pytest.fixture
def vocab_file(tmp_path: Path) -> Path:
    return write_vocab(tmp_path / "vocab.txt", CONFIG.vocab_size)


@pytest.fixture
def tf_directory(tmp_path: Path, state: StateDict, vocab_file: Path) -> Path:
    return export.save(CONFIG, state, vocab_file, tmp_path / "tf", to="tf")


@pytest.fixture
def hf_directory(tmp_path: Path, state: StateDict, vocab_file: Path) -> Path:
    return export.save(CONFIG, state, vocab_file, tmp_path / "hf")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), encoding="utf-8")


def same(one: StateDict, other: StateDict) -> bool:
    return sorted(one) == sorted(other) and all(same_bits(one[n], other[n]) for n in one)


def upstream_config(directory: Path) -> None:
    """Leave only Google's own keys, which is what CLUE's downloads have."""
    path = directory / "bert_config.json"
    ours = {"hidden_act_in_transformers", "layer_norm_eps", "pad_token_id", "do_lower_case"}
    values = {k: v for k, v in json.loads(path.read_text("utf-8")).items() if k not in ours}
    assert len(values) == 11
    path.write_text(json.dumps(values | {"directionality": "bidi"}), encoding="utf-8")


# ------------------------------------------------------------------------------ the import verb


def run_import(*arguments: str | Path) -> int:
    return main(["import", *map(str, arguments)])


@pytest.mark.parametrize("folder", ["", "RoBERTa-tiny-clue/"])
def test_upstream_zip_is_imported(
    folder: str, tf_directory: Path, state: StateDict, tmp_path: Path
) -> None:
    upstream_config(tf_directory)
    archive = tmp_path / "RoBERTa-tiny-clue.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in tf_directory.iterdir():
            file.write(path, folder + path.name)
        file.writestr("__MACOSX/._vocab.txt", b"\0\5\26\7")
    assert run_import(archive, "--output", tmp_path / "out") == 0
    config, found = export.load(tmp_path / "out")
    assert same(found, state)
    # Its "gelu" is TensorFlow's.
    assert config == CONFIG.replace(hidden_act="gelu_new")
    assert load_pretrained(BertForPreTraining(config), tmp_path / "out") == []


def test_imported_activation_can_be_told(tf_directory: Path, tmp_path: Path) -> None:
    upstream_config(tf_directory)
    out = tmp_path / "out"
    assert run_import(tf_directory, "--from", "tf", "--hidden-act", "gelu", "--output", out) == 0
    assert export.load(out)[0].hidden_act == "gelu"


@pytest.mark.parametrize("layout", ["tf", "hf"])
@pytest.mark.parametrize("said", [CONFIG.vocab_size, CONFIG.vocab_size + BUCKET, 7])
def test_config_vocabulary_and_rows_that_disagree(
    layout: str,
    said: int,
    state: StateDict,
    vocab_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """More rows than vocab.txt has lines; the config has one of these numbers, or another one."""
    num_rows = CONFIG.vocab_size + BUCKET
    wide = CONFIG.replace(vocab_size=num_rows)
    source = tmp_path / layout
    long = write_vocab(tmp_path / "long.txt", num_rows)
    export.save(wide, pad_vocab_rows(state, num_rows), long, source, to=layout)
    shutil.copyfile(vocab_file, source / "vocab.txt")
    edit(source / ("config.json" if layout == "hf" else "bert_config.json"), vocab_size=said)
    assert export.load(source)[0].vocab_size == num_rows
    assert run_import(source, "--output", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert f"dropped {BUCKET} rows" in printed
    assert (f"vocab_size {said}" in printed) == (said != num_rows)
    config, found = export.load(tmp_path / "out")
    assert config.vocab_size == CONFIG.vocab_size
    assert same(found, state)


def test_roberta_with_berts_weights_and_vocabulary_is_a_bert(
    hf_directory: Path, state: StateDict, tmp_path: Path
) -> None:
    """CLUE's models on the hub have model_type roberta, BertModel's weights and a vocab.txt."""
    edit(hf_directory / "config.json", model_type="roberta", architectures=["RobertaModel"])
    source = export.open_model(hf_directory)
    assert "roberta" in source.notes[0]
    assert same(source.state_dict, state)
    assert run_import(hf_directory, "--output", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "bert"
    (hf_directory / "vocab.txt").unlink()
    assert "roberta" in export.open_model(hf_directory).notes[0]
    edit(hf_directory / "tokenizer.json", model={"type": "BPE", "vocab": {}})
    with pytest.raises(UserError, match="roberta model"):
        export.open_model(hf_directory)


def test_directory_with_both_layouts_is_read_as_asked(
    hf_directory: Path, tf_directory: Path, state: StateDict
) -> None:
    for path in tf_directory.iterdir():
        shutil.copyfile(path, hf_directory / path.name)
    os.remove(hf_directory / "model.safetensors")
    half = {name: tensor.half() for name, tensor in state.items() if "decoder" not in name}
    safetensors.torch.save_file(half, hf_directory / "model.safetensors")
    assert same(export.open_model(hf_directory, "tf").state_dict, state)
    assert not same(export.open_model(hf_directory, "hf").state_dict, state)


def test_pretraining_starts_from_every_layout(
    hf_directory: Path, tf_directory: Path, tmp_path: Path, vocab_file: Path
) -> None:
    from clue_ds.pretrain import start_weights

    archive = tmp_path / "model.zip"
    archives.pack(tf_directory, archive)
    for where in (hf_directory, tf_directory, archive):
        model = BertForPreTraining(CONFIG, padded_vocab_size=64)
        notes = start_weights.load(model, str(where), vocab_file, True)
        assert notes == [f"starting from the weights in {where}"]
        assert same_bits(
            model.state_dict()["bert.pooler.dense.weight"],
            export.load(hf_directory)[1]["bert.pooler.dense.weight"],
        )
    other = write_vocab(tmp_path / "other.txt", CONFIG.vocab_size + 1)
    with pytest.raises(UserError, match="another vocabulary .*30 tokens there and 31 here"):
        start_weights.load(model, str(archive), other, True)
    with pytest.raises(UserError, match="nowhere is not a directory"):
        start_weights.load(model, "nowhere", vocab_file, True)


def test_unknown_variables_are_named_and_holes_refused(
    tf_directory: Path, state: StateDict, vocab_file: Path, tmp_path: Path
) -> None:
    from clue_ds.export.tf_files import bundle

    prefix = tf_directory / "bert_model.ckpt"
    reader = bundle.Reader(prefix)
    tensors = {name: reader.read(name) for name in reader.entries}
    more = tensors | {"crf/transitions": tensors["bert/pooler/dense/bias"]}
    bundle.write(prefix, sorted(more.items()))
    assert "crf/transitions" in export.open_model(tf_directory).notes[0]
    del tensors["bert/encoder/layer_1/output/dense/bias"]
    bundle.write(prefix, sorted(tensors.items()))
    with pytest.raises(UserError, match=r"layer.1.output.dense.bias"):
        export.open_model(tf_directory)


def test_foreign_tensors_of_a_state_dict_are_named(hf_directory: Path, state: StateDict) -> None:
    path = hf_directory / "model.safetensors"
    stored = safetensors.torch.load_file(path)
    safetensors.torch.save_file(stored | {"another_head.bias": torch.zeros(2)}, path)
    source = export.open_model(hf_directory)
    assert source.notes == ("left out 1 tensors that are not BERT's: another_head.bias",)
    assert same(source.state_dict, state)


@pytest.mark.parametrize("layout", ["hf", "tf"])
def test_layers_that_the_config_does_not_know_are_not_dropped(
    layout: str, hf_directory: Path, tf_directory: Path
) -> None:
    directory = hf_directory if layout == "hf" else tf_directory
    name = "config.json" if layout == "hf" else "bert_config.json"
    edit(directory / name, num_hidden_layers=1)
    with pytest.raises(UserError, match="15 more tensors of an encoder"):
        export.open_model(directory)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("bert_config.json", "no config; copy the model's bert_config.json"),
        ("bert_model.ckpt.index", "bert_model.ckpt.index|no .index"),
        ("bert_model.ckpt.data-00000-of-00001", "data-00000-of-00001 is missing"),
    ],
)
def test_missing_file_of_tensorflows_five_is_named(
    file: str, message: str, tf_directory: Path
) -> None:
    (tf_directory / file).unlink()
    with pytest.raises(UserError, match=message):
        export.open_model(tf_directory)


# ------------------------------------------------------------------------------------- hostile


class Bomb:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


class StateBomb(collections.OrderedDict):  # type: ignore[type-arg]
    """Looks like a state dict until its items are set."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (builtins.exec, (f"open({MARKER!r}, 'w').close()",))


MARKER = "exploded"  # made in the working directory, which is the test's own
CODE = f"open({MARKER!r}, 'w').close()"
BOMBS: dict[str, Callable[[], object]] = {
    "exec": lambda: Bomb(exec, CODE),
    "eval": lambda: Bomb(eval, f"open({MARKER!r}, 'w')"),
    "system": lambda: Bomb(os.system, f"touch {MARKER}"),
    "subprocess": lambda: Bomb(subprocess.call, ["touch", MARKER]),
    "open": lambda: Bomb(open, MARKER, "w"),
    "import": lambda: {"weights": Bomb(__import__("runpy").run_path, "bomb.py")},
    "inside a state dict": lambda: {"bert.pooler.dense.bias": Bomb(exec, CODE)},
    "in place of the state dict": StateBomb,
    "pickle in a pickle": lambda: Bomb(pickle.loads, pickle.dumps(Bomb(exec, CODE))),
    "getattr": lambda: Bomb(Path.touch, Path(MARKER)),
    "mkdir": lambda: Bomb(os.makedirs, MARKER),
}


@pytest.mark.parametrize("is_zip_format", [True, False])
@pytest.mark.parametrize("bomb", BOMBS)
def test_pickle_in_a_download_runs_nothing(
    bomb: str,
    is_zip_format: bool,
    hf_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bomb.py").write_text(CODE)
    (hf_directory / "model.safetensors").unlink()
    path = hf_directory / "pytorch_model.bin"
    torch.save(BOMBS[bomb](), path, _use_new_zipfile_serialization=is_zip_format)
    with pytest.raises(UserError, match="pytorch_model.bin holds Python objects"):
        export.open_model(hf_directory)
    assert not Path(MARKER).exists()
    # The bomb is live: whoever unpickles it does make the marker.
    torch.load(path, weights_only=False)
    assert Path(MARKER).exists()


def test_plain_pickle_runs_nothing(
    hf_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (hf_directory / "model.safetensors").unlink()
    (hf_directory / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(exec, CODE), 2))
    with pytest.raises(UserError, match="pytorch_model.bin"):
        export.open_model(hf_directory)
    assert not Path(MARKER).exists()


def link(name: str, target: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    info.comment = target.encode()
    return info


SLIPS: dict[str, str | zipfile.ZipInfo] = {
    "parent": "../escaped",
    "parent inside": "model/../../escaped",
    "absolute": "/tmp/clue_ds_escaped",
    "backslash": "..\\escaped",
    "drive": "C:/escaped",
    "link": link("model", "/tmp"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_zip_never_leaves_its_folder(slip: str, tf_directory: Path, tmp_path: Path) -> None:
    archive = tmp_path / "deep" / "evil.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        for path in tf_directory.iterdir():
            file.write(path, path.name)
        file.writestr(SLIPS[slip], b"/tmp")
    with pytest.raises(UserError, match="evil.zip holds .*nothing was unpacked"):
        with sources.opened(archive):
            pass
    assert not list(tmp_path.rglob("*escaped*"))
    assert not Path("/tmp/clue_ds_escaped").exists()


def test_zip_larger_than_the_disk_is_refused(
    tf_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zip bomb declares its size; if the size is false, zipfile stops at the declared one."""
    archives.pack(tf_directory, tmp_path / "bomb.zip")
    usage = collections.namedtuple("usage", "total used free")(9999, 0, 9999)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="bomb.zip unpacks to .* 9,999 free"):
        with sources.opened(tmp_path / "bomb.zip"):
            pass


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_truncated_zip_is_one_message(part: float, tf_directory: Path, tmp_path: Path) -> None:
    archive = tmp_path / "model.zip"
    archives.pack(tf_directory, archive)
    data = archive.read_bytes()
    archive.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(UserError, match="model.zip is (not a zip, or is|empty.*) truncated"):
        with sources.opened(archive):
            pass


def test_damaged_member_of_a_zip_is_one_message(tf_directory: Path, tmp_path: Path) -> None:
    archive = tmp_path / "model.zip"
    archives.pack(tf_directory, archive)
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 0xFF
    archive.write_bytes(data)
    with pytest.raises(UserError, match="model.zip"), sources.opened(archive):
        pass


def test_zip_without_a_model(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("readme.txt", "hello")
    with (
        pytest.raises(UserError, match="no vocab.txt and no tokenizer.json"),
        sources.opened(tmp_path / "x.zip"),
    ):
        pass


def test_failed_export_leaves_what_was_there(
    tf_directory: Path, state: StateDict, vocab_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clue_ds.export import tensorflow

    before = {path.name: path.read_bytes() for path in tf_directory.iterdir()}

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorflow, "copy_vocab", full_disk)
    with pytest.raises(UserError, match="No space left"):
        export.save(CONFIG, state, vocab_file, tf_directory, to="tf", force=True)
    assert {path.name: path.read_bytes() for path in tf_directory.iterdir()} == before
    assert sorted(p.name for p in tf_directory.parent.iterdir()) == ["tf", "vocab.txt"]
    with pytest.raises(UserError, match="--force"):
        export.save(CONFIG, state, vocab_file, tf_directory, to="tf")
