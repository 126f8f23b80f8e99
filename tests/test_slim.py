"""A smaller model computes the same for every word that it kept; `export` packs it and counts."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from models import SPECIAL, random_model, same_bits, write_vocab

from clue_ds import export
from clue_ds.cli import main
from clue_ds.errors import UserError
from clue_ds.export import slim
from clue_ds.model import BertForPreTraining
from clue_ds.model.weights import load_into, pad_vocab_rows
from clue_ds.presets import ModelConfig

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=16,
)
NUM_UNUSED = 25


@pytest.fixture
def model() -> BertForPreTraining:
    return random_model(CONFIG, 0)


@pytest.fixture
def wide(tmp_path: Path, model: BertForPreTraining) -> Path:
    """Like CLUE's large model: more embedding rows than words."""
    rows = CONFIG.vocab_size + NUM_UNUSED
    long = write_vocab(tmp_path / "long.txt", rows)
    state = pad_vocab_rows(model.state_dict(), rows)
    directory = export.save(CONFIG.replace(vocab_size=rows), state, long, tmp_path / "wide")
    write_vocab(directory / "vocab.txt", CONFIG.vocab_size)
    return directory


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).prediction_logits


def opened(directory: Path) -> BertForPreTraining:
    config, state = export.load(directory)
    model = BertForPreTraining(config).eval()
    assert load_into(model, config, state, directory) == []
    return model


@pytest.mark.parametrize("to", ["hf", "tf"])
def test_trimming_drops_unused_rows_only(
    to: str,
    wide: Path,
    model: BertForPreTraining,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(wide), "--to", to, "--output", str(out)]) == 2
    assert "--trim-vocab" in capsys.readouterr().err
    assert main(["export", str(wide), "--to", to, "--output", str(out), "--trim-vocab"]) == 0
    printed = capsys.readouterr().out.splitlines()
    words, parameters, num_bytes = (line.split() for line in printed[-3:])
    assert words == ["words", "65", "40", "61.5%"]
    dropped = NUM_UNUSED * (CONFIG.hidden_size + 1)
    before, after = (int(n.replace(",", "")) for n in parameters[1:3])
    assert before - after == dropped
    assert int(num_bytes[2].replace(",", "")) == 4 * after
    ids = torch.arange(16)[None]
    assert torch.equal(logits(opened(out), ids), logits(model, ids))


