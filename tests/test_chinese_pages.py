"""Each page of the documentation is there in Chinese, and says what the English page says.

Nobody can test a translation, but its facts can be compared: in each section the numbers, and in
each page the commands, the names in code, the links and the rows of tables.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
TWINS = sorted(
    page
    for pattern in ("*", "*/*", "docs/tasks/*", "docs/api/*")
    for page in ROOT.glob(f"{pattern}.zh-CN.md")
)
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"[ \t]*#.*")
LINK = re.compile(r"\]\(([^()\s]+)\)")
UNITS = {"万": 10**4, "亿": 10**8, "million": 10**6, "billion": 10**9}
# Digits that are no part of a name; the sign of an exponent belongs to the number.
NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])(\d+(?:\.\d+)?(?:e-?\d+)?)(?:\s*(万|亿|(?:million|billion)\b))?"
)
MONTHS = "January February March April May June July August September October November December"
MONTH = re.compile(rf"\b({MONTHS.replace(' ', '|')})(?= \d)")

# Words that the Chinese pages don't use, and the glossary's word for the same thing.
NOT_OURS = {
    "开发集": "验证集",
    "语料库": "语料",
    "训练目录": "运行目录",
    "提交文件": "提交包",
    "词语切分": "切词",
    "微批次": "微批",
    "校验点": "检查点",
}


def _english(page: Path) -> Path:
    return page.with_name(page.name.replace(".zh-CN", ""))


def _is_twin(page: Path) -> bool:
    return page.with_name(page.name.replace(".md", ".zh-CN.md")).is_file()


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _prose(text: str) -> str:
    return FENCE.sub("", text)


def _sections(text: str) -> list[str]:
    """The prose of a page, cut before each heading."""
    return re.split(r"^(?=##* )", _prose(text), flags=re.MULTILINE)


def _numbers(text: str) -> Counter[float]:
    """The numbers that a text has in digits, whatever their form: 1,600 万 is 16 million."""
    text = MONTH.sub(lambda month: str(MONTHS.split().index(month[1]) + 1), LINK.sub("]", text))
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    return Counter(round(float(n) * UNITS.get(unit, 1), 9) for n, unit in NUMBER.findall(text))


def _code(text: str) -> set[str]:
    return {" ".join(code.split()) for code in re.findall(r"`([^`]+)`", _prose(text))}


def _blocks(text: str) -> list[tuple[str, str]]:
    """Code blocks without comments, which are translated, and the directives of the API pages."""
    blocks = [
        (language, block if language == "json" else COMMENT.sub("", block))
        for language, block in FENCE.findall(text)
    ]
    return blocks + [("", line) for line in re.findall(r"^(?::::| {4}).*", _prose(text), re.M)]


def _links(text: str) -> Counter[str]:
    targets = (target.partition("#")[0] for target in LINK.findall(_prose(text)))
    return Counter(target.replace(".zh-CN", "") for target in targets)


def _differences(page: Path) -> list[str]:
    """What the Chinese page and the English page don't share."""
    english, chinese = (path.read_text("utf-8") for path in (_english(page), page))
    found = []
    pairs = {"blocks": _blocks, "code": _code, "links": _links}
    for what, read in pairs.items():
        ours, theirs = read(english), read(chinese)
        if ours != theirs:
            only = [part for part in theirs if part not in ours]
            missing = [part for part in ours if part not in theirs]
            found.append(f"{what}: the Chinese page lacks {missing} and alone has {only}")
    ours, theirs = _sections(english), _sections(chinese)
    levels = [[section.partition(" ")[0] for section in part] for part in (ours, theirs)]
    if levels[0] != levels[1]:
        return [*found, "the headings are others"]
    for here, there in zip(ours, theirs, strict=True):
        title = there.partition("\n")[0]
        missing, more = _numbers(here) - _numbers(there), _numbers(there) - _numbers(here)
        if missing or more:
            found.append(f"{title}: lacks the numbers {dict(missing)}, alone has {dict(more)}")
        rows = [len(re.findall(r"^ *\|", part, re.MULTILINE)) for part in (here, there)]
        if rows[0] != rows[1]:
            found.append(f"{title}: {rows[1]} rows of tables instead of {rows[0]}")
    return found


