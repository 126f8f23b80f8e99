"""The table of CLUE's tasks, and custom ones from YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from clue_ds import presets
from clue_ds.errors import UserError
from clue_ds.tasks import registry

GOOD = "name: mine\ntext: [title, body]\nlabels: [0, 1]\nlabel: sentiment\nlr: 3e-4\n"


def test_csl_is_spelled_csl_and_every_task_is_under_its_own_name() -> None:
    """Upstream's metric table said "cls", so CSL's scores were never computed."""
    assert "csl" in registry.TASKS and "cls" not in registry.TASKS
    assert all(name == task.name for name, task in registry.TASKS.items())
    assert set(registry.ALL) < set(registry.TASKS)


def test_cmnli_reads_label() -> None:
    """Upstream read `gold_label`, a field that CLUE's CMNLI files have not."""
    assert registry.get("cmnli").label_field == "label"


def test_number_of_labels() -> None:
    counts = {name: len(registry.get(name).labels) for name in registry.ALL}
    assert {name: count for name, count in counts.items() if count} == dict(
        afqmc=2, tnews=15, iflytek=119, cmnli=3, csl=2, cluewsc2020=2, cluener=21
    )
    assert not {"105", "111"} & set(registry.get("tnews").labels)


@pytest.mark.parametrize(
    ("task", "large", "small"),
    [
        ("afqmc", (128, 16, 2e-5, 3), (128, 16, 1e-4, 5)),
        ("tnews", (128, 16, 2e-5, 3), (128, 16, 1e-4, 5)),
        ("iflytek", (128, 32, 2e-5, 3), (128, 32, 1e-4, 5)),
        ("cmnli", (128, 64, 3e-5, 2), (128, 64, 1e-4, 5)),
        ("csl", (256, 16, 1e-5, 5), (128, 16, 1e-4, 5)),
        ("cluewsc2020", (128, 16, 1e-5, 10), (128, 16, 1e-4, 50)),
        ("cluener", (128, 24, 3e-5, 4), (128, 24, 1e-4, 5)),
    ],
)
def test_settings_of_clues_scripts_and_of_upstreams_advice(
    task: str, large: tuple, small: tuple
) -> None:
    """Length, batch, rate and epochs; the advice for small models is 1e-4 and 5 to 8 epochs."""
    row = registry.get(task)
    assert row.settings_for(presets.get("bert_base_clue")) == registry.Settings(*large)
    assert row.settings_for(presets.get("roberta_tiny_clue")) == registry.Settings(*small)


def test_texts() -> None:
    csl = registry.get("csl").text({"keyword": ["甲", "乙"], "abst": "摘要"})
    assert csl == ("甲 乙", "摘要")
    target = {"span1_text": "舌头", "span1_index": 3, "span2_text": "它", "span2_index": 0}
    wsc = registry.get("cluewsc2020")
    assert wsc.text({"text": "它是那舌头", "target": target}) == "[它]是那_舌头_"


def test_custom_task_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD, encoding="utf-8")
    task = registry.get(path)
    assert (task.name, task.kind, task.labels) == ("mine", "pair", ("0", "1"))
    assert task.text({"title": "甲", "body": "乙"}) == ("甲", "乙")
    assert task.settings.lr == task.settings_for(presets.get("roberta_tiny_clue")).lr == 3e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "lable: x\n", "unknown key lable; did you mean label"),
        (GOOD.replace("[0, 1]", "[0, 0]"), "listed twice"),
        (GOOD.replace("name: mine", "name: tnews"), "taken by CLUE's own"),
        (GOOD.replace("text: [title, body]\n", ""), "missing key text"),
    ],
)
def test_mistakes_in_a_yaml_file(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        registry.get(path)


def test_unknown_task() -> None:
    with pytest.raises(UserError, match="no task 'tnew'; tasks: afqmc"):
        registry.get("tnew")


def test_a_learning_rate_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_text("name: mine\ntext: [a]\nlabels: [x, y]\nlr: 1e400\n", encoding="utf-8")
    with pytest.raises(UserError, match="lr: Input should be a finite number"):
        registry.get(path)
