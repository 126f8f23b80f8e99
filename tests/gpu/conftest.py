"""tests/gpu runs on a machine with CUDA (`make test-gpu`) and skips, with the reason, elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# The helpers that spawn runs and make corpora are those of the other tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
