"""What the pages say is true: tables are made from the code, links exist, README's commands run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README*.md")])
README = (ROOT / "README.md").read_text("utf-8")
# The commands of README's "On your own corpus", made small enough for a test.
SMALLER = (
    "--train.steps 4 --train.warmup_steps 1 --train.global_batch_size 8 --train.micro_batch_size 2 "
    "--data.seq_length 32 --model.num_hidden_layers 1"
)


def _blocks(markdown: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", markdown, re.DOTALL | re.MULTILINE)


def _section(markdown: str, title: str) -> str:
    match = re.search(
        rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", markdown, re.DOTALL | re.MULTILINE
    )
    assert match, f"README has no section {title!r}"
    return match[1]


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


def test_both_readmes_hold_the_same_commands_and_sections() -> None:
    chinese = (ROOT / "README.zh-CN.md").read_text("utf-8")
    for language in ("bash", "yaml"):
        # Comments are translated, commands are not.
        strip = re.compile(r"\s*#.*")
        ours, theirs = (
            [strip.sub("", block) for block in _blocks(text, language)]
            for text in (README, chinese)
        )
        assert ours == theirs
    assert len(re.findall(r"^#", README, re.MULTILINE)) == len(
        re.findall(r"^#", chinese, re.MULTILINE)
    )


def test_readme_commands_run_as_written(tmp_path: Path, sample_text: str) -> None:
    section = _section(README, "On your own corpus")
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / "texts" / f"{number}.txt").write_text(sample_text * 20, encoding="utf-8")
    (tmp_path / "run.yaml").write_text(_blocks(section, "yaml")[0], encoding="utf-8")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    lines = [line for block in _blocks(section, "bash") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("clue-ds ")]
    assert {shlex.split(command)[1] for command in commands} >= {
        "vocab", "shard", "launch", "export", "predict",
    }  # fmt: skip
    for command in commands:
        if "pretrain" in command:
            command = f"{command} {SMALLER}"
        done = subprocess.run(
            shlex.split(command, comments=True),
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert (tmp_path / "runs" / "my-bert" / "export" / "hf" / "model.safetensors").is_file()
