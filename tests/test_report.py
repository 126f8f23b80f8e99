"""The page about pretraining: what it draws and says, also of runs that lack most files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ranks import make_corpus

from clue_ds import config as run_config
from clue_ds.data import Corpus
from clue_ds.data.build.report import ranges
from clue_ds.errors import UserError
from clue_ds.report import charts
from clue_ds.report.charts import Curve
from clue_ds.report.command import report


def make_run(directory: Path, corpus: str = "nowhere", **train: Any) -> Path:
    (directory / "checkpoints" / "step-00000400").mkdir(parents=True)
    given = {"run_dir": str(directory), "data": {"corpus": corpus}, "train": train}
    run_config.save(run_config.validate(given, "test"), directory / "config.yaml")
    lines = [
        {"step": step, "loss": 9 - step / 100, "lr": 1e-4, "mfu": None, "data_wait_ms": step}
        for step in range(1, 502, 5)
    ]
    lines[40] |= {"held_out_loss": 5.5}
    events = [
        {"event": "start", "step": 0, "machine": "8 ranks", "versions": {"torch": "2.13.0"}},
        {"event": "saved", "step": 200, "seconds": 2.0},
        {"event": "start", "step": 200, "machine": "4 ranks", "versions": {"torch": "2.14.0"}},
        {"event": "saved", "step": 400, "seconds": 4.0},
    ]
    for name, records in (("log", lines), ("events", events)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (directory / f"{name}.jsonl").write_text(text + '{"step": 5', encoding="utf-8")
    return directory


def test_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a<b", lr=3e-4, steps=1_000, warmup_steps=10)
    report((run,))
    assert capsys.readouterr().out == f"wrote {run / 'report.html'}\n"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "http" not in page and "a<b" not in page and "a&lt;b" in page
    titles = re.findall("<figcaption>(.*?)<", page)
    assert titles == [
        *("Training loss", "Loss on held-out text", "Learning rate"),
        "Waiting for data, ms per step",
    ]
    assert page.count('class="restart"') == 4  # one restart in each chart
    assert "501 of 1,000 (50.1%)" in page and "5.5000 (step 201)" in page
    assert "Saved 2 times, 3.0 s each on average; checkpoints kept: after step 400." in page
    assert "8 ranks; 4 ranks" in page and "torch 2.14.0" in page
    assert "<td>train.lr</td><td>0.0003</td><td>0.0001</td>" in page
    assert "nowhere is not there any more" in page


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    runs = tuple(make_run(tmp_path / name, lr=lr) for name, lr in (("one", 1e-4), ("two", 2e-4)))
    report(runs, tmp_path / "new" / "page.html")
    page = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert page.count('class="curve"') == 2 * 4
    row = '<tr class="differs"><td>train.lr</td><td>0.0001</td><td>0.0002</td><td>0.0001</td>'
    assert row in page and '<tr class="differs"><td>train.steps' not in page


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name in ("log", "events"):
        (run / f"{name}.jsonl").unlink()
    report((run,))
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "0 of 100,000 (0.0%)" in page and "<svg" not in page
    with pytest.raises(UserError, match="is not a pretraining run"):
        report((run, tmp_path))
    with pytest.raises(UserError, match="no finished run"):
        report((tmp_path,))


def test_axes_show_every_value_with_few_round_marks() -> None:
    for low, high in ((0.1, 9.9), (2.0, 2.0), (0.0, 0.0), (1e-7, 4e-4), (-3.0, 1e9), (7.4, 7.5)):
        first, last, marks = charts._scale(low, high)
        assert first <= low <= high <= last and 2 <= len(marks) <= 7, (low, high, marks)
    many = [(step, 0.5) for step in range(10_000)]
    drawn = charts.chart("t", [Curve("r", 0, many)], charts.short, 10_000)
    assert drawn.count("L") == charts.MOST_POINTS - 1
    assert charts.chart("t", [Curve("r", 0, [])], charts.short, 1) == ""


def test_a_corpus(tmp_path: Path, sample_text: str) -> None:
    corpus = make_corpus(tmp_path, sample_text)
    report((corpus,))
    page = (corpus / "report.html").read_text(encoding="utf-8")
    assert "http" not in page and page.count("<figure>") == 2
    assert Corpus(corpus).fingerprint in page and "<td>accepted</td>" in page
    assert re.search(r'<div class="bar"><span>\d+-\d+</span><i style="width:100.0%">', page)
    with pytest.raises(UserError, match="about one corpus"):
        report((corpus, corpus))


def test_ranges_say_both_ends() -> None:
    assert ranges({"1": 3, "2": 4, "4": 5, "128": 6}) == {"1": 3, "2": 4, "3-4": 5, "65-128": 6}
