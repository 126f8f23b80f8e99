"""A submission is complete, in order and legal, or refused with every mistake in it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from clue_ds.errors import UserError
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
        (lambda rows: rows[2].update(label=102), [":3: label 102 is not one"]),
        (lambda rows: rows[1].pop("label"), [':2: not {"id"']),
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


def test_mistakes_of_all_files_come_together(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tnews_predict.json", "{}\n")
        archive.writestr("cls_predict.json", "{}\n")
        archive.writestr("csl_predict.json", '{"id": 0, "label": "2"}\nnothing\n')
    with pytest.raises(UserError) as caught:
        submit.submit(data, check=path)
    for message in (
        "call it tnews11_predict.json or tnews10_predict.json",
        "cls_predict.json is not a file name that CLUE accepts",
        "csl_predict.json:1: label '2'",
        "csl_predict.json:2: not {",
    ):
        assert message in str(caught.value)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match="not a complete zip"):
        submit.submit(data, check=path)


def test_a_test_set_under_the_other_versions_name_is_refused(data: Path) -> None:
    folder = data / "tnews_public"
    (folder / "test.json").write_bytes((folder / "test1.0.json").read_bytes())
    with pytest.raises(UserError, match=r"is test set 1.0 of tnews by its content, not 1.1"):
        submit.open_test(TASKS["tnews"], data, "1.1")


def test_published_samples_are_accepted(shared_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "samples.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for sample in sorted((shared_data / "fixtures" / "submit_example").glob("*.json")):
            archive.write(sample, sample.name)
    found = submit.check_zip(path, shared_data / "clue")
    assert {test.task.name: len(test.examples) for test in found} == {
        "csl": 3_000, "cluewsc2020": 290,
    }  # fmt: skip
