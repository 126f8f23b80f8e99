"""Other people's programs save a model with Keras, and we read every weight of it.

`make test-clients` runs it. `tests/test_keras_file.py` has the same for files that were saved
earlier, by Model Garden and by bert4keras on Keras 2.3 too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from models import random_model, same_bits, write_vocab

from clue_ds import export
from clue_ds.export import sources
from clue_ds.presets import ModelConfig

CONFIG = ModelConfig(
    vocab_size=120,
    hidden_size=48,
    num_hidden_layers=11,  # layer_10 sorts before layer_2
    num_attention_heads=4,
    intermediate_size=96,
    hidden_act="gelu",
    max_position_embeddings=24,
)
FILES = {
    "bert4keras": ("weights.h5", "whole.h5", "object"),
    "keras_bert": ("weights.h5", "whole.h5", "object"),
    "transformers": ("weights.h5", "object", "trainer-1", "google"),
}


@pytest.mark.parametrize("program", FILES)
def test_saved_weights_are_ours_bit_by_bit(program: str, tmp_path: Path) -> None:
    python = os.environ.get("CLIENTS_PYTHON")
    peers = os.environ.get("TRANSFORMERS4_PYTHON")
    if not python or not peers:
        pytest.fail("CLIENTS_PYTHON or TRANSFORMERS4_PYTHON is not set; run `make test-clients`")
    state = random_model(CONFIG, 0).state_dict()
    vocab_file = write_vocab(tmp_path / "vocab.txt", CONFIG.vocab_size)
    google = export.save(CONFIG, state, vocab_file, tmp_path / "google", to="tf")
    hf = export.save(CONFIG, state, vocab_file, tmp_path / "hf", legacy=True)
    (hf / "model.safetensors").unlink()
    ids = np.random.default_rng(0).integers(5, CONFIG.vocab_size, (2, 24))
    np.savez(tmp_path / "inputs.npz", ids=ids, types=np.zeros_like(ids))
    packages = next(Path(peers).absolute().parents[1].glob("lib/python*/site-packages"))
    script, output = Path(__file__).with_name("writer.py"), tmp_path / "out"
    done = subprocess.run(
        [
            str(Path(python).absolute()),
            script,
            program,
            google,
            hf,
            tmp_path / "inputs.npz",
            output,
        ],
        env=os.environ | {"TRANSFORMERS_PACKAGES": str(packages)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    for source in (google / "bert_config.json", vocab_file):
        shutil.copy(source, output)
    for file in FILES[program]:
        with sources.opened(output / file) as model:
            assert model.state_dict.keys() == state.keys(), file
            for name, tensor in model.state_dict.items():
                assert same_bits(tensor, state[name]), (file, name)
