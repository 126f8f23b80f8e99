"""Span reading from files to answers: it learns, resumes, and others load what it leaves."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import SPECIAL
from test_finetune_runs import saved_steps

import clue_ds.export as export
from clue_ds.errors import UserError
from clue_ds.model import BertForPreTraining
from clue_ds.presets import ModelConfig
from clue_ds.tasks import Predictor, examples, features, kinds, registry
from clue_ds.tasks.encoded import encode
from clue_ds.tasks.finetune import command, run
from clue_ds.tasks.kinds.span.windows import Reading
from clue_ds.tasks.predict import command as predict_command
from clue_ds.tasks.predict import submit

FIRST, SECOND, OTHERS = "赵钱孙李", "明华国强", "一二三四五六七八九十天地人和风雨山水"
WORDS = [*SPECIAL, *FIRST, *SECOND, *OTHERS, "谁", "来", "?", "，"]
CONFIG = ModelConfig(
    vocab_size=len(WORDS),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
)
CHANGES: dict[str, Any] = {"epochs": 2, "batch_size": 16, "lr": 5e-3, "max_length": 32}
LOSS_TOLERANCE = 1e-6  # fp32, two layers, another order of addition; measured 1e-7


def questions(count: int, seed: int, longest: int = 50) -> dict[str, Any]:
    """Texts with one name in them, which is the answer to every question."""
    draws = random.Random(seed)
    paragraphs = []
    for number in range(count):
        text = draws.choices(OTHERS, k=draws.randrange(8, longest))
        name = draws.choice(FIRST) + draws.choice(SECOND)
        begin = draws.randrange(len(text))
        text.insert(begin, name)
        answers = [{"text": name, "answer_start": begin + (number == 0)}]
        question = {"id": f"Q_{number}", "question": "谁来?", "answers": answers}
        paragraphs.append({"context": "".join(text), "qas": [question]})
    return {"data": [{"paragraphs": paragraphs}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    (directory / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    torch.manual_seed(0)
    state = BertForPreTraining(CONFIG).state_dict()
    return export.save(CONFIG, state, directory / "vocab.txt", directory / "hf")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CMRC2018's folder, and the YAML file of a task that reads it."""
    directory = tmp_path_factory.mktemp("data")
    (directory / "cmrc2018_public").mkdir()
    for split, count in (("train", 200), ("dev", 40), ("test", 12)):
        content = questions(count, count)
        path = directory / "cmrc2018_public" / f"{split}.json"
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def finetuned(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    spec = run.RunSpec("cmrc2018", str(model), str(data), directory, CHANGES)
    run.run(spec, show=False)
    return directory


def result_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / run.RESULT).read_text("utf-8"))


def test_it_learns_and_says_how_well(finetuned: Path) -> None:
    result = result_of(finetuned)
    assert result["best"]["em"] > 0.9 and result["best"]["f1"] >= result["best"]["em"]
    assert [line["epoch"] for line in result["epochs"]] == [0.5, 1, 1.5, 2]
    (guess,) = result["baselines"].values()
    assert guess["em"] == 0 < guess["f1"] < result["best"]["f1"]
    assert [name for name, _ in result["columns"]] == ["em", "f1", "em_squad", "f1_squad"]


