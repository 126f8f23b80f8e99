"""Which implementation runs; the package imports without Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clue_ds import kernels
from clue_ds.errors import UserError
from clue_ds.kernels import backend, functional, reference
from clue_ds.model import BertForPreTraining, ops
from clue_ds.presets import get

WITHOUT_TRITON = """
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda *names: None if names[0] == "triton" else real(*names)
import torch
from clue_ds import kernels
assert not kernels.available()
assert kernels.layer_norm(torch.randn(2, 4), torch.ones(4), torch.zeros(4), 1e-5).shape == (2, 4)
try:
    kernels.set_backend("triton")
except RuntimeError as error:
    print(error)
"""


def test_importing_works_without_triton() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "need the package triton; choose 'auto' or 'torch' here" in done.stdout


NAMESAKE = """
import sys
sys.path.append(sys.argv[1])
import clue_ds.kernels
import kernels
from transformers.utils import is_kernels_available
print(kernels.__file__, hasattr(kernels, "functional"), is_kernels_available())
"""


@pytest.mark.parametrize("version", [None, "0.0.1"])
def test_in_a_clone_kernels_is_hugging_faces_package(tmp_path: Path, version: str | None) -> None:
    """Python and transformers look in the current folder first, and in a clone find ours there."""
    if version:
        (tmp_path / "kernels.py").write_text(f"__version__ = {version!r}\n")
    clone = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", NAMESAKE, str(tmp_path)],
        cwd=clone, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = tmp_path / "kernels.py" if version else clone / "kernels" / "__init__.py"
    assert done.stdout == f"{expected} False False\n"


def test_without_gpu_and_interpreter_kernels_are_a_users_mistake() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    script = "from clue_ds.model import ops; ops.choose_kernels('triton')"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert "UserError: model.kernels: kernels 'triton' need" in done.stderr


def test_importing_the_model_leaves_the_kernels_alone() -> None:
    script = "from clue_ds.model import ops; print(ops.kernels.get_backend())"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == "auto\n", done.stderr


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'cuda' is not one of auto, triton, torch"):
        kernels.set_backend("cuda")


def test_cpu_tensors_take_the_reference_unless_told(kernel_device: torch.device) -> None:
    x = torch.randn(2, 4)
    kernels.set_backend("auto")
    assert not kernels.use_triton(x, 4)
    kernels.set_backend("torch")
    assert not kernels.use_triton(x, 4)
    kernels.set_backend("triton")
    assert kernels.use_triton(x, 4) and not kernels.use_triton(x, kernels.backend.MAX_WIDTH + 1)


def test_auto_leaves_small_eager_layer_norms_to_torch(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only GPUs have this rule: here the limit is lowered and `auto` acts as if there were one."""
    monkeypatch.setattr(functional, "use_triton", lambda *x_width_and_operation: True)
    monkeypatch.setattr(backend, "HOST_BOUND_ELEMENTS", 64)
    weight, bias = torch.randn(2, 16, device=kernel_device)
    taken = []
    kernel = functional.fused_norm.layer_norm
    monkeypatch.setattr(
        functional.fused_norm, "layer_norm", lambda *a: taken.append(len(a[0])) or kernel(*a)
    )

    def call(rows: int, dtype: torch.dtype = torch.float32) -> None:
        x = torch.randn(rows, 16, device=kernel_device).to(dtype)
        out = kernels.layer_norm(x, weight, bias, 1e-5)
        assert out.dtype == dtype
        torch.testing.assert_close(
            out, reference.layer_norm(x, weight, bias, 1e-5), rtol=1e-2, atol=1e-2
        )

    kernels.set_backend("auto")
    call(4)
    assert taken == []
    call(5)
    call(3, torch.bfloat16)  # beside fp32 parameters
    kernels.set_backend("triton")
    call(2)
    assert taken == [5, 3, 2]


@pytest.mark.parametrize("attention", ["sdpa", "masked_softmax"])
def test_our_model_computes_the_same_with_kernels(
    attention: ops.Attention, kernel_device: torch.device
) -> None:
    config = get("roberta_tiny_clue").replace(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForPreTraining(config, attention).to(kernel_device)
    batch = {
        "input_ids": torch.randint(5, 40, (3, 9), device=kernel_device),
        "lengths": torch.tensor([9, 4, 7], device=kernel_device),
        "masked_positions": torch.randint(0, 4, (3, 2), device=kernel_device),
        "masked_labels": torch.randint(5, 40, (3, 2), device=kernel_device),
    }
    gradients = []
    for name in ("triton", "torch"):
        ops.choose_kernels(name)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        gradients.append(
            [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        )
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    # The kernels' backward formulas differ from torch's in the last bits: this shows that they ran.
    assert any(not torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_bad_name_in_the_config_is_a_users_mistake() -> None:
    from clue_ds import config

    values = {"run_dir": "run", "data": {"corpus": "c"}, "model": {"kernels": "cuda"}}
    with pytest.raises(UserError, match=r"model\.kernels: Input should be 'auto'"):
        config.validate(values, "run.yaml")
