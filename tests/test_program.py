"""Commands that we print work in the shell in which they are printed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from clue_ds.settings import program

SCRIPT = Path(sys.executable).with_name("clue-ds")


def _with_path(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    monkeypatch.setenv("PATH", os.pathsep.join([*map(str, folders), "/usr/bin", "/bin"]))


def test_the_name_is_enough_where_path_leads_to_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_path(monkeypatch, SCRIPT.parent)
    assert program.command("export", "a b") == "clue-ds export 'a b'"


def test_without_an_activated_environment_the_path_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_path(monkeypatch)
    monkeypatch.chdir(tmp_path)
    line = program.command("--version")
    assert line == f"{shlex.quote(str(SCRIPT))} --version"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("clue-ds ")
    monkeypatch.chdir(SCRIPT.parents[2])
    assert program.command() == str(SCRIPT.relative_to(SCRIPT.parents[2]))


def test_the_command_of_another_environment_is_not_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "clue-ds"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    _with_path(monkeypatch, tmp_path)
    assert str(SCRIPT.name) != program.command("status").split()[0]
    # Without a script beside Python it is a user's installation, whose script is elsewhere.
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python3"))
    assert program.command("status") == "clue-ds status"
    _with_path(monkeypatch)
    assert program.command("status").endswith("bin/python3 -m clue_ds.cli status")
