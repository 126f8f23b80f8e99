"""The command line: verbs are found, imported late, and end with a true status."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from clue_ds import cli
from clue_ds.cli import VERBS


def _run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clue_ds.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_usage_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in VERBS)


def test_misspelled_verb_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["shart"]) == 2
    assert "did you mean shard?" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb: str) -> None:
    done = _run(verb, "--help")
    assert done.returncode == 0, done.stderr
    assert f"usage: clue-ds {verb}" in done.stdout


def test_listing_the_verbs_imports_none_of_them() -> None:
    code = (
        "import sys; from clue_ds import cli; cli.main(['--help']);"
        "assert not {'torch', 'deepspeed', 'transformers', 'numba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shard", "nowhere.txt", "--output", "c", "--vocab", "v.txt"], "nowhere.txt"),
        (["pretrain", "--run_dir", "r", "--data.corpus", "nowhere"], "nowhere"),
        (["pretrain", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["export", "nowhere", "--to", "hf"], "nowhere"),
        (["import", "nowhere", "--from", "tf"], "nowhere"),
        (["predict", "--model", "nowhere", "--fill-mask", "天[MASK]"], "nowhere"),
    ],
)
def test_mistake_of_a_user_is_one_message_and_status_2(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    done = _run(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"clue-ds {arguments[0]}: error:" in done.stderr
    assert message in done.stderr
