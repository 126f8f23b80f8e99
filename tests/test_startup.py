"""A process of ours reads and writes UTF-8 whatever the locale says, and has a home directory."""

from __future__ import annotations

import io
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from clue_ds.launcher import environment
from clue_ds.settings import startup

TEXT = "今天"
# What Python makes of LC_ALL=C when it is told not to mend it: ASCII.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run(locale: dict[str, str], *words: str, module: str = "clue_ds.cli") -> tuple[int, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, env=env | locale, capture_output=True)
    return done.returncode, (done.stdout + done.stderr).decode("utf-8")


def test_arguments_are_utf8_where_the_locale_is_ascii() -> None:
    status, said = run(ASCII, "status", TEXT)
    assert status == 2
    assert said.startswith(f"clue-ds status: error: {TEXT} is not a run")


def test_a_rank_started_as_a_module_is_in_utf8_mode_and_knows_its_arguments(tmp_path: Path) -> None:
    path = tmp_path / f"{TEXT}.yaml"
    path.write_text(f"run_dir: {TEXT}\ndata: {{corpus: {tmp_path / TEXT}}}\n", encoding="utf-8")
    status, said = run(ASCII, "--config", str(path), module="clue_ds.pretrain.train")
    assert status == 2
    assert str(tmp_path / TEXT) in said


@pytest.mark.parametrize("locale", [("zh_CN", "GB18030"), ("en_US", "ISO-8859-1")])
def test_arguments_are_utf8_in_another_locale(locale: tuple[str, str], tmp_path: Path) -> None:
    if shutil.which("localedef") is None:
        pytest.skip("needs localedef and charmaps (Debian: apt install locales)")
    name, charmap = locale
    place = tmp_path / f"{name}.{charmap}"
    subprocess.run(["localedef", "-i", name, "-f", charmap, place], capture_output=True)
    if not place.is_dir():
        pytest.skip("localedef finds no charmaps (Debian: apt install locales)")
    chosen = {"LOCPATH": str(tmp_path), "LC_ALL": place.name}
    code = f"import sys; assert sys.argv[1] != {ascii(TEXT)}, 'the locale is not in effect'"
    subprocess.run([sys.executable, "-c", code, TEXT], env=os.environ | chosen, check=True)
    assert run(chosen, "status", TEXT)[1].startswith(f"clue-ds status: error: {TEXT} is not")


def test_a_process_that_is_in_utf8_does_not_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started again"))
    startup.prepare()
    assert os.environ["PYTHONUTF8"] == "1"


def test_a_narrow_output_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="gbk"))
    startup.prepare()
    print("一😀\udc80", flush=True)
    assert written.getvalue() == "一".encode("gbk") + b"\\U0001f600\\udc80\n"


def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run the test as a user id without a home and without an entry in the password file."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    for name in ("HOME", *startup.USER_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_without_a_home_there_is_a_private_one_that_is_found_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nobody(monkeypatch, tmp_path)
    startup.prepare()
    home = Path(os.environ["HOME"])
    assert home.parent == tmp_path and home.stat().st_mode & 0o077 == 0
    assert os.environ["USER"] == str(os.getuid())
    monkeypatch.delenv("HOME")
    startup.prepare()
    assert Path(os.environ["HOME"]) == home

    # Nothing is put into a directory that others may write to.
    home.chmod(0o777)
    monkeypatch.delenv("HOME")
    startup.prepare()
    assert Path(os.environ["HOME"]) != home


def test_without_a_home_the_launcher_reads_no_settings_of_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nobody(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("\ufeffA=1\r\nB='甲'\r\n", encoding="utf-8")
    assert environment.read_deepspeed_env({}) == {"A": "1", "B": "甲"}
