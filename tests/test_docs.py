"""What the pages say is true: tables are made from the code, links exist, commands have such flags.

test_docs_run.py runs the commands.
"""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from clue_ds.cli import VERBS, Verb
from clue_ds.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "docs/tasks/*.md", "docs/api/*.md", "*/README*.md")
    for page in ROOT.glob(pattern)
)
README = (ROOT / "README.md").read_text("utf-8")


def _blocks(markdown: str, language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", markdown, re.DOTALL | re.MULTILINE)
    return [block for name, block in blocks if name == language]


def _commands(markdown: str) -> list[list[str]]:
    """The arguments of every `clue-ds` in a page's blocks, also behind `mpirun` or `launch --`."""
    commands = []
    for block in _blocks(markdown, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if "clue-ds " not in line:
                continue
            words = shlex.split(line, comments=True)
            while "clue-ds" in words:
                words = words[words.index("clue-ds") + 1 :]
                if words[:1] == ["launch"] and "--" in words:
                    place = words.index("--")
                    commands.append(words[:place])
                    words = ["clue-ds", *words[place + 1 :]]
                else:
                    commands.append(words)
    return commands


def _section(markdown: str, title: str) -> str:
    match = re.search(
        rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", markdown, re.DOTALL | re.MULTILINE
    )
    assert match, f"README has no section {title!r}"
    return match[1]


def test_promises_name_tests_that_exist() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    for file, name in re.findall(r"`((?:tests/\w+/)?test_\w+\.py)(?:::(\w+))?`", text):
        path = ROOT / (file if file.startswith("tests/") else f"tests/{file}")
        assert path.is_file(), file
        assert not name or f"\ndef {name}(" in path.read_text("utf-8"), f"{file} has no {name}"


def test_config_page_is_what_the_config_says() -> None:
    printed = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "render_config.py")],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    assert (ROOT / "docs" / "config.md").read_text("utf-8") == printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_point_at_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_verbs_and_flags_that_exist(page: Path) -> None:
    for verb, *arguments in _commands(page.read_text("utf-8")):
        assert verb in VERBS, f"{page.name}: clue-ds {verb}"
        entry = VERBS[verb]
        if isinstance(entry.target, dict):
            entry = entry.target[arguments[0]]
        flags = [word.partition("=")[0] for word in arguments if re.match("--[a-z]", word)]
        for flag in flags:
            assert _has_flag(verb, entry, flag, arguments), f"{page.name}: clue-ds {verb} {flag}"


def _has_flag(name: str, verb: Verb, flag: str, arguments: list[str]) -> bool:
    section, _, key = flag.removeprefix("--").partition(".")
    if name == "pretrain" or (name in ("plan", "doctor") and key):
        section, key = section.replace("-", "_"), key.replace("-", "_")
        fields = RunConfig.model_fields
        if key:
            fields = getattr(fields.get(section), "annotation", RunConfig).model_fields
        return flag == "--config" or (key or section) in fields
    module, _, attribute = verb.target.partition(":")
    if verb.takes_argv:
        return f'"{flag}"' in inspect.getsource(importlib.import_module(module))
    target = getattr(importlib.import_module(module), attribute)
    if isinstance(target, dict):
        target = target[arguments[0]]
    names = {parameter.replace("_", "-") for parameter in inspect.signature(target).parameters}
    # A flag that is a keyword of Python (--from, --for) is the name of another parameter.
    is_named = f'tyro.conf.arg(name="{section}")' in inspect.getsource(target)
    return is_named or section in names or section.removeprefix("no-") in names


def test_readme_says_the_path_of_every_file_it_points_at() -> None:
    for text, target in re.findall(
        r"\[([^]]+)\]\(([^)#]+)\)", _section(README, "Where things are")
    ):
        assert text.rstrip("/") == target, f"README calls {target} {text!r}"
