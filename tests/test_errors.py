"""How a command ends: one message for a user's mistake, one line and a report for a bug of ours."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from clue_ds import errors
from clue_ds.errors import UserError, run_command


def fails(error: BaseException) -> int:
    def function() -> None:
        raise error

    return run_command("clue-ds shard", function)


def test_a_bug_is_one_line_that_names_the_file_with_the_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["clue-ds", "shard", "a b.txt"])
    monkeypatch.delenv(errors.TRACEBACK_VARIABLE, raising=False)
    assert fails(ZeroDivisionError("a\nb")) == 70
    said = capsys.readouterr().err
    (report,) = tmp_path.iterdir()
    assert said.count("\n") == 1 and "Traceback" not in said
    assert said.startswith("clue-ds shard: error: unexpected error in errors.py, line ")
    assert "ZeroDivisionError: a;" in said and str(report) in said
    text = report.read_text(encoding="utf-8")
    assert text.startswith("command: clue-ds shard 'a b.txt'\nversions: python ")
    assert "Traceback (most recent call last)" in text and "torch " in text


def test_a_library_inside_a_clone_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = "/home/me/clue_ds/.venv/lib/python3.11/site-packages/torch/nn.py"
    library: dict[str, Any] = {"__name__": "torch.nn"}
    exec(compile("def forward():\n    raise KeyError(1)", path, "exec"), library)
    assert run_command("clue-ds shard", library["forward"]) == 70
    assert "unexpected error in errors.py, line " in capsys.readouterr().err


def test_a_variable_prints_the_traceback_of_any_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(errors.TRACEBACK_VARIABLE, "1")
    for error, status in ((RuntimeError(), 70), (UserError("no"), 2)):
        assert fails(error) == status
        assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_the_report_goes_to_the_temporary_directory_if_the_current_one_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert fails(RuntimeError("x")) == 70
    (report,) = (tmp_path / "temporary").iterdir()
    assert str(report) in capsys.readouterr().err


@pytest.mark.parametrize("number", errors.ADVICE)
def test_the_systems_errors_about_files_are_messages(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails(OSError(number, os.strerror(number), "some/file")) == 2
    assert "some/file" in capsys.readouterr().err


def test_a_full_disk_is_a_message_without_a_name_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(OSError(errno.ENOSPC, "No space left on device")) == 2
    assert "the disk is full" in capsys.readouterr().err


def test_an_error_of_the_system_that_is_about_no_file_is_a_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fails(OSError(errno.EBADF, "Bad file descriptor")) == 70


def test_output_to_a_full_disk_is_one_message() -> None:
    command = f"{sys.executable} -m clue_ds.cli --help > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("clue-ds: error: ") and "the disk is full" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_link_to_nothing_says_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"link is a symbolic link to nowhere, which does not"):
        errors.existing_file(tmp_path / "link", "vocabulary")
    (tmp_path / "pipe").mkdir()
    with pytest.raises(UserError, match="is a directory"):
        errors.existing_file(tmp_path / "pipe", "vocabulary")


def test_shortened_values_and_first_lines() -> None:
    assert errors.shorten("甲") == "'甲'" and errors.shorten("a\nb", quoted=False) == "a b"
    assert len(errors.shorten("x" * 10**6)) <= 120
    nested = [["x" * 1000] * 1000] * 1000
    assert len(errors.shorten(nested)) < 5_000
    assert errors.first_line(ValueError("\n \n here\nthere")) == "here"
    assert errors.first_line(OSError()) == "OSError"
