"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# Text of our own, four documents: a sentence a line, a blank line between documents.
SAMPLE = Path(__file__).resolve().parents[1] / "docs" / "examples" / "sample.txt"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The development data beside the checkout; tests that need it skip without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip("development data (../shared/data) is not on this machine")
    return SHARED_DATA


@pytest.fixture(scope="session")
def sample_text() -> str:
    return SAMPLE.read_text(encoding="utf-8")
