"""Render the documentation site: `make docs` runs this in an environment that has the extra `docs`.

The pages are the Markdown files of the repository, as GitHub shows them. This program copies them
into one tree per language, in which every link leads to another page of the site, and MkDocs
(strict, so that a broken link or anchor ends it) makes HTML of each tree:

    build/site/          English
    build/site/zh-CN/    Chinese: X.zh-CN.md; a page for developers that has none is there in
                         English, and says so

A link to code leads to a page with that file (`source/`), so the site is complete in itself: it
fetches no font and no script from elsewhere. With `--repository URL`, such links go to
URL/blob/main/FILE instead. A notebook (docs/examples/*.ipynb) becomes a page, too: its cells, and
what is in it of their outputs.

Rejected: mkdocs-jupyter, which needs 25 more packages and gives notebooks a look of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "docs" / "site"
LANGUAGES = ("en", "zh-CN")
CHINESE = ".zh-CN"
# Pages that are not in docs/, and what they are called on the site.
ELSEWHERE = {
    "README.md": "quickstart.md",
    "recipes/README.md": "recipes.md",
    "slurm/README.md": "slurm.md",
    "containers/README.md": "kubernetes.md",
    "kernels/README.md": "kernels.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
# Packages that install under another path than the one they have here (setup.cfg, package_dir).
MAPPED = {"kernels": "clue_ds/kernels", "launcher": "clue_ds/launcher"}
NO_CHINESE = """!!! note "本页只有英文"
    使用文档都有中文版；面向开发者的几页（算子、参与开发、变更记录）只有英文。

"""
COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # in what a notebook's cells have printed
FENCE = re.compile(r"(^ *```.*?^ *```[ ]*$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^()\s]+)\)")
# The links between the languages of a page, for which the site has one in its header.
OTHER_LANGUAGE = re.compile(r"^\[(?:中文|English)\]\([^)]*\)(?:\. |\n\n)", re.MULTILINE)
# A line break behind Chinese punctuation, or between two Chinese characters, inside a paragraph.
CHINESE_BREAK = re.compile(
    r"(?<=[，。；：、！？）》”])\n *(?![-*#|>\d\n ]|$)"
    r"|(?<=[\u4e00-\u9fff])\n *(?=[\u4e00-\u9fff（《“])"
)
SEPARATOR = r"[\s\-,:!=\[\]()\"'`/.，。；：、！？（）《》“”]+|(?=[\u4e00-\u9fff])"
LANGUAGE_OF_CODE = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".yaml": "yaml"}


def site_paths() -> dict[str, str]:
    """Every English page of the repository -> its path on the site."""
    files = [p for kind in ("md", "ipynb") for p in (ROOT / "docs").rglob(f"*.{kind}")]
    pages = {str(path.relative_to(ROOT)) for path in files if CHINESE not in path.name}
    own = {page: page.removeprefix("docs/").replace(".ipynb", ".md") for page in pages}
    return own | ELSEWHERE


def read(path: Path) -> str:
    """A page or a notebook as Markdown."""
    text = path.read_text("utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n\n".join(part for cell in json.loads(text)["cells"] for part in _parts(cell)) + "\n"


def _parts(cell: dict[str, Any]) -> list[str]:
    """The Markdown of a notebook's cell and of its outputs."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    parts, said = [f"```python\n{source}\n```"], ""
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            picture = "".join(data["image/png"].split())
            parts.append(f"![the figure of this cell](data:image/png;base64,{picture})")
        else:
            said += "".join(output.get("text", data.get("text/plain", "")))
    if said.strip():
        parts.append(f"```text\n{COLOUR.sub('', said).strip()}\n```")
    return parts


def beside(page: str) -> Path:
    """Where the Chinese file of an English page is, if there is one."""
    path = ROOT / page
    return path.with_name(f"{path.stem}{CHINESE}{path.suffix}")


def chinese_of(page: str) -> str | None:
    """The Chinese text of an English page: that of the file beside it."""
    path = beside(page)
    return read(path) if path.is_file() else None


def text_of(page: str, language: str) -> str:
    """The Markdown of `page` in one language, with the links that it has in the repository."""
    english = OTHER_LANGUAGE.sub("", read(ROOT / page))
    if language == "en":
        return english
    chinese = chinese_of(page)
    if chinese is None:
        heading, newline, rest = english.partition("\n")
        return f"{heading}{newline}\n{NO_CHINESE}{rest}"
    return OTHER_LANGUAGE.sub("", chinese)


