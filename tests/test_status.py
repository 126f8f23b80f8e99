"""Where a run stands, read from the files of a real run."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from ranks import make_corpus, pretrain_runs, run_ranks, tiny_config

from clue_ds import doctor, status
from clue_ds.errors import UserError


def test_status_of_a_run_done_alive_and_dead(
    tmp_path: Path, sample_text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(make_corpus(tmp_path, sample_text), tmp_path / "run")
    assert run_ranks(1, pretrain_runs, [config.model_dump()]) == [[None]]
    run = tmp_path / "run"
    status.status(run)
    text = capsys.readouterr().out
    assert "step 6 of 6 (100.0%)" in text
    assert "time left   none: done" in text
    assert "checkpoint  step-00000006" in text

    sign = run / "alive.json"  # still there: the helper above does not close its runs
    sign.touch()
    assert "alive       yes; rank 0 is process" in "\n".join(status.describe(run))
    old = time.time() - 3_700
    os.utime(sign, (old, old))
    assert "no, it ended without a word 1:01:40 ago" in "\n".join(status.describe(run))
    sign.unlink()
    assert "no, it is done" in "\n".join(status.describe(run))
    with pytest.raises(UserError, match="is no run"):
        status.describe(tmp_path)


def test_a_check_that_fails_ends_with_its_mend() -> None:
    line = doctor.Check("bad", "/dev/shm has 1 MiB free", "start it with --shm-size=1g").line()
    assert line == "bad   /dev/shm has 1 MiB free; start it with --shm-size=1g"
