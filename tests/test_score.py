"""The score table and the report, from finished runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_finetune import model as model  # the fixture
from test_finetune_runs import data as data  # the fixture

from clue_ds.errors import UserError
from clue_ds.export import command as export_command
from clue_ds.report.command import report
from clue_ds.tasks.finetune import command, score


@pytest.fixture(scope="module")
def output(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("output")
    task = (str(data / "tone.yaml"),)
    command.finetune(task, str(model), str(data), directory, epochs=1, seeds=2)
    return directory


def test_seeds_are_one_row_with_mean_and_deviation(output: Path) -> None:
    (group,) = score.collect((output,))
    accuracies = [100 * result["best"]["accuracy"] for result in group.results]
    assert len(accuracies) == 2
    mean, _, deviation = group.mean("accuracy").partition(" ± ")
    assert float(mean) == pytest.approx(sum(accuracies) / 2, abs=0.005)
    assert float(deviation) == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5, abs=0.01)
    text = score.as_markdown([group])
    assert all(about["sha256"] in text for about in group.results[0]["data"].values())
    assert "| RoBERTa-tiny-clue | test | 69.52 | 54.57 | 57.31 | 73.10 |  |" in text
    # Ours stands in the same table, in a column of its own, marked: it isn't CLUE's data.
    assert f" | dev |  |  |  |  | {group.mean('accuracy')}* |" in text
    assert "train 203, dev 45" in text


def test_the_report_needs_nothing_beside_it(output: Path) -> None:
    report((output,))
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4  # two pictures a seed
    assert "http" not in page and 'src="data:' in page
    assert "好" in page and "SHA-256" in page


def test_no_runs_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished run"):
        score.collect((tmp_path,))


def test_a_model_without_its_run_says_what_it_scored(output: Path, tmp_path: Path) -> None:
    model, own = output / "tone" / "best" / "model", tmp_path / "exported"
    export_command.export(str(model), output=own)
    export_command.export(str(model), output=tmp_path / "sent.zip", zip=True)
    (of_run,) = score.collect((model,))
    best = of_run.results[0]
    for place in (own, tmp_path / "sent.zip"):
        (group,) = score.collect((place,))
        assert (group.task, group.model, group.settings) == (
            of_run.task,
            of_run.model.rpartition("/")[2],
            of_run.settings,
        )
        assert group.results[0]["best"] == best["best"] and group.columns == of_run.columns
        text = score.as_markdown([group])
        assert "train 203, dev 45" in text
        assert all(about["sha256"] in text for about in best["data"].values())
        report((place,))
        page = tmp_path / f"{place.stem}-report.html"
        assert "in its run" in page.read_text(encoding="utf-8")
    with pytest.raises(UserError, match=r"nothing.zip"):
        score.collect((tmp_path / "nothing.zip",))


def test_a_model_without_a_score_or_settings_is_one_message(
    model: Path, output: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="has no task with a score on dev"):
        score.collect((model,))
    export_command.export(str(output / "tone" / "best"), output=tmp_path / "own")
    config = tmp_path / "own" / "config.json"
    values = json.loads(config.read_text("utf-8"))
    for part in ("recipe", "dev"):
        own = {key: value for key, value in values["clue_ds"].items() if key != part}
        config.write_text(json.dumps(values | {"clue_ds": own}), "utf-8")
        with pytest.raises(UserError, match="and the settings of its run"):
            score.collect((tmp_path / "own",))
