"""BERTs that other programs saved with Keras: .h5 files, and object checkpoints of TensorFlow 2.

Each file of tests/data/keras_models.tar.xz was written by the program that its folder names, from
the weights in `google/`, with what that program computes (`tests/clients/writer.py`).
"""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import same_bits

from clue_ds import export
from clue_ds.cli import main
from clue_ds.config import DataSection, ModelSection, RunConfig
from clue_ds.errors import UserError
from clue_ds.export import sources
from clue_ds.export.tf_files import bundle, object_graph
from clue_ds.model import keras_file
from clue_ds.model.weights import StateDict
from clue_ds.presets import ModelConfig
from clue_ds.pretrain import start_weights

h5py = pytest.importorskip("h5py", reason=".h5 files need the [keras] extra")

POSITIONS = "bert.embeddings.position_embeddings.weight"
# File -> hidden_act of the model, where the config says "gelu".
FILES = {
    "bert4keras/weights.h5": "gelu",
    "bert4keras/whole.h5": "gelu",
    "bert4keras/object": "gelu",
    "bert4keras_keras23/weights.h5": "gelu",
    "keras_bert/weights.h5": "gelu_new",
    "keras_bert/object": "gelu_new",
    "transformers/weights.h5": "gelu",
    "transformers/object": "gelu",
    "transformers/trainer-1": "gelu",
    "transformers/google": "gelu_new",
    "garden/encoder-1": "gelu_new",
    "garden/object": "gelu_new",
}
TOLERANCE = 5e-6  # fp32 in another order of operations; measured 1.6e-6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keras")
    with tarfile.open(Path(__file__).parent / "data" / "keras_models.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def weights(models: Path) -> StateDict:
    return export.load(models / "google")[1]


def theirs(config: ModelConfig, **values: Any) -> transformers.BertConfig:
    names = transformers.BertConfig().to_dict().keys() & vars(config).keys()
    return transformers.BertConfig(**{name: getattr(config, name) for name in names}, **values)


def computed(config: ModelConfig, state: StateDict, inputs: Path) -> dict[str, np.ndarray]:
    """What transformers computes: hidden [B, S, H], and mlm [B, S, V], probabilities."""
    peer = transformers.BertForPreTraining(theirs(config)).eval()
    peer.load_state_dict(state, strict=False)
    values = {name: torch.from_numpy(array) for name, array in np.load(inputs).items()}
    with torch.no_grad():
        found = peer(values["ids"], token_type_ids=values["types"], output_hidden_states=True)
    return {
        "hidden": found.hidden_states[-1].numpy(),
        "mlm": found.prediction_logits.softmax(-1).numpy(),
    }


@pytest.mark.parametrize("file", FILES)
def test_weights_are_those_that_the_program_saved(
    file: str, models: Path, weights: StateDict
) -> None:
    """Every weight bit by bit, and the answers of the program itself."""
    with sources.opened(models / file) as model:
        config, state, notes = model.config, model.state_dict, model.notes
    lacking = set(weights) - set(state)
    # The converter of Model Garden leaves out the heads.
    assert not lacking or (file == "garden/encoder-1" and min(lacking).startswith("cls."))
    for name, tensor in state.items():
        assert same_bits(tensor, weights[name][: len(tensor)]), name
        assert len(tensor) == len(weights[name]) or name == POSITIONS
    # keras-bert was told that texts have at most 12 tokens, which the others need not know.
    assert config.max_position_embeddings == (12 if "keras_bert" in file else 16)
    assert ("the config says 16 positions, but the weights have 12" in notes) == (
        "keras_bert" in file
    )
    assert config.hidden_act == FILES[file] == sources.hidden_act(models / file)
    if file == "transformers/google" or lacking:
        return
    expected = np.load((models / file).parent / "expected.npz")
    for name, found in computed(config, state, models / "inputs.npz").items():
        np.testing.assert_allclose(found, expected[name], atol=TOLERANCE)


@pytest.mark.parametrize("program", ["transformers", "garden"])
def test_classifier_comes_along(program: str, models: Path) -> None:
    with sources.opened(models / program / "classifier") as model:
        config, state, about = model.config, model.state_dict, model.finetuned
    assert about is not None and len(about.labels) == 3
    peer = transformers.BertForSequenceClassification(theirs(config, num_labels=3)).eval()
    peer.load_state_dict(state)
    values = {name: torch.from_numpy(a) for name, a in np.load(models / "inputs.npz").items()}
    with torch.no_grad():
        found = peer(values["ids"], token_type_ids=values["types"]).logits.numpy()
    expected = np.load(models / program / "expected.npz")["logits"]
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_bert4keras_may_have_computed_the_other_gelu(models: Path) -> None:
    with sources.opened(models / "bert4keras" / "weights.h5") as model:
        assert any("set_gelu('tanh')" in note for note in model.notes)
        assert "the weights have the names of bert4keras" in model.notes


def test_pooler_that_no_head_reads_is_left_out(models: Path) -> None:
    """A head of Model Garden has a pooler of its own; the encoder's is an untrained one."""
    with sources.opened(models / "garden" / "object") as model:
        assert any("left out 2 tensors that are not BERT's" in note for note in model.notes)


@pytest.mark.parametrize("form", ["directory", "file", "zip", "--from tf"])
def test_h5_file_is_imported(
    form: str, models: Path, weights: StateDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = models / "bert4keras_keras23"
    given = {"file": source / "weights.h5", "zip": tmp_path / "model.zip"}.get(form, source)
    if form == "zip":
        with zipfile.ZipFile(given, "w") as archive:
            for path in source.iterdir():
                archive.write(path, f"model/{path.name}")
    monkeypatch.chdir(tmp_path)
    options = form.split() if form.startswith("--") else []
    assert main(["import", str(given), *options]) == 0
    name = {"file": "weights-imported", "zip": "model-imported"}
    config, state = export.load(tmp_path / name.get(form, "bert4keras_keras23-imported"))
    assert config.hidden_act == "gelu" and set(state) == set(weights)
    assert all(same_bits(state[name], weights[name]) for name in state)


def test_run_starts_from_an_object_checkpoint(models: Path, tmp_path: Path) -> None:
    section = ModelSection(init=str(models / "keras_bert" / "object"))
    config = RunConfig(run_dir=str(tmp_path / "run"), data=DataSection(corpus="c"), model=section)
    adopted, _ = start_weights.adopt_activation(config)
    assert adopted.model.hidden_act == "gelu_new"


def test_other_object_checkpoint_says_its_names(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = models / "transformers" / "other"
    assert main(["import", str(there), "--output", str(tmp_path / "out")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "is an object checkpoint of TensorFlow 2" in said and "Model Garden: other; load" in said


def test_damage_of_an_object_graph_is_said(models: Path, tmp_path: Path) -> None:
    """Each of 60 flipped bits in the string that holds the graph, and one in the names."""
    prefix = tmp_path / "object"
    for end in (".index", ".data-00000-of-00001"):
        shutil.copy(f"{models / 'keras_bert' / 'object'}{end}", f"{prefix}{end}")
    data = bundle.data_file(prefix)
    whole, entry = data.read_bytes(), bundle.Reader(prefix).entries[object_graph.KEY]
    for at in np.linspace(entry.offset, entry.offset + entry.size - 1, 60).astype(int):
        data.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(UserError, match=r"checksum|is not one string"):
            object_graph.variables(bundle.Reader(prefix))


def test_of_several_h5_files_one_must_be_given(models: Path, tmp_path: Path) -> None:
    there = tmp_path / "two"
    shutil.copytree(models / "bert4keras", there, ignore=shutil.ignore_patterns("object*"))
    with pytest.raises(UserError, match=r"several checkpoints \(weights.h5, whole.h5\).*give one"):
        export.load(there)
    (there / "bert_config.json").unlink()
    with pytest.raises(UserError, match="a checkpoint but no config; copy the model's bert_config"):
        sources.hidden_act(there / "whole.h5")


def test_h5_file_that_is_cut_off_is_said(models: Path, tmp_path: Path) -> None:
    whole = (models / "bert4keras" / "weights.h5").read_bytes()
    (tmp_path / "weights.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"weights.h5 can't be read as the weights of a Keras"):
        keras_file.read(tmp_path / "weights.h5")


def test_file_of_keras_3_is_called_that(tmp_path: Path) -> None:
    """As keras.Model.save_weights("x.weights.h5") of Keras 3 lays it out."""
    with h5py.File(tmp_path / "x.weights.h5", "w") as file:
        file.create_group("layers/dense/vars").create_dataset("0", data=np.zeros((2, 3)))
    with pytest.raises(UserError, match=r"not a file of Keras 2.*holds layers.*Keras 3 counts"):
        keras_file.read(tmp_path / "x.weights.h5")


def test_two_models_in_one_file_are_refused() -> None:
    names = [f"{model}/Embedding-Token/embeddings" for model in ("teacher", "student")]
    names.append("teacher/Transformer-0-MultiHeadSelfAttention/dense/kernel")
    with pytest.raises(UserError, match=r"two variables for .*: teacher/.* and student/"):
        keras_file.renamed(keras_file.BERT4KERAS, names, Path("x.h5"))


def test_gated_layers_of_bert4keras_are_no_bert() -> None:
    block = "Transformer-0-FeedForward"
    names = [f"{block}/dense{end}/kernel" for end in ("", "_1", "_2")]
    assert keras_file.renamed(keras_file.BERT4KERAS, names, Path("x.h5")) == {}