def anchors(text: str) -> list[str]:
    """The anchors of a page's headings, which are the same on GitHub and on the site."""
    headings = re.findall(r"^#+ (.+)$", "".join(FENCE.split(text)[::2]), re.MULTILINE)
    return [slugify(case="lower")(heading.replace("`", ""), "-") for heading in headings]


def chinese_anchor(page: str, anchor: str) -> str:
    """Where the Chinese page has what the English page has at `anchor`: headings correspond."""
    chinese = chinese_of(page)
    if chinese is None:
        return anchor
    ours, theirs = anchors(read(ROOT / page)), anchors(chinese)
    return theirs[ours.index(anchor)] if len(ours) == len(theirs) and anchor in ours else anchor


class Links:
    """Turns the links of a page of the repository into links of the site."""

    def __init__(self, language: str, repository: str | None) -> None:
        self.language = language
        self.repository = repository
        self.paths = site_paths()
        self.code: set[str] = set()
        self.pictures: set[str] = set()

    def rewrite(self, text: str, page: str) -> str:
        parts = FENCE.split(text)
        parts[::2] = [
            LINK.sub(lambda m: f"{m[1]}({self._target(m[2], page)})", _joined(_lists(part)))
            for part in parts[::2]
        ]
        return "".join(parts)

    def _target(self, target: str, page: str) -> str:
        path, hash_, anchor = target.partition("#")
        if "://" in target or not path or target.startswith(("mailto:", "data:")):
            return target
        found = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
        if not (ROOT / found).exists():
            sys.exit(f"{page} links to {target}, and there is no {found}; correct the link")
        is_chinese = CHINESE in found
        found = found.replace(CHINESE, "")
        here = self.paths[page]
        if hash_ and found in self.paths and self.language != "en" and not is_chinese:
            anchor = chinese_anchor(found, anchor)
        if found in self.paths:
            if is_chinese and self.language == "en":
                return self._url(f"zh-CN/{self.paths[found]}", here) + hash_ + anchor
            if page.endswith("README.md") and found == page:  # "English: README.md" in Chinese
                return self._url(f"../{self.paths[found]}", here)
            return posixpath.relpath(self.paths[found], posixpath.dirname(here)) + hash_ + anchor
        if found.endswith((".png", ".svg")):
            self.pictures.add(found)
            return posixpath.relpath(f"pictures/{found}", posixpath.dirname(here))
        if self.repository:
            return f"{self.repository}/blob/main/{found}"
        self.code.add(found)
        up = "" if self.language == "en" else "../"
        return self._url(f"{up}source/{found}.md", here)

    def _url(self, path: str, here: str) -> str:
        """The address of a page of any language, as seen from the page `here` of this one."""
        depth = 0 if here == "index.md" else here.count("/") + 1
        return "../" * depth + path.removesuffix(".md").removesuffix("index") + "/"


def _lists(text: str) -> str:
    """Blank lines before lists and doubled indents, which Python-Markdown needs and GitHub not."""
    lines: list[str] = []
    for line in text.split("\n"):
        item = re.match(r"( *)(?:[-*]|\d+\.) ", line)
        before = lines[-1] if lines else ""
        if item and before.strip() and not re.match(r" *(?:[-*]|\d+\.) | {2,}\S", before):
            lines.append("")
        lines.append(" " * len(item[1]) + line if item else line)
    return "\n".join(lines)


def _joined(text: str) -> str:
    """Chinese lines without the space that a browser puts where a line of a paragraph ends."""
    return CHINESE_BREAK.sub("", text)


def code_page(path: str) -> str:
    """A page with a file of the repository, or with the list of a folder's files."""
    place = ROOT / path
    hidden = "---\nsearch:\n  exclude: true\n---\n"
    if not place.is_dir():
        kind = LANGUAGE_OF_CODE.get(place.suffix, "text")
        return f"{hidden}# {path}\n\n````{kind}\n{place.read_text('utf-8')}````\n"
    rows = []
    for entry in sorted(place.iterdir()):
        if entry.suffix == ".py" or entry.suffix in LANGUAGE_OF_CODE or entry.suffix == ".json":
            lines = entry.read_text("utf-8").splitlines() or [""]
            first = lines[0].strip('"# ') if entry.suffix == ".py" else ""
            rows.append(f"| `{entry.name}` | {first} |")
    return f"{hidden}# {path}/\n\n| file | what it does |\n|---|---|\n" + "\n".join(rows) + "\n"


