"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from zygote import Zygote, close_shared, shared

from clue_ds.job.rendezvous import VARIABLES

if not torch.cuda.is_available():
    # Triton reads it when a kernel is decorated, so before anything imports clue_ds.kernels. Only
    # tests that ask for `kernel_device` notice: elsewhere a CPU tensor takes the torch twin.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A few tests of each take minutes, of which they wait most: begun last, they would keep one process
# busy and leave the others without work.
LONG_FILES = (
    "test_task_watchdog", "test_watchdog", "test_launcher", "test_task_ranks", "test_engine",
    "test_resume", "test_demo", "test_bench_scale", "test_docs_run", "test_kills", "test_spikes",
    "test_regroup", "test_phase_ranks", "test_objectives", "test_train", "test_sample",
    "test_workers", "test_notebook", "test_tokenizer",
)  # fmt: skip

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# Text of our own, four documents: a sentence a line, a blank line between documents.
SAMPLE = Path(__file__).resolve().parents[1] / "docs" / "examples" / "sample.txt"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; `make test` hands files to its processes in this order."""
    items.sort(key=lambda item: item.path.stem not in LONG_FILES)


@pytest.fixture(autouse=True)
def no_traces() -> Iterator[None]:
    """A test leaves no rank's environment and no process group to the tests that come after it.

    They would pass or fail with the order in which `make test` hands out files. A test that
    pretrains does so in a process of its own: `ranks.run_ranks`.
    """
    before = [os.environ.get(name) for name in VARIABLES]
    initialized = torch.distributed.is_initialized()
    yield
    assert [os.environ.get(name) for name in VARIABLES] == before
    assert torch.distributed.is_initialized() == initialized


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The development data beside the checkout; tests that need it skip without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip("development data (../shared/data) is not on this machine")
    return SHARED_DATA


@pytest.fixture(scope="session")
def sample_text() -> str:
    return SAMPLE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def zygote() -> Zygote:
    """Starts ranks without importing everything again for each."""
    return shared()


def pytest_sessionfinish() -> None:
    close_shared()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if config.option.markexpr == "not heavy":
        line = "The heavy tests were left out: `make test-heavy` runs them, and so does .ci/run."
        terminalreporter.write_line(line)


@pytest.fixture
def kernel_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where Triton kernels run in this process, a GPU or the interpreter; every op uses them."""
    from kernel_checks import round_as_gpus_do

    from clue_ds import kernels

    if not kernels.available():
        pytest.skip("needs the package triton, and a GPU or TRITON_INTERPRET=1")
    if not torch.cuda.is_available():
        round_as_gpus_do(monkeypatch)
    kernels.set_backend("triton")
    yield torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels.set_backend("auto")
