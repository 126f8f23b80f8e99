"""A submission is complete, in order and legal, or refused with every mistake in it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from clue_ds.errors import UserError
from clue_ds.tasks import examples
from clue_ds.tasks.predict import submit
from clue_ds.tasks.registry import TASKS

Lines = list[dict[str, object]]


def write(path: Path, lines: Lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """TNEWS in both versions (1.0 has keywords), and CSL with ids that are not in order."""
    directory = tmp_path / "clue"
    for stem, keywords in (("test", ""), ("test1.0", "词")):
        rows: Lines = [{"id": i, "sentence": "新闻", "keywords": keywords} for i in range(4)]
        write(directory / "tnews_public" / f"{stem}.json", rows)
    rows = [{"id": i, "abst": "文", "keyword": ["词"]} for i in (7, 3, 9)]
    write(directory / "csl_public" / "test.json", rows)
    return directory


def answers(ids: list[int], label: str) -> Lines:
    return [{"id": i, "label": label, "probabilities": {}} for i in ids]


def test_both_versions_are_named_and_the_zip_has_the_published_form(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "answers"
    write(found / "tnews10_predict.json", answers([0, 1, 2, 3], "102"))
    write(found / "tnews11_predict.json", answers([0, 1, 2, 3], "103"))
    write(found / "csl_predict.json", answers([7, 3, 9], "1"))
    submit.submit(data, tmp_path / "s.zip", predictions=found)
    said = capsys.readouterr().out
    assert "test set 1.0 (test1.0.json" in said and "test set 1.1 (test.json" in said
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist()}
        record = json.loads(archive.comment)
    assert texts["csl_predict.json"] == "".join(f'{{"id": {i}, "label": "1"}}\n' for i in range(3))
    first = '{"id": 0, "label": "102", "label_desc": ""}'
    assert texts["tnews10_predict.json"].splitlines()[0] == first
    assert {name: entry["test"] for name, entry in record.items()} == {
        "csl_predict.json": "1.1", "tnews10_predict.json": "1.0", "tnews11_predict.json": "1.1",
    }  # fmt: skip
    submit.submit(data, check=tmp_path / "s.zip")


@pytest.mark.parametrize(
    ("spoil", "messages"),
    [
        (lambda rows: rows.pop(1), ["3 answers, but the test set has 4 lines", "ids missing: 1"]),
        (lambda rows: rows.reverse(), ["id 3 instead of 0"]),
        (lambda rows: rows.append(rows[0]), ["ids twice: 0"]),
        (lambda rows: rows[2].update(label="105"), [":3: label '105' is not one of tnews's"]),
        (
            lambda rows: rows[2].update(label=102),
            [':3: label 102 must be a string: write "label": "102"'],
        ),
        (lambda rows: rows[2].update(label=None), [":3: label null must be a string"]),
        (lambda rows: rows[1].pop("label"), [':2: not {"id"']),
        (lambda rows: rows[1].update(id="1"), [":2: id '1' instead of 1; the id must be a number"]),
        (lambda rows: rows[1].update(id=True), ["ids missing: 1", "ids unknown: True"]),
        (lambda rows: rows[3].update(id=30), ["ids missing: 3", "ids unknown: 30"]),
    ],
)
def test_a_wrong_file_is_refused(
    spoil: Callable[[Lines], object], messages: list[str], data: Path, tmp_path: Path
) -> None:
    rows = answers([0, 1, 2, 3], "102")
    spoil(rows)
    write(tmp_path / "answers" / "tnews11_predict.json", rows)
    with pytest.raises(UserError) as caught:
        submit.submit(data, tmp_path / "s.zip", predictions=tmp_path / "answers")
    for message in messages:
        assert message in str(caught.value)
    assert not (tmp_path / "s.zip").exists()


def zipped(path: Path, **contents: str | bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(f"{name}.json", content)
    return path


def test_mistakes_of_all_files_come_together(data: Path, tmp_path: Path) -> None:
    path = zipped(
        tmp_path / "s.zip",
        tnews_predict="{}\n",
        cls_predict="{}\n",
        **{"answers/tnews11_predict": "{}\n"},
        csl_predict='{"id": 0, "label": "2"}\nnothing\n',
    )
    with pytest.raises(UserError) as caught:
        submit.submit(data, check=path)
    for message in (
        "called tnews11_predict.json (test set 1.1) or tnews10_predict.json (test set 1.0)",
        "cls_predict.json is not a file name that CLUE accepts",
        "answers/tnews11_predict.json is not a file name that CLUE accepts; the files must be in",
        "csl_predict.json:1: label '2'",
        "csl_predict.json:2: not JSON",
    ):
        assert message in str(caught.value)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match="not a complete zip"):
        submit.submit(data, check=path)


def test_what_the_scorer_would_stumble_over(data: Path, tmp_path: Path) -> None:
    """CLUE scores line by line, so a blank line or a byte order mark shifts or spoils answers.

    The same bytes as predictions are harmless, because the zip is written anew.
    """
    lines = [json.dumps(row) for row in answers([7, 3, 9], "1")]
    spoiled = {
        ":1: begins with a byte order mark": "\ufeff" + "\n".join(lines),
        ":2: a blank line": "\n".join([lines[0], " ", *lines[1:]]) + "\n",
        ":4: a blank line": "\r\n".join(lines) + "\r\n\r\n",
    }
    for message, text in spoiled.items():
        path = zipped(tmp_path / "s.zip", csl_predict=text)
        with pytest.raises(UserError, match=f"1 mistake:\n.*csl_predict.json{message}"):
            submit.submit(data, check=path)
        (tmp_path / "answers").mkdir(exist_ok=True)
        (tmp_path / "answers" / "csl_predict.json").write_text(text, encoding="utf-8", newline="")
        submit.submit(data, path, predictions=tmp_path / "answers", force=True)
        assert zipfile.ZipFile(path).read("csl_predict.json").count(b'"label": "1"') == 3
    submit.submit(data, check=zipped(tmp_path / "s.zip", csl_predict="\r\n".join(lines) + "  \n"))


@pytest.fixture
def wsc(tmp_path: Path) -> Path:
    """CLUEWSC2020 as CLUE's archive of 2021 has it: test.json is 1.1 and test1.0.json is 1.0."""
    target = {"span1_text": "甲", "span1_index": 0, "span2_text": "乙", "span2_index": 1}
    for name, count, first in (("test", 2_574, 0), ("test1.0", 290, 1)):
        rows: Lines = [{"id": first + i, "text": "甲乙", "target": target} for i in range(count)]
        write(tmp_path / "clue" / "cluewsc2020_public" / f"{name}.json", rows)
    return tmp_path / "clue"


