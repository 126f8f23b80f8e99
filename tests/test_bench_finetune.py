"""The benchmarks of fine-tuning and the evidence, on a handful of examples; no time is checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_finetune import model as model  # the fixture
from test_finetune_runs import data as data  # the fixture
from test_finetune_runs import run_spec

from clue_ds.benchmarks import evidence
from clue_ds.benchmarks.finetune import finetune
from clue_ds.tasks.finetune import run

SENTENCES = ["今天天气很好", "股市大涨", "球队赢了", "新车上市"]


def write_tasks(directory: Path) -> Path:
    """A few lines of each of CLUE's tasks that the evidence uses."""
    single = [{"sentence": SENTENCES[i % 4], "label": "100"} for i in range(80)]
    pair = [{"sentence1": s, "sentence2": s[::-1], "label": "0"} for s in SENTENCES]
    passages = [
        [
            [s],
            [{"question": s, "choice": ["股市", "新车", "球队"][: 2 + i % 2], "answer": "股市"}],
            str(i),
        ]
        for i, s in enumerate(SENTENCES * 10)
    ]
    folder = directory / "c3_public"
    folder.mkdir(parents=True)
    (folder / "train.json").write_text(json.dumps(passages, ensure_ascii=False), "utf-8")
    rows = {
        "tnews": single,
        "iflytek": [{**row, "label": "7"} for row in single[:3]],
        "afqmc": pair,
        "cmnli": [{**row, "label": "neutral"} for row in pair],
    }
    for task, lines in rows.items():
        folder = directory / f"{task}_public"
        folder.mkdir(parents=True)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / "train.json").write_text(text, encoding="utf-8")
    return directory


@pytest.mark.parametrize(("task", "count", "batch_size"), [("tnews", 64, 16), ("c3", 20, 32)])
def test_finetune_benchmark_compares_losses_before_it_times(
    task: str, count: int, batch_size: int, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    clue = write_tasks(tmp_path / "clue")
    vocab = tmp_path / "vocab.txt"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({*"".join(SENTENCES)})]
    vocab.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    output = tmp_path / "finetune.json"
    finetune(clue, vocab, output, task, num_examples=64, turns=1)
    figures = json.loads(output.read_text())
    assert figures["num_examples"] == count and figures["batch_size"] == batch_size
    assert figures["largest_loss_difference"] < 1e-5
    assert {name: len(values) for name, values in figures["seconds"].items()} == {
        "clue_ds": 1,
        "Trainer": 1,
    }
    ours, theirs = (figures["seconds"][name][0] for name in ("clue_ds", "Trainer"))
    assert figures["ratio"] == pytest.approx(theirs / ours)
    assert figures["examples_per_second"]["clue_ds"] == pytest.approx(count / ours)


def test_finetune_benchmark_trains_the_trainers_model_of_span_reading(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    (tmp_path / "cmrc2018_public").mkdir()
    answers = [{"text": "天气", "answer_start": 2}]
    asked = [{"id": str(i), "question": "今天?", "answers": answers} for i in range(6)]
    content = {"data": [{"paragraphs": [{"context": SENTENCES[0] * 30, "qas": asked}]}]}
    path = tmp_path / "cmrc2018_public" / "train.json"
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    vocab = tmp_path / "vocab.txt"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({*"".join(SENTENCES)})]
    vocab.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    output = tmp_path / "span.json"
    finetune(tmp_path, vocab, output, "cmrc2018", num_examples=2, turns=1)
    figures = json.loads(output.read_text())
    assert figures["task"] == "cmrc2018" and figures["num_examples"] == 2
    assert figures["largest_loss_difference"] < 1e-5


def test_evidence_pretrains_on_training_texts_without_labels(tmp_path: Path) -> None:
    paths = evidence.write_texts(tmp_path / "text", write_tasks(tmp_path / "clue"))
    assert [path.name for path in paths] == [f"{task}.txt" for task in evidence.TASKS]
    tnews, afqmc = paths[0].read_text("utf-8"), paths[2].read_text("utf-8")
    assert tnews.strip().split("\n\n") == SENTENCES * 20
    assert afqmc.split("\n\n")[0].split("\n") == [SENTENCES[0], SENTENCES[0][::-1]]


