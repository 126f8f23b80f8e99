"""Files of tasks: what is read, what is counted, and every mistake with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clue_ds.errors import UserError
from clue_ds.tasks import examples, registry
from clue_ds.tasks.examples import Example

TNEWS, CMNLI, AFQMC = map(registry.get, ("tnews", "cmnli", "afqmc"))


def write(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def pair(label: str, **more: object) -> dict[str, object]:
    return {"sentence1": "甲", "sentence2": "乙", "label": label, **more}


def test_lines_without_an_agreed_label_are_skipped_and_counted(tmp_path: Path) -> None:
    """Upstream read them as a fourth class, or broke."""
    path = write(tmp_path / "a.json", pair("neutral"), pair("-"), pair("entailment"), pair("-"))
    found = examples.read(CMNLI, path)
    assert [(e.id, e.label) for e in found] == [(0, "neutral"), (2, "entailment")]
    assert found.num_skipped == 2


def test_ids_are_the_files_own_and_unlabelled_files_need_no_label(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", {"id": 7, "sentence": "文\u2028本"}, "", {"sentence": "二"})
    expected = [Example(7, "文\u2028本", None), Example(1, "二", None)]
    assert examples.read(TNEWS, path, labelled=False) == expected


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"sentence": "a", "label": "100"}', '{"sentence": '], r"a\.json:2: not JSON"),
        (["", '{"sentence": "a", "label": "105"}'], r"a\.json:2: label '105' is not one of tnews"),
        (['{"sentence": "a"}'], r"a\.json:1: no field 'label' \(has sentence\)"),
        (['{"text": "a", "label": "100"}'], r"a\.json:1: no field 'sentence' \(has text, label\)"),
        (['{"sentence": null, "label": "100"}'], r"a\.json:1: null is not text"),
        (['{"sentence": "a", "label": null}'], r"a\.json:1: the label is null"),
        (['{"sentence": "a", "label": 100.0}'], r"a\.json:1: label 100\.0 must be a string"),
        (['{"sentence": "a", "label": NaN}'], r"a\.json:1: not JSON: NaN"),
        (['{"sentence": "a", "label": "100", "id": 1.5}'], r"a\.json:1: id 1\.5 must be a whole"),
        (["", "[" * 200_000], r"a\.json:2: not JSON: nested too deeply"),
        (['[{"sentence": "a"},'], r"a\.json:1: a JSON array begins here; write one JSON object"),
        (['{"sentence": " ", "label": "100"}'], r"a\.json:1: the text is empty"),
        (["", "[1]"], r"a\.json:2: a line must be a JSON object"),
        ([""], r"a\.json has no examples"),
    ],
)
def test_each_mistake_names_file_and_line(lines: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        examples.read(TNEWS, write(tmp_path / "a.json", *lines))


def test_the_same_lines_are_read_the_same_from_every_format(tmp_path: Path) -> None:
    """A byte order mark, CRLF, trailing spaces, and blank lines change nothing."""
    rows = {
        "a.json": [
            '{"sentence": "一", "label": 100, "id": null} ',
            '{"sentence": "二", "label": "101 "}',
        ],
        "a.tsv": ["sentence\tlabel ", "一\t100", "二\t101 "],
        "a.csv": ["sentence,label", '"一",100', "二,101 "],
    }
    expected = [Example(0, "一", "100"), Example(1, "二", "101")]
    for name, lines in rows.items():
        for mark, end, last in (("", "\n", ""), ("\ufeff", "\r\n", " \r\n\r\n")):
            path = tmp_path / name
            path.write_text(mark + "".join(x + end for x in lines) + last, "utf-8", newline="")
            assert examples.read(TNEWS, path) == expected, (name, mark)


def test_a_column_that_is_named_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "label,sentence,label", "100,a,101")
    with pytest.raises(UserError, match=r"a\.csv:1: two columns have the same name"):
        examples.read(TNEWS, path)


def test_null_is_not_the_label_none(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("name: t\ntext: [sentence]\nlabels: [None, x]\n")
    path = write(tmp_path / "a.json", {"sentence": "a", "label": None})
    with pytest.raises(UserError, match=r"a\.json:1: the label is null"):
        examples.read(registry.get(tmp_path / "t.yaml"), path)


def test_files_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    (tmp_path / "gbk.json").write_bytes(b'{"sentence": "a"}\n' + "中文".encode("gbk"))
    with pytest.raises(UserError, match=r"gbk\.json:2: not UTF-8"):
        examples.read(TNEWS, tmp_path / "gbk.json", labelled=False)
    with pytest.raises(UserError, match="must end with .json"):
        examples.read(TNEWS, write(tmp_path / "a.txt", "x"))
    with pytest.raises(UserError, match="does not exist"):
        examples.read(TNEWS, tmp_path / "none.json")
    with pytest.raises(UserError, match=r"all 1 lines are without a label"):
        examples.read(CMNLI, write(tmp_path / "b.json", pair("-")))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"keyword": "甲", "abst": "x", "label": "0"}, "must be a list"),
        ({"keyword": [1], "abst": "x", "label": "0"}, "can't be read for csl"),
    ],
)
def test_csl_keywords_must_be_a_list(row: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"a\.json:1: .*{message}"):
        examples.read(registry.get("csl"), write(tmp_path / "a.json", row))


def test_wsc_span_that_is_elsewhere(tmp_path: Path) -> None:
    target = {"span1_text": "甲", "span1_index": 1, "span2_text": "乙", "span2_index": 0}
    path = write(tmp_path / "a.json", {"text": "甲乙", "target": target, "label": "true"})
    with pytest.raises(UserError, match=r"a\.json:1: .*'甲' is not at character 1"):
        examples.read(registry.get("cluewsc2020"), path)


def test_a_text_of_100_000_characters_is_one_message(tmp_path: Path) -> None:
    for length in (50_000, 100_000, 200_000):  # the last is beyond Python's own limit for CSV too
        text = "长" * length
        for name, lines in (
            ("a.json", ['{"sentence": "a"}', json.dumps({"sentence": text})]),
            ("a.csv", ["sentence", "a", text]),
        ):
            path = write(tmp_path / name, *lines)
            if length == 50_000:
                assert examples.read(TNEWS, path, labelled=False)[1].text == text
                continue
            line = 2 if name == "a.json" else 3
            with pytest.raises(UserError, match=rf"{name}:{line}: a text of {length:,} characters"):
                examples.read(TNEWS, path, labelled=False)


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("a.tsv", ["label\tsentence", "100"], r"a\.tsv:2: 1 columns, but the first line names 2"),
        ("a.csv", ["label,sentence", '100,"一\n二"', "x,三"], r"a\.csv:4: label 'x'"),
        ("a.csv", ["label,sentence", '100,"一'], r"a\.csv:2: not CSV"),
    ],
)
def test_mistakes_in_tables(name: str, lines: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        examples.read(TNEWS, write(tmp_path / name, *lines))


def test_files_are_found_beside_each_other_and_in_folders(tmp_path: Path) -> None:
    path = write(tmp_path / "train.json", {})
    assert examples.find(AFQMC, tmp_path, "train") == path
    folder = tmp_path / "afqmc_public"
    folder.mkdir()
    inner = write(folder / "train.json", {})
    assert examples.find(AFQMC, tmp_path, "train") == inner
    write(folder / "train.tsv", "")
    with pytest.raises(UserError, match="both exist"):
        examples.find(AFQMC, tmp_path, "train")
    with pytest.raises(UserError, match=r"has no afqmc_public/dev\.json"):
        examples.find(AFQMC, tmp_path, "dev")
    with pytest.raises(UserError, match="does not exist"):
        examples.find(AFQMC, tmp_path / "none", "dev")


def test_tnews_1_0_and_1_1_are_told_apart_by_what_they_say(tmp_path: Path) -> None:
    old = write(tmp_path / "old.json", {"sentence": "一", "keywords": ""}, {"keywords": "词,词"})
    new = write(tmp_path / "new.json", {"sentence": "一", "keywords": ""})
    assert (examples.version_of(TNEWS, old), examples.version_of(TNEWS, new)) == ("1.0", "1.1")
    with pytest.raises(UserError, match="afqmc has no test set 1.0"):
        examples.find(AFQMC, tmp_path, "test", "1.0")


def test_shared_files_are_read_whole(shared_data: Path) -> None:
    data = shared_data / "clue"
    counts = {}
    for name in registry.ALL:
        task = registry.get(name)
        # Of ChID's two test sets, the data has a part of the older one.
        version = next(iter(examples.test_files(task, data)))
        splits = ("train", "dev", "test")
        files = {
            s: examples.read(task, examples.find(task, data, s, version), s != "test")
            for s in splits
        }
        counts[name] = tuple(len(files[split]) for split in splits)
        if task.kind in ("single", "pair"):
            assert {e.label for e in files["train"]} == set(task.labels)
    assert counts["afqmc"] == (34_334, 4_316, 3_861)
    assert counts["tnews"] == (53_360, 10_000, 10_000)
    assert counts["cmnli"] == (10_000, 2_241, 2_241)
    assert counts["cluener"] == (10_748, 1_343, 1_345)
    for version in ("1.0", "1.1"):
        path = examples.find(TNEWS, data, "test", version)
        assert examples.version_of(TNEWS, path) == version
