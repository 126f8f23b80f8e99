"""The count of restarts without progress: a damaged or unwritable file never ends a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clue_ds.job import stop
from clue_ds.launcher import contract


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b"\xff", b'{"step": 3, "restarts": "x"}', b"[" * 100_000]
)
def test_a_damaged_count_of_restarts_is_one_warning_and_starts_again(
    content: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(contract.MAX_RESTARTS_VARIABLE, "1")
    path = tmp_path / stop.RESTARTS_FILE
    path.write_bytes(content)
    stop.check_progress(tmp_path, 3)
    assert capsys.readouterr().out.count("restarts count from 0 again") == 1
    stop.check_progress(tmp_path, 3)
    assert json.loads(path.read_text()) == {"step": 3, "restarts": 1}
    with pytest.raises(SystemExit):
        stop.check_progress(tmp_path, 3)


def test_a_count_of_restarts_that_cannot_be_written_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(contract.MAX_RESTARTS_VARIABLE, "1")
    (tmp_path / stop.RESTARTS_FILE).mkdir()
    stop.check_progress(tmp_path, 3)
    assert "this restart is not counted" in capsys.readouterr().out