def test_evidence_fine_tunes_each_task_with_its_own_settings_from_both_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verbs: list[list[str]] = []
    monkeypatch.setattr(evidence, "_verb", lambda *words: verbs.append([str(w) for w in words]))
    monkeypatch.setattr(evidence, "_row", lambda *arguments: {})
    monkeypatch.setattr(evidence, "_print", lambda figures: None)
    monkeypatch.setattr(evidence, "write_results", lambda path, figures: path.write_text(
        json.dumps(figures)))  # fmt: skip
    monkeypatch.setattr(evidence, "draw", lambda figures, picture: None)
    (tmp_path / "vocab.txt").touch()
    (tmp_path / "run.yaml").touch()
    evidence.evidence(
        tmp_path, tmp_path / "vocab.txt", tmp_path / "run.yaml", checkpoint=tmp_path / "run",
        work=tmp_path / "work", output=tmp_path / "out.json", tasks=("tnews", "cmnli"), epochs=2,
    )  # fmt: skip
    assert [verb[0] for verb in verbs] == ["export"] + 4 * ["finetune"]
    for verb, (start, task) in zip(
        verbs[1:], [(s, t) for s in ("pretrained", "from_scratch") for t in ("tnews", "cmnli")],
        strict=True,
    ):  # fmt: skip
        assert verb[verb.index("--output") + 1] == str(tmp_path / "work" / start)
        assert verb[verb.index("--task") + 1] == task
        assert ("--from-scratch" in verb) is (start == "from_scratch")
        own = evidence.COMMON | evidence.SETTINGS[task] | {"epochs": 2}
        for key, value in own.items():
            assert verb[verb.index(f"--{key.replace('_', '-')}") + 1] == str(value)
    settings = json.loads((tmp_path / "out.json").read_text())["settings"]
    assert settings["cmnli"] == evidence.COMMON | evidence.PAIRS | {"epochs": 2}


def test_evidence_takes_its_figures_from_the_runs(model: Path, data: Path, tmp_path: Path) -> None:
    accuracies: dict[str, list[float]] = {}
    for kind in evidence.STARTS:
        for seed in (42, 43):
            spec = run_spec(model, data, tmp_path / kind / "tone" / f"seed={seed}", epochs=1)
            spec.changes["seed"] = seed
            result = run.run(spec, show=False)
            accuracies.setdefault(kind, []).append(result["best"]["accuracy"])
    starts = {kind: (("tone",), model) for kind in evidence.STARTS}
    row = evidence._row(tmp_path, "tone", starts, 2)
    figures = {"tasks": {"tone": row}}
    for kind, values in accuracies.items():
        assert row[kind]["accuracy"] == pytest.approx(sum(values) / 2)
        assert row[kind]["deviation"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        assert row[kind]["by_epoch"] == [[value] for value in values]
    assert row["num_trained_on"] == 203
    evidence.draw(figures, tmp_path / "evidence.png")
    assert (tmp_path / "evidence.png").read_bytes().startswith(b"\x89PNG")
    evidence._print(figures)


def test_finetune_benchmark_trains_the_trainers_model_of_tagging(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    (tmp_path / "cluener_public").mkdir()
    label = {"name": {"天": [[1, 1]]}}
    rows = [json.dumps({"text": SENTENCES[0], "label": label}, ensure_ascii=False)] * 48
    (tmp_path / "cluener_public" / "train.json").write_text("\n".join(rows), encoding="utf-8")
    vocab = tmp_path / "vocab.txt"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({*"".join(SENTENCES)})]
    vocab.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    output = tmp_path / "tag.json"
    finetune(tmp_path, vocab, output, task="cluener", num_examples=32, turns=1)
    figures = json.loads(output.read_text())
    assert figures["task"] == "cluener" and figures["num_sequences"] == 32
    assert figures["largest_loss_difference"] < 1e-5
