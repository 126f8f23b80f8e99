"""The command line: verbs are found, imported only when called, and end with the right status."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import clue_ds
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


def test_version_is_that_of_the_installed_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert clue_ds.__version__ == importlib.metadata.version("clue_ds")
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"clue-ds {clue_ds.__version__}\n"


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import clue_ds; print(set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "{'clue_ds'}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb: str) -> None:
    done = _run(verb, "--help")
    assert done.returncode == 0, done.stderr
    assert f"usage: clue-ds {verb}" in done.stdout


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        *([verb, "--help"] for verb in VERBS),
        ["status", "nowhere"],
    ],
)
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    """Nor does the process of `clue-ds shard` that reads the input, which has the same imports."""
    code = (
        f"import sys; from clue_ds import cli\ntry: cli.main({argv})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'numba', 'datasets', 'pyarrow'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_every_benchmark_is_found() -> None:
    for verb in cli.BENCHMARKS.values():
        assert isinstance(verb.target, str)
        assert importlib.util.find_spec(verb.target.partition(":")[0]) is not None
    done = _run("bench", "kernel")
    assert done.returncode == 2
    assert "did you mean kernels?" in done.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    """`clue-ds ... | head -1` prints no error and ends with the status of SIGPIPE."""
    code = (
        "import sys; from clue_ds import cli; cli.VERBS |= {'many': cli.Verb('many:lines', '', 1)}"
    )
    module = "class many:\n    lines = lambda argv: [print(i) for i in range(100_000)]"
    script = f"{code}\n{module}\nsys.modules['many'] = many\nsys.exit(cli.main(['many']))"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("shell", ["{} | true", "{} 2>&1 | true"])
@pytest.mark.parametrize("words", ["--version", "vocab learn --help", "shard none --output none"])
def test_nobody_reads_what_is_said(words: str, shell: str) -> None:
    """Version, help and errors are printed by other code than the lines of a verb."""
    command = shell.format(f"(sleep 0.5; {sys.executable} -m clue_ds.cli {words})")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    result = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "BrokenPipe" not in result.stderr
    assert result.returncode == (2 if "none" in words and "2>" not in shell else 141)


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
