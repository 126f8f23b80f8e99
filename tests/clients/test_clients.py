"""Other people's TensorFlow code reads our export and computes what Hugging Face's does.

`make test-clients` runs it: the readers live in an environment of their own, whose Python is in
CLIENTS_PYTHON. Everything that a mistake in names, order or transposes could do must show: six such
mistakes are made on purpose.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import transformers
from models import random_model, write_vocab

from clue_ds import export
from clue_ds.export.tf_files import bundle
from clue_ds.export.tf_files.bundle import data_file, index_file
from clue_ds.presets import ModelConfig

CONFIG = ModelConfig(
    vocab_size=120,
    hidden_size=48,
    num_hidden_layers=11,  # layer_10 sorts before layer_2
    num_attention_heads=4,
    intermediate_size=96,
    hidden_act="gelu_new",
    max_position_embeddings=24,
)
READERS = ("bert4keras", "keras_bert")
TOLERANCE = 1e-4  # fp32 through 11 layers in another order of operations; measured 1e-5
Tensors = dict[str, np.ndarray]


def swap(one: str, other: str) -> Callable[[Tensors], None]:
    def corrupt(tensors: Tensors) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return corrupt


def transpose(name: str) -> Callable[[Tensors], None]:
    def corrupt(tensors: Tensors) -> None:
        tensors[name] = tensors[name].T

    return corrupt


def reverse(name: str) -> Callable[[Tensors], None]:
    def corrupt(tensors: Tensors) -> None:
        tensors[name] = tensors[name][::-1]

    return corrupt


LAYER = "bert/encoder/layer_{}"
CORRUPTIONS: dict[str, Callable[[Tensors], None]] = {
    "query_for_key": swap(
        *(f"{LAYER.format(1)}/attention/self/{n}/kernel" for n in ("query", "key"))
    ),
    "no_transpose": transpose(f"{LAYER.format(0)}/attention/output/dense/kernel"),
    "gamma_for_beta": swap(*(f"{LAYER.format(3)}/output/LayerNorm/{n}" for n in ("gamma", "beta"))),
    "layer_10_for_2": swap(*(f"{LAYER.format(n)}/intermediate/dense/kernel" for n in (10, 2))),
    "types_reversed": reverse("bert/embeddings/token_type_embeddings"),
    "mlm_bias_reversed": reverse("cls/predictions/output_bias"),
}


class Case(NamedTuple):
    good: Path
    outputs: Path  # of the readers: outputs/READER/NAME.npz
    expected: Tensors


def run_reader(reader: str, inputs: Path, output: Path, *directories: Path) -> None:
    python = os.environ.get("CLIENTS_PYTHON")
    if not python:
        pytest.fail("CLIENTS_PYTHON is not set; run these with `make test-clients`")
    output.mkdir(parents=True)
    script = Path(__file__).with_name("reader.py")
    command = [str(Path(python).absolute()), script, reader, inputs, output, *directories]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]


def corrupted(good: Path, corrupt: Callable[[Tensors], None], directory: Path) -> Path:
    directory.mkdir()
    for name in ("bert_config.json", "vocab.txt"):
        (directory / name).write_bytes((good / name).read_bytes())
    reader = bundle.Reader(good / "bert_model.ckpt")
    tensors = {name: reader.read(name) for name in reader.entries}
    corrupt(tensors)
    bundle.write(directory / "bert_model.ckpt", tensors.items())
    return directory


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("clients")
    state = random_model(CONFIG, 0).state_dict()
    vocab_file = write_vocab(folder / "vocab.txt", CONFIG.vocab_size)
    good = export.save(CONFIG, state, vocab_file, folder / "good", to="tf")
    hf = export.save(CONFIG, state, vocab_file, folder / "hf", to="hf")
    rng = np.random.default_rng(0)
    ids = rng.integers(5, CONFIG.vocab_size, (3, CONFIG.max_position_embeddings))
    types = (np.arange(CONFIG.max_position_embeddings) > 9)[None].repeat(3, 0).astype(np.int64)
    np.savez(folder / "inputs.npz", ids=ids, types=types)
    peer = transformers.BertForPreTraining.from_pretrained(hf).eval()
    with torch.no_grad():
        found = peer(
            torch.from_numpy(ids),
            token_type_ids=torch.from_numpy(types),
            output_hidden_states=True,
        )
    expected = {
        "hidden": found.hidden_states[-1].numpy(),
        "mlm": found.prediction_logits.softmax(-1).numpy(),
    }
    bad = [corrupted(good, corrupt, folder / name) for name, corrupt in CORRUPTIONS.items()]
    for reader in READERS:
        run_reader(reader, folder / "inputs.npz", folder / "out" / reader, good, *bad)
    run_reader("saver", folder / "inputs.npz", folder / "out" / "saver", good)
    return Case(good, folder / "out", expected)


def largest_difference(case: Case, reader: str, name: str) -> float:
    found = np.load(case.outputs / reader / f"{name}.npz")
    return max(float(np.abs(found[key] - case.expected[key]).max()) for key in case.expected)


@pytest.mark.parametrize("reader", READERS)
def test_reader_computes_what_hugging_face_does(reader: str, case: Case) -> None:
    difference = largest_difference(case, reader, "good")
    print(f"{reader}: largest difference {difference:.1e}")
    assert difference <= TOLERANCE


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("reader", READERS)
def test_every_mistake_would_show(reader: str, corruption: str, case: Case) -> None:
    assert largest_difference(case, reader, corruption) > 10 * TOLERANCE


@pytest.mark.parametrize("file", [index_file, data_file])
def test_saver_writes_the_same_bytes(file: Callable[[Path], Path], case: Case) -> None:
    theirs = case.outputs / "saver" / "good" / "bert_model.ckpt"
    assert file(theirs).read_bytes() == file(case.good / "bert_model.ckpt").read_bytes()


def test_object_checkpoint_of_tensorflow_2_is_read(case: Case) -> None:
    reader = bundle.Reader(case.outputs / "saver" / "good" / "object")
    assert reader.read("a/.ATTRIBUTES/VARIABLE_VALUE").tolist() == [1.0, 2.5]
