"""Models as people have them on their disks: wrapped, incomplete, damaged, hostile."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models import TINY_CONFIG, random_model, same_bits, write_vocab

from clue_ds import export
from clue_ds.cli import main
from clue_ds.errors import UserError
from clue_ds.export import archives, sources
from clue_ds.model import BertForPreTraining, config_json
from clue_ds.model.weights import StateDict
from clue_ds.pretrain import start_weights
from clue_ds.tasks import Predictor

FEED_FORWARD = "bert.encoder.layer.0.output.dense.weight"


@pytest.fixture(scope="module")
def state() -> StateDict:
    return dict(random_model(TINY_CONFIG, 0).state_dict())


@pytest.fixture
def vocab_file(tmp_path: Path) -> Path:
    return write_vocab(tmp_path / "vocab.txt", TINY_CONFIG.vocab_size)


@pytest.fixture
def directory(tmp_path: Path, state: StateDict, vocab_file: Path) -> Path:
    return export.save(TINY_CONFIG, state, vocab_file, tmp_path / "hf")


def stored(directory: Path) -> StateDict:
    return safetensors.torch.load_file(directory / "model.safetensors")


def store(directory: Path, state: StateDict) -> Path:
    safetensors.torch.save_file(state, directory / "model.safetensors")
    return directory


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), encoding="utf-8")


# -------------------------------------------------------------------------- names and vocabularies


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda n: f"module.{n}", "removed module."),
        (lambda n: f"_orig_mod.module.{n}", "removed _orig_mod., module."),
        (lambda n: f"module._orig_mod.model.{n}", "removed _orig_mod., module., model."),
        (lambda n: n.replace("layer.0.", "layer.0._orig_mod."), "removed _orig_mod."),
        (lambda n: f"0.auto_model.{n.removeprefix('bert.')}", "removed 0., auto_model."),
    ],
)
def test_wrappers_are_removed_from_names_and_reported(
    wrap: Callable[[str], str], said: str, directory: Path, state: StateDict
) -> None:
    store(directory, {wrap(name): tensor for name, tensor in stored(directory).items()})
    opened = export.open_model(directory)
    assert opened.notes[0].startswith(said)
    assert all(same_bits(opened.state_dict[n], t) for n, t in state.items() if "bert." in n)


def test_names_that_are_unclear_are_refused(directory: Path) -> None:
    tensors = stored(directory)
    store(directory, {f"roberta.{name}": tensor for name, tensor in tensors.items()})
    with pytest.raises(UserError, match="its name there is roberta.bert.embeddings.word"):
        export.open_model(directory)
    both = {f"{who}.{n}": t.clone() for n, t in tensors.items() for who in ("module", "model")}
    store(directory, both)
    with pytest.raises(UserError, match="word embeddings of 2 models"):
        export.open_model(directory)
    name = "bert.pooler.dense.bias"
    store(directory, tensors | {f"_orig_mod.{name}": tensors[name].clone()})
    with pytest.raises(UserError, match=f"two tensors are called {name}"):
        export.open_model(directory)


def without_vocab_text(directory: Path) -> Path:
    (directory / "vocab.txt").unlink()
    return directory


def test_vocabulary_in_tokenizer_json_only(
    directory: Path, state: StateDict, vocab_file: Path, tmp_path: Path
) -> None:
    """What save_pretrained of transformers 5 writes, read by every verb that opens a model."""
    without_vocab_text(directory)
    assert main(["import", str(directory), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == vocab_file.read_bytes()
    assert main(["export", str(directory), "--to", "tf", "--output", str(tmp_path / "tf")]) == 0
    assert (tmp_path / "tf" / "vocab.txt").read_bytes() == vocab_file.read_bytes()
    archives.pack(directory, tmp_path / "model.zip")
    for where in (directory, tmp_path / "model.zip"):
        model = BertForPreTraining(TINY_CONFIG)
        assert len(start_weights.load(model, str(where), vocab_file, True)) == 1
        assert same_bits(model.state_dict()[FEED_FORWARD], state[FEED_FORWARD])
    assert len(Predictor(directory).fill_mask("一[MASK]", top_k=2)[0]) == 2


def test_start_needs_the_words_of_the_corpus(
    directory: Path, vocab_file: Path, tmp_path: Path
) -> None:
    """Found as a run that started, without a word, from a model with a permuted vocabulary."""
    model = BertForPreTraining(TINY_CONFIG)
    lines = vocab_file.read_text("utf-8").splitlines()
    permuted = tmp_path / "permuted.txt"
    permuted.write_text("\n".join([*lines[:5], *lines[:4:-1]]) + "\n", encoding="utf-8")
    for vocab in ("vocab.txt", "tokenizer.json"):
        with pytest.raises(UserError, match="another vocabulary than the corpus .*id 5 is"):
            start_weights.load(model, str(directory), permuted, True)
        (directory / vocab).unlink()
    with pytest.raises(UserError, match="no vocab.txt and no tokenizer.json"):
        start_weights.load(model, str(directory), vocab_file, True)


def test_removed_line_is_not_taken_for_padding(directory: Path, tmp_path: Path) -> None:
    """29 tokens for 30 rows: a line was removed, and the ids after it mean other rows."""
    lines = (directory / "vocab.txt").read_text("utf-8").splitlines()
    short = "\n".join([*lines[:7], *lines[8:]]) + "\n"
    (directory / "vocab.txt").write_text(short, encoding="utf-8")
    model = BertForPreTraining(TINY_CONFIG.replace(vocab_size=29))
    with pytest.raises(UserError, match="30 words but .* 29 tokens.*put them back"):
        start_weights.load(model, str(directory), directory / "vocab.txt", True)


@pytest.mark.parametrize("lower_case", [True, False])
def test_other_case_is_a_note(lower_case: bool, directory: Path, vocab_file: Path) -> None:
    edit(directory / "tokenizer_config.json", do_lower_case=not lower_case)
    model = BertForPreTraining(TINY_CONFIG)
    notes = start_weights.load(model, str(directory), vocab_file, lower_case)
    assert ("keeps case and accents, but the corpus was" in notes[1]) == lower_case
    assert ("lower-cased text, but the corpus keeps" in notes[1]) != lower_case


# ------------------------------------------------------------------------- missing and bad weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layout", ["hf", "tf"])
def test_weights_that_are_not_finite_are_named(
    value: float, layout: str, directory: Path, state: StateDict, tmp_path: Path
) -> None:
    if layout == "tf":
        from clue_ds.export.tf_files import bundle

        directory = export.save(TINY_CONFIG, state, directory / "vocab.txt", tmp_path / "t", "tf")
        reader = bundle.Reader(directory / "bert_model.ckpt")
        tensors = {name: reader.read(name) for name in reader.entries}
        tensors["bert/encoder/layer_0/output/dense/kernel"][1, 2] = value
        bundle.write(directory / "bert_model.ckpt", sorted(tensors.items()))
    else:
        tensors = stored(directory)
        tensors[FEED_FORWARD][1, 2] = value
        store(directory, tensors)
    with pytest.raises(UserError, match=f"1 tensors hold NaN or infinite weights: {FEED_FORWARD}"):
        export.open_model(directory)


def test_quantized_weights_are_refused(directory: Path) -> None:
    tensors = stored(directory)
    store(directory, tensors | {FEED_FORWARD: tensors[FEED_FORWARD].to(torch.int8)})
    with pytest.raises(UserError, match=r"such as .*output.dense.weight \(torch.int8\)"):
        export.open_model(directory)


def test_incomplete_heads_are_refused_and_absent_ones_said(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = stored(directory)
    store(directory, {n: t for n, t in tensors.items() if ".transform." not in n})
    with pytest.raises(UserError, match=r"incomplete one \(it lacks cls.predictions.transform"):
        Predictor(directory).fill_mask("[MASK]")
    assert Predictor(directory).embed(["一"]).shape == (1, TINY_CONFIG.hidden_size)
    out = str(tmp_path / "out")
    assert main(["export", str(directory), "--output", out]) == 2
    assert "the MLM head lacks cls.predictions.transform" in capsys.readouterr().err
    assert main(["export", str(directory), "--output", out, "--drop-heads"]) == 0
    store(directory, {n: t for n, t in tensors.items() if "pooler" not in n})
    assert main(["export", str(directory), "--output", out, "--force"]) == 0
    assert "the model has no pooler (bert.pooler.dense.weight" in capsys.readouterr().out


@pytest.mark.parametrize("lost", ["bert.pooler.dense.bias", "classifier.bias"])
def test_classifier_without_all_its_weights_is_refused(lost: str, directory: Path) -> None:
    head = {"classifier.weight": torch.ones(2, 24), "classifier.bias": torch.ones(2)}
    tensors = {n: t for n, t in (stored(directory) | head).items() if n != lost}
    store(directory, tensors)
    with pytest.raises(UserError, match=f"a classifier but no {lost}"):
        Predictor(directory)


# ------------------------------------------------------------------------------------ damaged files


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
PAGE = b"\n<!DOCTYPE html>\n<html><body>Please log in</body></html>"
PLACEHOLDERS = {"empty": (b"", "is empty"), "lfs": (LFS, "git lfs pull"), "html": (PAGE, "a web")}
HF_FILES = ("config.json", "model.safetensors", "pytorch_model.bin", "tokenizer_config.json")
TF_FILES = ("bert_config.json", "bert_model.ckpt.index")


@pytest.mark.parametrize("kind", PLACEHOLDERS)
@pytest.mark.parametrize("name", [*HF_FILES, *TF_FILES, "vocab.txt", "model.zip"])
def test_placeholder_of_a_download_is_recognised(
    name: str, kind: str, directory: Path, state: StateDict, tmp_path: Path
) -> None:
    content, message = PLACEHOLDERS[kind]
    if name in TF_FILES:
        directory = export.save(TINY_CONFIG, state, directory / "vocab.txt", tmp_path / "t", "tf")
    if name == "pytorch_model.bin":
        (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(content)
    where = directory / name if name == "model.zip" else directory
    out = tmp_path / "out"
    with pytest.raises(UserError, match=f"{name} is .*{message}|{name} .*{message}"):
        with sources.opened(where) as source:
            export.save(*source[:3], out)
    assert not out.exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.txt"])
@pytest.mark.parametrize("target", ["nowhere", ""])
def test_links_that_lead_nowhere_are_named(
    name: str, target: str, directory: Path, tmp_path: Path
) -> None:
    """A copied cache of the hub has links without their files; "" is a link to itself."""
    (directory / name).unlink()
    (directory / name).symlink_to(target or name)
    with pytest.raises(UserError, match=f"{name} is a symbolic link to {target or name}"):
        export.save(*export.open_model(directory)[:3], tmp_path / "out")


def test_link_to_itself_as_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert main(["import", str(tmp_path / "loop")]) == 2
    assert "loop is not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ("hidden_size", "vocab_size") for value in ("24", 24.0, True)),
        *(("num_hidden_layers", value) for value in (0, -1, 10**9, [1], {})),
        *(("layer_norm_eps", value) for value in ("1e-12", -1, float("nan"))),
        *(("hidden_dropout_prob", value) for value in (2, None.__class__.__name__)),
        *(("num_attention_heads", value) for value in (0, 7)),
        ("hidden_act", ["gelu"]),
        ("pad_token_id", "0"),
        ("id2label", ["a", "b"]),
        ("finetuning_task", 3),
    ],
)
def test_config_of_other_types_is_one_message(key: str, value: Any, directory: Path) -> None:
    edit(directory / "config.json", **{key: value})
    with pytest.raises(UserError, match=f"config.json: (hidden_size .*)?{key}"):
        config_json.read_config(directory)


def test_json_may_have_a_byte_order_mark(directory: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        path = directory / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert export.open_model(directory).config == TINY_CONFIG
    (directory / "config.json").write_bytes(b'{\n"a": 1,\n}')
    with pytest.raises(UserError, match="config.json is not valid JSON: .*line 3"):
        export.open_model(directory)
    (directory / "config.json").write_bytes(b'{\n"a": "\xff"}')
    with pytest.raises(UserError, match=r"config.json is not UTF-8 at byte 8 \(line 2\)"):
        export.open_model(directory)
    (directory / "config.json").write_bytes(b"[" * 100_000)
    with pytest.raises(UserError, match="config.json is not valid JSON: it is nested too deeply"):
        export.open_model(directory)


# ------------------------------------------------------------------------------------------ hostile


class Bomb:
    """Makes the file `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def fake_run(folder: Path, bomb: Bomb) -> Path:
    """A directory laid out like a run of ours, with a manifest that fits its pickles."""
    from clue_ds import files

    step = folder / "checkpoints" / "step-00000001"
    (step / "deepspeed").mkdir(parents=True)
    torch.save({"module": bomb}, step / "deepspeed" / "mp_rank_00_model_states.pt")
    write_vocab(step / "vocab.txt", TINY_CONFIG.vocab_size)
    contents = {
        path.relative_to(step).as_posix(): {
            "size": path.stat().st_size,
            "sha256": files.sha256(path),
        }
        for path in step.rglob("*")
        if path.is_file()
    }
    manifest = {
        **{"format": 1, "step": 1, "samples": 1, "world_size": 1, "zero_stage": 0},
        **{"offload": False, "precision": "fp32", "config": {}, "model": {}, "vocab_sha256": ""},
        **{"corpus_fingerprint": "", "group_names": [], "versions": {}, "files": contents},
    }
    (step / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("top", ["run", "checkpoint"])
def test_archive_is_never_a_run(
    top: str, tmp_path: Path, vocab_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found as code in a download that ran: its manifest's hashes are its author's own."""
    marker = tmp_path / "exploded"
    folder = fake_run(tmp_path / "evil", Bomb(marker))
    archive = tmp_path / "evil.zip"
    with zipfile.ZipFile(archive, "w") as file:
        root = folder if top == "run" else folder / "checkpoints" / "step-00000001"
        for path in root.rglob("*"):
            file.write(path, path.relative_to(root))
    for argv in (["import", archive], ["export", archive, "--output", "out"]):
        assert main(list(map(str, argv))) == 2
        assert "A run or checkpoint is read only from a local" in capsys.readouterr().err
    with pytest.raises(UserError, match="only from a local directory"):
        start_weights.load(BertForPreTraining(TINY_CONFIG), str(archive), vocab_file, True)
    with pytest.raises(UserError, match="only from a local directory"):
        sources._open_download(folder, None, "owner/name")
    assert not marker.exists()


@pytest.mark.parametrize("layout", ["hf", "tf"])
@pytest.mark.parametrize("packed", [False, True])
def test_bomb_in_any_file_of_a_model_runs_nothing(
    layout: str, packed: bool, directory: Path, state: StateDict, tmp_path: Path
) -> None:
    """Every file of a model in turn is a pickle, and pickles lie beside them under usual names."""
    marker = tmp_path / "exploded"
    if layout == "tf":
        directory = export.save(TINY_CONFIG, state, directory / "vocab.txt", tmp_path / "t", "tf")
    bombs = [pickle.dumps(Bomb(marker), protocol) for protocol in (0, 2, 4)]
    names = [path.name for path in directory.iterdir()]
    beside = ("optimizer.pt", "training_args.bin", "tf_model.h5", "bert.npz", "manifest.json")
    for name in (*names, *beside, "pytorch_model.bin.index.json", "model.safetensors.index.json"):
        for bomb in bombs:
            spoiled = tmp_path / "spoiled"
            shutil.copytree(directory, spoiled)
            (spoiled / name).write_bytes(bomb)
            if "model.bin" in name or "index.json" in name:
                (spoiled / "model.safetensors").unlink(missing_ok=True)
            where = tmp_path / "spoiled.zip" if packed else spoiled
            if packed:
                archives.pack(spoiled, where)
            try:
                with sources.opened(where) as source:
                    export.save(*source[:3], tmp_path / "out", force=True)
            except UserError as error:
                assert name in str(error) or "spoiled" in str(error)
            assert not marker.exists(), name
            shutil.rmtree(spoiled)
    pickle.loads(bombs[0])  # the bomb is live
    assert marker.exists()


@pytest.mark.parametrize("shard", ["../secret.bin", "/etc/passwd", "a/b.bin", "", 7, None])
def test_index_names_only_files_of_its_directory(shard: Any, directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save({FEED_FORWARD: torch.zeros(1)}, directory.parent / "secret.bin")
    index = directory / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"bert.pooler.dense.bias": shard}}))
    with pytest.raises(UserError, match=r"index.json names (no weight files|.*not a file of its)"):
        export.open_model(directory)


def test_tensor_larger_than_its_file_is_refused(directory: Path) -> None:
    """An expanded tensor takes no space in a file, and terabytes in memory."""
    (directory / "model.safetensors").unlink()
    tensors = {FEED_FORWARD: torch.zeros(1).expand(1 << 40)}
    torch.save(tensors, directory / "pytorch_model.bin")
    with pytest.raises(UserError, match=f"{FEED_FORWARD} is not an ordinary dense tensor"):
        export.open_model(directory)


def test_zip_bomb_is_refused_before_it_is_unpacked(directory: Path, tmp_path: Path) -> None:
    archive = tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in directory.iterdir():
            file.write(path, path.name)
        with file.open("zeros", "w") as member:
            for _ in range(65):
                member.write(bytes(1 << 20))
    with pytest.raises(UserError, match="would unpack to 68.* a zip bomb .*nothing was unpacked"):
        with sources.opened(archive):
            pass


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("MOST_BYTES", r"would unpack to .*nothing was unpacked"),
        ("MOST_MEMBERS", "files, and a model has at most 2"),
    ],
)
def test_zips_that_are_too_large_are_refused(
    limit: str, message: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archives.pack(directory, tmp_path / "model.zip")
    monkeypatch.setattr(archives, limit, 2)
    with pytest.raises(UserError, match=message), sources.opened(tmp_path / "model.zip"):
        pass


def test_card_ignores_a_manifest_of_others(directory: Path, tmp_path: Path) -> None:
    for content in ('{"config": 3}', "[]", '{"config": {"train": {}, "data": {"corpus": "/"}}}'):
        (directory / "manifest.json").write_text(content)
        out = export.save(*export.open_model(directory)[:3], tmp_path / "out", force=True)
        assert "## Training" not in (out / "README.md").read_text("utf-8")