def test_half_the_bytes_and_nearly_the_same_answers(
    wide: Path, model: BertForPreTraining, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["export", str(wide), "--trim-vocab", "--fp16", "--output", str(out)]
    assert main(command) == 0
    stored = safetensors.torch.load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert transformers.BertModel.from_pretrained(out).dtype == torch.float16
    ids = torch.arange(16)[None]
    # 11 bits of mantissa in each weight, logits of size 1 to 10.
    torch.testing.assert_close(logits(opened(out), ids), logits(model, ids), atol=0.05, rtol=0)
    assert main([*command, "--force", "--to", "tf"]) == 2


def test_weight_beyond_fp16_is_refused(
    wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = wide / "model.safetensors"
    state = safetensors.torch.load_file(path)
    state["bert.pooler.dense.bias"][3] = 70_000.0
    safetensors.torch.save_file(state, path)
    out = tmp_path / "out"
    assert main(["export", str(wide), "--trim-vocab", "--fp16", "--output", str(out)]) == 2
    assert "bert.pooler.dense.bias" in capsys.readouterr().err
    assert not out.exists()


def test_without_heads_it_is_an_encoder(
    wide: Path, model: BertForPreTraining, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["--trim-vocab", "--drop-heads", "--output", str(out)]
    assert main(["export", str(wide), *arguments]) == 0
    peer, info = transformers.BertModel.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.arange(16)[None]
    with torch.no_grad():
        found, expected = peer.eval()(ids).last_hidden_state, model.bert(ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def tokens_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split()


def test_rows_move_with_their_tokens(
    wide: Path, model: BertForPreTraining, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tokens_of(wide / "vocab.txt")
    kept = [*reversed(old[5:30:2])]
    pair = kept[0] + "##"  # no token, and not made of tokens
    new = ["[unused]", *kept, *SPECIAL, pair]
    vocab_file = tmp_path / "new.txt"
    vocab_file.write_text("\n".join(new) + "\n", encoding="utf-8")
    out = tmp_path / "out"
    assert main(["export", str(wide), "--vocab", str(vocab_file), "--output", str(out)]) == 0
    assert f"2 tokens of {vocab_file} are new: [unused] {pair}" in capsys.readouterr().out
    config, state = export.load(out)
    assert config.vocab_size == len(new) and config.pad_token_id == new.index("[PAD]")
    before = model.state_dict()
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        for token in set(new) & set(old):
            assert same_bits(state[name][new.index(token)], before[name][old.index(token)])
    # The same text, in the ids of each vocabulary: the same logits for the words of both.
    text = [token for token in kept if token in old]
    here, there = ([words.index(token) for token in text] for words in (new, old))
    found = logits(opened(out), torch.tensor([here]))[..., here]
    expected = logits(model, torch.tensor([there]))[..., there]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_new_token_begins_as_the_mean_of_its_pieces(tmp_path: Path) -> None:
    tokens = [*SPECIAL, "1", "##0", "##2", "好"]
    old = tmp_path / "old.txt"
    old.write_text("\n".join(tokens), encoding="utf-8")
    new = tmp_path / "new.txt"
    new.write_text("\n".join([*SPECIAL, "102", "##20", "2", "好"]), encoding="utf-8")
    config = CONFIG.replace(vocab_size=len(tokens))
    state = random_model(config, 1).state_dict()
    source = export.OpenedModel(config, state, old, True)
    moved, unknown = slim.change_vocab(source, new)
    assert unknown == ["102", "##20", "2"]
    rows = state["bert.embeddings.word_embeddings.weight"]
    found = moved.state_dict["bert.embeddings.word_embeddings.weight"]
    torch.testing.assert_close(found[5], rows[[5, 6, 7]].mean(0))
    torch.testing.assert_close(found[6], rows[[7, 6]].mean(0))
    assert not torch.equal(found[7], rows[5]) and found[7].abs().max() < 10 * 0.02
    again = slim.change_vocab(source, new)[0].state_dict
    assert all(torch.equal(again[n], t) for n, t in moved.state_dict.items())
    new.write_text("\n".join([*SPECIAL, "好", "好"]), encoding="utf-8")
    with pytest.raises(UserError, match="好 more than once"):
        slim.change_vocab(source, new)


@pytest.mark.parametrize("to", ["tf", "hf"])
def test_zip_is_upstreams_download_and_comes_back(
    to: str, wide: Path, model: BertForPreTraining, tmp_path: Path
) -> None:
    archive = tmp_path / "RoBERTa-tiny-clue.zip"
    command = ["export", str(wide), "--to", to, "--trim-vocab", "--zip", "--output", str(archive)]
    assert main(command) == 0
    with zipfile.ZipFile(archive) as file:
        names = sorted(file.namelist())
        assert file.testzip() is None
    if to == "tf":
        checkpoint = [f"bert_model.ckpt.{e}" for e in ("data-00000-of-00001", "index", "meta")]
        assert names == ["bert_config.json", *checkpoint, "vocab.txt"]
    assert main(command) == 2, "an existing file needs --force"
    first = archive.read_bytes()
    assert main([*command, "--force"]) == 0
    assert archive.read_bytes() == first, "the same model gives the same bytes"
    assert main(["import", str(archive), "--output", str(tmp_path / "back")]) == 0
    state = export.load(tmp_path / "back")[1]
    assert all(same_bits(state[name], tensor) for name, tensor in model.state_dict().items())
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "RoBERTa-tiny-clue.zip",
        "back",
        "long.txt",
        "wide",
    ]


def test_all_layouts_at_once(wide: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(wide), "--to", "all", "--trim-vocab", "--output", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(export.LAYOUTS)


def test_two_exports_of_one_model_have_the_same_bytes(wide: Path, tmp_path: Path) -> None:
    command = ["export", str(wide), "--trim-vocab"]
    for to, options in (("hf", ["--legacy"]), ("tf", []), ("onnx", [])):
        folders = [tmp_path / name / to for name in ("one", "two")]
        for folder in folders:
            assert main([*command, "--to", to, *options, "--output", str(folder)]) == 0
        one, two = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders)
        assert one == two
        assert ("pytorch_model.bin" in one) == (to == "hf")


def test_weights_are_stored_once(wide: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(wide), "--trim-vocab", "--output", str(out)]) == 0
    assert not (out / "pytorch_model.bin").exists()
    assert main(["export", str(wide), "--to", "tf", "--legacy", "--output", str(out)]) == 2


@pytest.mark.parametrize("server", ["sentence-transformers", "tei", "vllm"])
def test_directory_for_embedders_is_one_that_they_list(
    server: str, wide: Path, model: BertForPreTraining, tmp_path: Path
) -> None:
    """The form of the published embedders: BertModel, its own names, the pooling written down."""
    out = tmp_path / "out"
    command = ["export", str(wide), "--trim-vocab", "--for", server, "--pooling", "cls"]
    assert main([*command, "--output", str(out)]) == 0
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["BertModel"]
    names = set(safetensors.torch.load_file(out / "model.safetensors"))
    assert "embeddings.word_embeddings.weight" in names
    assert not any(name.startswith(("bert.", "cls.")) for name in names)
    pooling = json.loads((out / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    assert pooling["pooling_mode_cls_token"] and not pooling["pooling_mode_mean_tokens"]
    peer, info = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.arange(16)[None]
    with torch.no_grad():
        found, expected = peer.eval()(ids).last_hidden_state, model.bert(ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert main([*command, "--zip", "--output", str(tmp_path / "out.zip")]) == 0
    with export.opened(tmp_path / "out.zip") as opened_model:
        weights = opened_model.state_dict["bert.pooler.dense.weight"]
        assert same_bits(weights, model.state_dict()["bert.pooler.dense.weight"])
    assert main([*command, "--to", "tf", "--output", str(tmp_path / "tf")]) == 2