def test_cluewsc_has_two_test_sets_with_names_of_their_own(
    wsc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """290 answers were taken for the only test set, called 1.1, and given a name that scores 0."""
    for name, count in (("cluewsc11", 2_574), ("cluewsc10", 290)):
        rows = answers(list(range(count)), "true")
        write(tmp_path / "answers" / f"{name}_predict.json", rows)
    submit.submit(wsc, tmp_path / "s.zip", predictions=tmp_path / "answers")
    said = capsys.readouterr().out
    assert "cluewsc11_predict.json: 2,574 answers to cluewsc2020's test set 1.1 (test.json" in said
    assert "cluewsc10_predict.json: 290 answers to cluewsc2020's test set 1.0 (test1.0.js" in said
    assert said.count("name from CLUE's submission guide of 2021-09-04") == 2
    assert "WARNING" not in said


@pytest.mark.parametrize("old", ["cluewsc2020_predict.json", "wsc_predict.json"])
def test_an_old_name_is_explained_and_can_be_kept(old: str, wsc: Path, tmp_path: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in answers(list(range(290)), "true"))
    path = zipped(tmp_path / "s.zip", **{old.removesuffix(".json"): text})
    with pytest.raises(UserError) as caught:
        submit.submit(wsc, check=path)
    for message in ("it is an old name", "cluewsc10_predict.json (test set 1.0)", "scores 0", old):
        assert message in str(caught.value)
    with pytest.raises(UserError, match="has the test sets 1.1, 1.0; write cluewsc2020:1.1=FILE"):
        submit.submit(wsc, check=path, name=(f"cluewsc2020={old}",))
    submit.submit(wsc, check=path, name=(f"cluewsc2020:1.0={old}",))
    with pytest.raises(UserError, match="ocnli_50k_predict.json"):
        submit.submit(wsc, check=zipped(path, ocnli_predict=text))


def test_the_old_archives_test_set_is_known_by_its_content(
    wsc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In CLUE's archive of 2020 the 290 lines are called test.json, as those of 1.1 are now."""
    folder = wsc / "cluewsc2020_public"
    (folder / "test1.0.json").replace(folder / "test.json")
    write(tmp_path / "answers" / "cluewsc10_predict.json", answers(list(range(290)), "true"))
    submit.submit(wsc, tmp_path / "s.zip", predictions=tmp_path / "answers")
    assert "290 answers to cluewsc2020's test set 1.0 (test.json" in capsys.readouterr().out
    write(tmp_path / "other" / "cluewsc11_predict.json", answers(list(range(290)), "true"))
    with pytest.raises(
        UserError, match=r"is test set 1\.0 .*, not 1\.1; its answers are called clu"
    ):
        submit.submit(wsc, tmp_path / "t.zip", predictions=tmp_path / "other")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("cluewsc2020", "write TASK=FILE"),
        ("wsc=a.json", "with a task of afqmc"),
        ("csl=a/b.json", "without a directory"),
        ("csl=afqmc_predict.json", "would both be called afqmc_predict.json"),
        ("csl:1.0=a.json", "has the test sets 1.1"),
    ],
)
def test_mistakes_in_a_name(word: str, message: str, data: Path) -> None:
    with pytest.raises(UserError, match=message):
        submit.Names(data, (word,))


def test_a_test_set_under_the_other_versions_name_is_refused(data: Path) -> None:
    folder = data / "tnews_public"
    (folder / "test.json").write_bytes((folder / "test1.0.json").read_bytes())
    with pytest.raises(UserError, match=r"is test set 1.0 of tnews by its content, not 1.1"):
        submit.open_test(TASKS["tnews"], "1.1", submit.Names(data))


def test_published_samples_are_accepted(shared_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "samples.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for sample in sorted((shared_data / "fixtures" / "submit_example").glob("*.json")):
            archive.write(sample, sample.name)
    # CLUE's sample of 2020 has the name that the guide of 2021 replaced.
    names = submit.Names(shared_data / "clue", ("cluewsc2020=cluewsc2020_predict.json",))
    found = submit.check_zip(path, names)
    assert {(test.task.name, test.version): len(test.examples) for test in found} == {
        ("csl", "1.1"): 3_000, ("cluewsc2020", "1.0"): 290,
    }  # fmt: skip


def test_both_published_test_sets_of_cluewsc_are_recognized(shared_data: Path) -> None:
    found = examples.test_files(TASKS["cluewsc2020"], shared_data / "clue11")
    assert {version: path.name for version, path in found.items()} == {
        "1.1": "test.json", "1.0": "test1.0.json",
    }  # fmt: skip
    counts = [len(examples.read(TASKS["cluewsc2020"], p, labelled=False)) for p in found.values()]
    assert counts == [2_574, 290]
