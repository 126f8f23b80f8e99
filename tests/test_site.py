"""The site has every page, draws what its program draws, and quotes real messages."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
NAVIGATION = ROOT / "docs" / "site" / "navigation.yaml"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
# Messages of programs that are not ours.
FOREIGN = {"clue-ds: command not found"}


def _chinese(page: Path) -> Path:
    return page.with_name(page.name.replace(".md", ".zh-CN.md"))


def _pages(entries: list[dict[str, Any]]) -> Iterator[str]:
    for entry in entries:
        assert len(entry["title"]) == 2, f"{entry['title']} needs a title in each language"
        yield from _pages(entry["pages"]) if "pages" in entry else [entry["page"]]


def _templates() -> list[str]:
    """Every string of the code; a NUL stands for what is put in when the program runs."""
    found = []
    for package in ("clue_ds", "launcher", "kernels"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [
                        part.value if isinstance(part, ast.Constant) else "\0"
                        for part in node.values
                    ]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value.replace("{}", "\0"))
    return found


def _quoted(page: Path) -> list[str]:
    return re.findall(r"^### `(.+)`$", page.read_text("utf-8"), re.MULTILINE)


def test_navigation_has_every_page_once() -> None:
    listed = list(_pages(yaml.safe_load(NAVIGATION.read_text("utf-8"))))
    assert len(listed) == len(set(listed))
    files = [p for kind in ("md", "ipynb") for p in (ROOT / "docs").rglob(f"*.{kind}")]
    english = {str(p.relative_to(ROOT)) for p in files if ".zh-CN" not in p.name}
    assert english <= set(listed), "docs/site/navigation.yaml lacks pages"
    assert all((ROOT / page).is_file() for page in listed)


def test_quoted_messages_are_those_of_the_code() -> None:
    unknown = []
    templates = _templates()
    for message in sorted(set(_quoted(TROUBLESHOOTING)) - FOREIGN):
        pattern = re.compile(".*".join(map(re.escape, message.split("…"))), re.DOTALL)
        if not any(pattern.search(text) for text in templates):
            unknown.append(message)
    assert not unknown, "docs/troubleshooting.md quotes messages that no string of the code holds"


def test_both_languages_explain_the_same_messages() -> None:
    assert _quoted(TROUBLESHOOTING) == _quoted(_chinese(TROUBLESHOOTING))


def test_drawings_are_what_their_program_draws() -> None:
    spec = importlib.util.spec_from_file_location("drawing", ROOT / "docs/render_architecture.py")
    assert spec is not None and spec.loader is not None
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    for language, name in enumerate(("architecture.svg", "architecture.zh-CN.svg")):
        drawn = (ROOT / "docs" / "images" / name).read_text("utf-8")
        assert drawn == drawing.draw(language), "run: python docs/render_architecture.py"