def _module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_each_page_of_docs_is_there_in_chinese() -> None:
    english = [p for p in (ROOT / "docs").rglob("*.md") if not p.name.endswith(".zh-CN.md")]
    missing = [_name(page) for page in english if not _is_twin(page)]
    assert not missing, "write X.zh-CN.md beside each of these pages"


@pytest.mark.parametrize("page", TWINS, ids=_name)
def test_a_chinese_page_has_the_facts_of_the_english_one(page: Path) -> None:
    differences = _differences(page)
    assert not differences, f"{_name(page)} and {_name(_english(page))}:\n" + "\n".join(differences)


@pytest.mark.parametrize("page", TWINS, ids=_name)
def test_a_chinese_page_links_to_chinese_pages(page: Path) -> None:
    """Only the link between the languages of a page, at its top, leads to an English page."""
    for target in LINK.findall(_prose(page.read_text("utf-8"))):
        path = (page.parent / target.partition("#")[0]).resolve()
        if path.suffix == ".md" and path != _english(page) and not path.name.endswith(".zh-CN.md"):
            assert not _is_twin(path), f"{_name(page)} links to {target}"


def test_both_glossaries_have_the_same_terms() -> None:
    english, chinese = (
        re.findall(
            r"^\| ([^|\n]+) \| ([^|\n]+) \|", (ROOT / "docs" / name).read_text("utf-8"), re.M
        )
        for name in ("glossary.md", "glossary.zh-CN.md")
    )
    assert [pair for pair in english if pair != ("word", "Chinese")] == [
        (word, term) for term, word in chinese if term != "术语"
    ]


@pytest.mark.parametrize("page", TWINS, ids=_name)
def test_chinese_pages_use_the_terms_of_the_glossary(page: Path) -> None:
    text = LINK.sub("]", re.sub(r"`[^`]*`", "", _prose(page.read_text("utf-8"))))
    found = {word: term for word, term in NOT_OURS.items() if word in text}
    assert not found, f"{_name(page)}: write the glossary's words"


def test_each_key_of_the_config_is_described_in_chinese() -> None:
    renderer = _module("docs/render_config.py")
    words = renderer.chinese()  # a key that occurs twice in the file is an error there
    keys, names = {}, []
    for name, _, fields in renderer.sections():
        names.append(name)
        keys |= fields
    assert list(words.sections) == names
    assert list(words.keys) == list(keys), "docs/config.zh-CN.yaml: in the order of the page"
    identifier = re.compile(r"\b[a-z]\w*(?:[._/]\w+)+")
    for key, field in keys.items():
        ours, theirs = field.description.replace(".md", ".zh-CN.md"), words.keys[key]
        assert set(identifier.findall(ours)) == set(identifier.findall(theirs)), key
        assert _numbers(ours) == _numbers(theirs), key
    page = (ROOT / "docs" / "config.zh-CN.md").read_text("utf-8")
    assert page == renderer.render(words), (
        "python docs/render_config.py zh-CN > docs/config.zh-CN.md"
    )


def test_soak_pages_are_what_the_report_says() -> None:
    writer = _module("tests/faults/soak_page.py")
    assert list(writer.CHINESE_FAULTS) == list(writer.FAULTS)
    report = json.loads((ROOT / "benchmarks" / "results" / "soak.json").read_text("utf-8"))
    for language, name in (("en", "soak.md"), ("zh-CN", "soak.zh-CN.md")):
        page = (ROOT / "docs" / name).read_text("utf-8")
        assert page == writer.page(report, language), "run: python tests/faults/soak_page.py"
