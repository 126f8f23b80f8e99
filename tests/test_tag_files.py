"""Files with entities: what is read from JSON lines and from columns, and every mistake in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clue_ds.errors import UserError
from clue_ds.tasks.kinds.tag import column_files, entities
from clue_ds.tasks.kinds.tag.entities import Entity

TYPES = ("name", "company")
TEXT = "浙商银行的叶老桂"
LABEL = {"name": {"叶老桂": [[5, 7]]}, "company": {"浙商银行": [[0, 3]]}}
FOUND = [Entity("company", 0, 4), Entity("name", 5, 8)]


def read(tmp_path: Path, text: str, name: str = "a.conll") -> list[tuple[int, dict[str, Any]]]:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return list(column_files.records(path, TYPES, "text", "label"))


def test_cluener_ends_are_inclusive_and_both_ways_agree() -> None:
    assert entities.parse(LABEL, TEXT, TYPES, "a:1") == FOUND
    assert entities.label_of(FOUND, TEXT) == LABEL
    assert entities.entities_of(LABEL) == FOUND
    twice = {"name": {"张": [[0, 0], [2, 2], [0, 0]]}}
    assert entities.parse(twice, "张和张", TYPES, "") == [
        Entity("name", 0, 1),
        Entity("name", 2, 3),
    ]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ([], r"^a\.json:3: the entities must be an object"),
        ({"place": {"浙商": [[0, 1]]}}, r"a\.json:3: 'place' is not one of .*: name, company;"),
        ({"name": [[0, 1]]}, r"a\.json:3: name must be an object"),
        ({"name": {"浙商": []}}, r"name '浙商' has no places"),
        ({"name": {"浙商": [0, 1]}}, r"name '浙商' is at 0; give \[first, last\]"),
        ({"name": {"浙商": [[0, True]]}}, r"is at \[0, True\]; give \[first, last\]"),
        ({"name": {"浙商": [[-1, 0]]}}, r"at \[-1, 0\], which is no range"),
        ({"name": {"浙商": [[1, 0]]}}, r"at \[1, 0\], which is no range"),
        ({"name": {"老桂": [[6, 8]]}}, r"\[6, 8\], beyond the text, .* 7 \(the second number is"),
        ({"name": {"老桂": [[6, 99]]}}, r"\[6, 99\], beyond the text, whose last character is 7;"),
        (
            {"name": {"老桂": [[5, 6]]}},
            r"has '叶老'; correct the numbers \('老桂' is at \[6, 7\]\)",
        ),
        ({"name": {"": [[5, 6]]}}, r"where the text has '叶老'; correct the numbers$"),
    ],
)
def test_each_mistake_in_a_label_says_where_and_what(label: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        entities.parse(label, TEXT, TYPES, "a.json:3")


def test_of_overlapping_entities_the_longest_stays() -> None:
    """CLUENER's train has a company inside the title of a book."""
    book, company, name = Entity("book", 2, 9), Entity("company", 3, 5), Entity("name", 9, 10)
    found = entities.ordered([company, name, book])
    assert entities.overlaps(found) == [(book, company)]
    assert entities.without_overlaps(found) == [book, name]
    assert entities.overlaps([Entity("a", 0, 9), Entity("b", 1, 2), Entity("c", 5, 6)]) == [
        (Entity("a", 0, 9), Entity("b", 1, 2)),
        (Entity("a", 0, 9), Entity("c", 5, 6)),
    ]


@pytest.mark.parametrize(
    ("tags", "scheme"),
    [
        ("B-company I-company I-company I-company O B-name I-name I-name", "BIO"),
        ("I-company I-company I-company I-company O I-name I-name I-name", "IOB1"),
        ("B-company I-company I-company E-company O B-name I-name E-name", "BIOES"),
        ("B-company M-company M-company E-company O B-name M-name E-name", "BMES"),
        ("B-company I-company I-company L-company O B-name I-name L-name", "BILOU"),
    ],
)
def test_columns_in_every_scheme_become_the_same_record(
    tags: str, scheme: str, tmp_path: Path
) -> None:
    for separator, end in (("\t", "\n"), (" ", "\r\n"), ("\tNN\t", "\n"), ("   ", " \n")):
        rows = [f"{c}{separator}{t}" for c, t in zip(TEXT, tags.split(), strict=True)]
        body = "\ufeff-DOCSTART- O\n\n" + end.join(rows) + end + " \t" + end * 2 + "张 S-name"
        assert read(tmp_path, body) == [
            (3, {"text": TEXT, "label": LABEL}),
            (13, {"text": "张", "label": {"name": {"张": [[0, 0]]}}}),
        ], (scheme, separator)


def test_characters_that_are_spaces_and_latin_words(tmp_path: Path) -> None:
    """U+3000 is a character of a column and no separator; a file of words has its spaces back."""
    body = "甲\tB-name\n\u3000\tI-name\n \tI-name\n乙\tI-name\n"
    ((_, record),) = read(tmp_path, body)
    assert record == {"text": "甲\u3000 乙", "label": {"name": {"甲\u3000 乙": [[0, 3]]}}}
    assert read(tmp_path, "\u3000 O\n\u3000 O\n")[0][1]["text"] == "\u3000\u3000"
    words = "Peking B-company\nUniversity I-company\n在 O\n中国 O\nI O\nB B-name\nM I-name\n"
    ((_, record),) = read(tmp_path, words)
    assert record["text"] == "Peking University在中国I BM".replace("I BM", "IBM")
    assert record["label"]["company"] == {"Peking University": [[0, 16]]}
    assert record["label"]["name"] == {"BM": [[21, 22]]}


def test_a_sentence_without_tags_is_a_record_without_a_label(tmp_path: Path) -> None:
    assert read(tmp_path, "甲\n乙\n\n丙\n") == [(1, {"text": "甲乙"}), (4, {"text": "丙"})]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("甲 O\n乙\n", r"a\.conll:2: '乙' has no tag, but other lines of the sentence have"),
        ("甲 O\n\n乙 B-place\n", r"a\.conll:3: 'place' is not one of the task's types"),
        ("甲 name\n", r"a\.conll:1: the last column of '甲' is 'name', which is no tag"),
        ("甲 X-name\n", r"'X-name', which is no tag; tags are O, B-TYPE"),
        ("甲 -name\n", r"'-name', which is no tag"),
        ("甲 B-\n", r"'B-', which is no tag"),
    ],
)
def test_each_mistake_in_columns_names_file_and_line(
    body: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, body)


def test_columns_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.bio"
    path.write_bytes("甲 O\n".encode() + "乙 O\n".encode("gbk"))
    with pytest.raises(UserError, match=r"a\.bio:2: not UTF-8"):
        list(column_files.records(path, TYPES, "text", "label"))