def test_an_interrupted_run_continues_bit_for_bit(
    finetuned: Path, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at the third measurement, it goes on from the second."""
    spec = run.RunSpec("cmrc2018", str(model), str(data), tmp_path / "run", CHANGES)

    def interrupt(path: Path, line: dict[str, Any]) -> None:
        if line["epoch"] == 1.5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run, "_write_epochs", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run.run(spec, show=False)
    assert saved_steps(spec.directory)[0] == 20
    resumed, whole = run.run(spec, show=False), result_of(finetuned)
    assert resumed["losses"] == whole["losses"] and resumed["epochs"] == whole["epochs"]


def test_corrected_places_are_printed(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.finetune(("cmrc2018",), str(model), str(data), tmp_path, epochs=1, limit=16)
    said = capsys.readouterr().out
    assert "cmrc2018, train.json: 1 answer(s) not at their answer_start" in said
    assert "dev EM" in said and "the first 30 characters of the context would give" in said


def test_the_loss_is_that_of_transformers(finetuned: Path, data: Path) -> None:
    """On sequences of one length: with padding, transformers' loss depends on its amount."""
    predictor = Predictor(finetuned / "model")
    kind = kinds.of(registry.get("cmrc2018"))
    read = examples.read(kind.task, data / "cmrc2018_public" / "dev.json")
    encoded = encode(kind, predictor.tokenizer, read, 32)
    rows = [i for i, unit in enumerate(encoded.units) if unit.size == 32][:16]
    units, targets = [encoded.units[i] for i in rows], [encoded.targets[i] for i in rows]
    assert (0, 0) in targets and len(set(targets)) > 4
    inputs = features.collate_units(units, predictor.tokenizer.pad_id)
    peer = transformers.AutoModelForQuestionAnswering.from_pretrained(finetuned / "model").eval()
    begin, end = torch.tensor(targets).T
    assert predictor.network is not None
    with torch.inference_mode():
        ours = kind.loss(predictor.network(**inputs), units, targets)
        inputs.pop("lengths")
        theirs = peer(**inputs, start_positions=begin, end_positions=end).loss
    assert float(ours) == pytest.approx(float(theirs), abs=LOSS_TOLERANCE)


def test_the_loss_does_not_depend_on_padding(finetuned: Path) -> None:
    predictor = Predictor(finetuned / "model")
    kind, network = predictor.kind, predictor.network
    assert kind is not None and network is not None
    readings = [Reading("谁来?", "一二三李明"), Reading("谁来?", "一二三李明" + "天地" * 9)]
    units = [kind.encode(predictor.tokenizer, reading, 32)[0] for reading in readings]
    targets = [(units[0].first + 3, units[0].first + 4)] * 2

    def loss(number_of_units: int) -> torch.Tensor:
        inputs = features.collate_units(units[:number_of_units], 0)
        outputs = network(**inputs)[:1]
        return kind.loss(outputs, units[:1], targets[:1])

    with torch.inference_mode():
        assert float(loss(2)) == pytest.approx(float(loss(1)), abs=LOSS_TOLERANCE)


def test_transformers_loads_the_model_and_answers_the_same(finetuned: Path, data: Path) -> None:
    """transformers 5 has no question-answering pipeline any more, so its steps are done here."""
    directory = finetuned / "model"
    peer, report = transformers.AutoModelForQuestionAnswering.from_pretrained(
        directory, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    predictor = Predictor(directory, max_length=64)
    content = json.loads((data / "cmrc2018_public" / "dev.json").read_text("utf-8"))
    for number, paragraph in enumerate(content["data"][0]["paragraphs"][:12]):
        context, question = paragraph["context"], paragraph["qas"][0]["question"]
        inputs = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
        offsets = inputs.pop("offset_mapping")[0].tolist()
        is_context = torch.tensor([part == 1 for part in inputs.sequence_ids(0)])
        with torch.inference_mode():
            out = peer.eval()(**inputs)
        begin, end = (
            logits[0].masked_fill(~is_context, -torch.inf).log_softmax(-1)
            for logits in (out.start_logits, out.end_logits)
        )
        scores = (
            (begin[:, None] + end[None])
            .triu()
            .masked_fill(~torch.ones_like(begin[:, None] + end[None]).triu().bool(), -torch.inf)
        )
        first, last = divmod(int(scores.argmax()), len(end))
        theirs = context[offsets[first][0] : offsets[last][1]]
        example = kinds.Example(number, Reading(question, context), None)
        (ours,) = predictor.answers([example])
        assert ours.value == theirs
        assert context[ours.details["start"] : ours.details["end"]] == ours.value
        assert ours.details["n_best"][0]["text"] == ours.value


def test_predictions_become_a_submission_and_so_does_the_model(
    finetuned: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found" / "cmrc2018_predict.json"
    test = data / "cmrc2018_public" / "test.json"
    predict_command.predict(finetuned / "model", file=test, output=out)
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [line["id"] for line in lines] == [f"Q_{i}" for i in range(12)]
    assert not any(line["truncated"] for line in lines)  # windows have the whole text
    submit.submit(data, tmp_path / "a.zip", predictions=tmp_path / "found")
    submit.submit(data, tmp_path / "b.zip", models=(finetuned / "model",))
    said = capsys.readouterr().out
    assert "cmrc2018_predict.json: 12 answers to cmrc2018's test set" in said
    assert "CLUE's test set 1.1 has 2,000 lines" in said
    with zipfile.ZipFile(tmp_path / "a.zip") as one, zipfile.ZipFile(tmp_path / "b.zip") as other:
        content = one.read("cmrc2018_predict.json")
        assert content == other.read("cmrc2018_predict.json")
    assert json.loads(content) == {line["id"]: line["answer"] for line in lines}
    out.write_text("\n".join(map(json.dumps, lines[1:])), encoding="utf-8")
    with pytest.raises(UserError, match=r"cmrc2018_predict\.json: 1 missing: Q_0"):
        submit.submit(data, tmp_path / "c.zip", predictions=tmp_path / "found")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"Q_0": "a"}', "f: 1 missing: Q_1"),
        ('{"Q_0": "a", "Q_1": "b", "Q_2": "c"}', "f: 1 unknown: Q_2"),
        ('{"Q_0": "a", "Q_0": "b", "Q_1": "b"}', "f: answered twice: Q_0"),
        ('{"Q_0": "a", "Q_1": null}', "f: Q_1: answer null must be a string"),
        ('{"Q_0": "a",', "f: not one JSON object"),
        ('{"id": "Q_0", "answer": "a"}\n{"id": "Q_1", "answer": "b"}', "f: not one JSON object"),
    ],
)
def test_each_mistake_in_a_file_of_answers_is_listed(content: str, message: str) -> None:
    kind = kinds.of(registry.get("cmrc2018"))
    asked = [kinds.Example(f"Q_{i}", Reading("谁", "一"), None) for i in range(2)]
    _, mistakes = kind.check(content.encode(), asked, "f", True)
    assert len(mistakes) == 1 and message in mistakes[0]


