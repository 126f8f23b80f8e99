"""tests/gpu runs where CUDA is available (`make test-gpu`); elsewhere its tests are skipped."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# For the helpers in tests/ that start runs and make corpora.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