def stage(language: str, tree: Path, repository: str | None) -> tuple[list[Any], set[str]]:
    """Write the pages of one language below `tree`; returns MkDocs' navigation and linked code."""
    number = LANGUAGES.index(language)
    links = Links(language, repository)

    def walk(entries: list[dict[str, Any]]) -> list[Any]:
        shown = []
        for entry in entries:
            title = entry["title"][number]
            if "pages" in entry:
                shown.append({title: walk(entry["pages"])})
            else:
                shown.append({title: links.paths[entry["page"]]})
        return shown

    navigation = walk(yaml.safe_load((SITE / "navigation.yaml").read_text("utf-8")))
    for page, path in links.paths.items():
        _write(tree / path, links.rewrite(text_of(page, language), page))
    for picture in links.pictures:
        (tree / "pictures" / picture).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / picture, tree / "pictures" / picture)
    shutil.copytree(SITE / "assets", tree / "assets", dirs_exist_ok=True)
    return navigation, links.code


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def installed_tree(folder: Path) -> None:
    """The packages as they are when installed, for the API pages: only read, never imported."""
    ignore = shutil.ignore_patterns("__pycache__")
    for here, there in {"clue_ds": "clue_ds", **MAPPED}.items():
        shutil.copytree(ROOT / here, folder / there, ignore=ignore, dirs_exist_ok=True)


def config_of(language: str, work: Path, output: Path, navigation: list[Any]) -> Path:
    """The MkDocs file of one language, on top of docs/site/mkdocs.yml."""
    is_english = language == "en"
    theme = {"language": "en" if is_english else "zh", "custom_dir": str(SITE / "theme")}
    config = {
        "INHERIT": str(SITE / "mkdocs.yml"),
        "docs_dir": str(work / language),
        "site_dir": str(output if is_english else output / language),
        "nav": navigation,
        "theme": theme,
        "plugins": {
            # Every Chinese character is a word for the search, in the pages and in what is typed.
            "search": {"lang": ["en"] if is_english else ["zh"], "separator": SEPARATOR},
            "mkdocstrings": {"handlers": {"python": {"paths": [str(work / "tree")]}}},
        },
        "extra": {"other": "zh-CN/" if is_english else "../", "root": "" if is_english else "../"},
        "not_in_nav": "source/",
    }
    path = work / f"{language}.yml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False), "utf-8")
    return path


def broken_links(site: Path) -> list[str]:
    """Links of the finished pages that lead nowhere: MkDocs looks at those between pages only.

    A link to another host counts, too, unless a reader follows it: the site fetches nothing.
    """
    texts = {page: page.read_text("utf-8") for page in site.rglob("*.html")}
    ids = {page: set(re.findall(r"\bid=\"?([^\"\s>]+)", text)) for page, text in texts.items()}
    broken = []
    for page, text in texts.items():
        for tag, link in set(re.findall(r"<(\w+)[^<>]*? (?:href|src)=\"?([^\"\s>]+)", text)):
            path, _, anchor = unquote(unescape(link)).partition("#")
            if re.match(r"[a-z]+:|/", path) or page.name == "404.html":
                if path.startswith(("http", "//")) and tag != "a":
                    broken.append(f"{page.relative_to(site)} fetches {link}")
                continue
            found = Path(posixpath.normpath(page.parent / path)) if path else page
            found = found / "index.html" if found.is_dir() else found
            is_there = not anchor or anchor.startswith("__") or anchor in ids.get(found, {anchor})
            if not found.exists() or not is_there:
                broken.append(f"{page.relative_to(site)} links to {link}")
    return sorted(broken)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "site")
    parser.add_argument("--repository", help="the address of the repository, for links to code")
    arguments = parser.parse_args()
    work, output = ROOT / "build" / "docs", arguments.output.resolve()
    for folder in (work, output):
        shutil.rmtree(folder, ignore_errors=True)
    installed_tree(work / "tree")
    navigation: dict[str, list[Any]] = {}
    code: set[str] = set()
    for language in LANGUAGES:
        navigation[language], linked = stage(language, work / language, arguments.repository)
        code |= linked
    for path in sorted(code):
        _write(work / "en" / "source" / f"{path}.md", code_page(path))
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # an advertisement, and not about us
    for language in LANGUAGES:
        config = config_of(language, work, output, navigation[language])
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config)]
        # Not --quiet, with which MkDocs counts no warnings and strict finds nothing.
        done = subprocess.run(
            command, cwd=work / "tree", env=environment, stderr=subprocess.PIPE, text=True
        )
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
    if broken := broken_links(output):
        print("\n".join(broken), file=sys.stderr)
        return 1
    print(f"the site is in {output}; look at it with: python3 -m http.server --directory {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