def test_a_users_own_task_reads_squad_and_lines(model: Path, tmp_path: Path) -> None:
    """A question of each form, one without its answer in the context, and one too long."""
    yaml = (
        "name: mine\nkind: span\nabsent_answers: skip\ndoc_stride: 10\nmax_length: 24\nepochs: 1\n"
    )
    (tmp_path / "mine.yaml").write_text(yaml, encoding="utf-8")
    content = questions(20, 1)
    content["data"][0]["paragraphs"][3]["qas"][0]["answers"][0]["text"] = "谁"
    (tmp_path / "train.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    rows = [
        {"id": q["id"], "question": q["question"] * 10, "context": p["context"], "answers": {
            "text": [a["text"] for a in q["answers"]],
            "answer_start": [a["answer_start"] for a in q["answers"]],
        }}
        for p in questions(6, 2)["data"][0]["paragraphs"]
        for q in p["qas"]
    ]  # fmt: skip
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "dev.json").write_text(lines, encoding="utf-8")
    task = str(tmp_path / "mine.yaml")
    result = run.run(run.RunSpec(task, str(model), str(tmp_path), tmp_path / "r", {}), show=False)
    assert result["data"]["train"]["num_skipped"] == 1 and result["num_trained_on"] == 19
    assert result["task_content"]["options"]["doc_stride"] == 10
    predictor = Predictor(tmp_path / "r" / "model", task)
    out = tmp_path / "out.jsonl"
    predict_command.predict_file(predictor, tmp_path / "dev.json", out)
    assert all(json.loads(line)["truncated"] for line in out.read_text("utf-8").splitlines())


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("name: a\nkind: span\nlabels: [a, b]\n", "labels"),
        ("name: a\nkind: span\nconvert: s2t\n", "convert"),
        ("name: drcd\nkind: span\n", "name drcd is taken"),
    ],
)
def test_mistakes_in_a_task_file_are_explained(yaml: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(yaml, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        registry.get(path)


def test_the_service_answers_questions(finetuned: Path) -> None:
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("uvicorn")
    from test_serve import Running

    running = Running(finetuned / "model")
    try:
        asked = {"question": "谁来?", "context": "一二三钱强四"}
        body = {"texts": [asked, ["谁来?", "李明来"], {**asked, "context": " "}]}
        refused = httpx.post(f"{running.url}/predict", json=body)
        assert refused.status_code == 422 and "the context is empty" in refused.text
        answer = httpx.post(f"{running.url}/predict", json={"texts": body["texts"][:2]})
        first, second = answer.json()["predictions"]
        assert (first["answer"], first["start"], first["end"]) == ("钱强", 3, 5)
        assert second["answer"] == "李明" and second["n_best"][0]["text"] == "李明"
    finally:
        running.close()
