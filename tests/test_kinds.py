"""Multiple choice and cloze: what is read, asked and answered, and every mistake with its place."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_finetune import WORDS
from test_finetune import model as model  # the fixture
from test_finetune_runs import saved_steps

pytest.importorskip("fastapi", reason="serving needs the [serve] extra")
from fastapi.testclient import TestClient  # noqa: E402

from clue_ds.data import Tokenizer
from clue_ds.errors import UserError
from clue_ds.report.command import report
from clue_ds.tasks import Predictor, examples, kinds, registry
from clue_ds.tasks.features import shares
from clue_ds.tasks.finetune import command, run, score
from clue_ds.tasks.kinds import rating
from clue_ds.tasks.kinds.cloze import assign
from clue_ds.tasks.kinds.rating import Rivals
from clue_ds.tasks.predict import command as predict_command
from clue_ds.tasks.predict import submit
from clue_ds.tasks.serve import app as service
from clue_ds.tasks.serve.batcher import Batcher

C3, CHID = registry.TASKS["c3"], registry.TASKS["chid"]
DIAGNOSTICS = registry.TASKS["clue_diagnostics"]


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def asked(text: str, choices: list[str], **more: object) -> dict[str, Any]:
    return {"question": text, "choice": choices, **more}


def blanks(numbers: list[int]) -> list[str]:
    return [f"一二#idiom{number:06}#三#idiom{number + 1:06}#四" for number in numbers]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """C3 with 2 to 10 choices, of which 好 is right, and ChID with two blanks a line."""
    place = tmp_path_factory.mktemp("clue")
    words = WORDS[5:15]
    for stem, count in (("m-train", 40), ("d-train", 8), ("m-dev", 9), ("d-dev", 3)):
        passages = []
        for n in range(count):
            others = [words[(n + i) % 10] for i in range(n % 9 + 1)]
            others.insert(n % (len(others) + 1), "好")
            passages.append([[words[n % 10], "坏"], [asked("一", others, answer="好")], str(n)])
        write(place / "c3_public" / f"{stem}.json", passages)
    tests = [[["一"], [asked("二", ["三", "好"] + ["坏"] * (n % 3), id=7 - n)]] for n in range(8)]
    write(place / "c3_public" / "test1.1.json", tests)
    for stem, first, count in (("train", 0, 24), ("dev", 100, 6), ("test", 623_377, 5)):
        rows, answers = [], {}
        for number in range(first, first + 2 * count, 2):
            rows.append({"candidates": ["坏", "好", "六"], "content": blanks([number])})
            answers |= {f"#idiom{number:06}#": 1, f"#idiom{number + 1:06}#": 2}
        write(place / "chid_public" / f"{stem}.json", *rows)
        if stem != "test":
            write(place / "chid_public" / f"{stem}_answer.json", answers)
    return place


@pytest.fixture(scope="module")
def runs(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    settings = {"lr": 5e-3, "epochs": 6, "batch_size": 8, "max_length": 16}
    command.finetune(("c3", "chid"), str(model), str(data), out, **settings)
    return out


def test_c3s_two_files_are_one_split_and_their_hashes_count(data: Path, tmp_path: Path) -> None:
    dev = examples.read(C3, examples.find(C3, data, "dev"))
    assert len(dev) == 12 and [e.label for e in dev[:3]] == [0, 1, 2]
    assert dev[1].text == (f"{WORDS[6]}\n坏", "一", (WORDS[6], "好", WORDS[7]))
    (tmp_path / "m-dev.json").write_bytes((data / "c3_public/m-dev.json").read_bytes())
    with pytest.raises(UserError, match=r"d-dev\.json"):
        examples.read(C3, tmp_path / "m-dev.json")
    changed = json.loads((data / "c3_public/d-dev.json").read_text("utf-8"))
    write(tmp_path / "d-dev.json", changed[:-1])
    assert examples.read(C3, tmp_path / "m-dev.json").sha256 != dev.sha256


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (
            asked("一", ["二"] * 20, answer="二"),
            r"passage 1, question 1: 20 choices in choice",
        ),
        (asked("一", ["二"], answer="二"), "1 choices in choice, but a question has 2 to 10"),
        (asked("一", ["二", ""], answer="二"), "choice, choice 1: the text is empty"),
        (asked("一", ["二", "三"], answer="四"), "answer '四' is not one of the 2 choices"),
        (asked("一", ["二", "三"], answer=2), "answer 2 is not one of the 2 choices"),
        (asked("一", ["二", "三"]), "no field 'answer'"),
        ({"question": "一", "answer": "二"}, "no field 'choice'"),
    ],
)
def test_mistakes_in_a_question_name_their_place(
    question: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "train.json", [[["文"], [question], "1"]])
    with pytest.raises(UserError, match=message):
        examples.read(C3, path)


def test_a_broken_file_of_c3_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text('[[["文"],\n[{"question": }]]]', encoding="utf-8")
    with pytest.raises(UserError, match=r"train\.json:2: not JSON"):
        examples.read(C3, tmp_path / "train.json")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"candidates": [], "content": ["#idiom000001#"]}, r"train\.json:1: .*without candidates"),
        ({"candidates": ["一", "二"], "content": ["三"]}, "there is no blank"),
        ({"candidates": ["一", "二"], "content": ["#idiom000001#"] * 2}, "second blank is called"),
        ({"candidates": ["一", "二"], "content": ["#idiom000009#"]}, "#idiom000009# has no answer"),
        ({"candidates": ["一", "二"], "content": ["#idiom000002#"]}, "answer 5 must be the index"),
        ({"candidates": ["一", "二"], "content": [*blanks([3]), "#idiom000008#"]}, "3 blanks, but"),
    ],
)
def test_mistakes_in_a_cloze_name_their_place(
    row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "train_answer.json", {"#idiom000001#": 0, "#idiom000002#": 5})
    with pytest.raises(UserError, match=message):
        examples.read(CHID, write(tmp_path / "train.json", row))


def test_the_longest_of_three_parts_loses_tokens_first() -> None:
    assert shares([10, 3, 2], 15) == [10, 3, 2]
    assert shares([10, 3, 2], 9) == [4, 3, 2]
    # Of equal ones the last loses first, as CLUE's script pops from it.
    assert shares([5, 5, 5], 14) == [5, 5, 4]
    assert shares([9, 9, 1], 8) == [4, 3, 1]
    for room in range(30):
        kept = shares([9, 14, 6], room)
        assert sum(kept) == min(room, 29) and max(kept) - min(kept) <= max(8, 29 - room)


def test_the_loss_is_the_cross_entropy_over_each_questions_own_choices(model: Path) -> None:
    tokenizer = Tokenizer(model / "vocab.txt")
    kind = kinds.of(C3)
    units: list[Rivals] = []
    for count in (2, 10, 3):
        question = kind.text({"text": "一", **asked("二", WORDS[5 : 5 + count])}, "")
        units += kind.encode(tokenizer, question, 16)
    rated = torch.randn(15, 1)
    expected = [
        torch.nn.functional.cross_entropy(part.T, torch.tensor([target]))
        for part, target in zip(rated.split([2, 10, 3]), (1, 9, 0), strict=True)
    ]
    found = rating.loss(rated, units, [1, 9, 0])
    assert float(found) == pytest.approx(float(sum(expected) / 3), rel=1e-6)
    assert [len(one) for one in rating.ratings(rated, units)] == [2, 10, 3]


def test_equal_choices_have_one_answer_which_is_the_first() -> None:
    kind = kinds.of(C3)
    question = kind.text({"text": "一", **asked("二", ["三", "好", "好"])}, "")
    for rated in ([0.0, 1.0, 1.0], [0.0, 1.0, 1.0 + 1e-6]):
        assert kind.answer(question, [], [np.array(rated, np.float32)]).value == 1


def test_an_idiom_is_used_once_and_the_sum_is_the_largest() -> None:
    """Greedily, the first blank would take candidate 0 and leave the second one with 1: 9 + 0."""
    rated = np.array([[9.0, 8.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert assign(rated) == [1, 0, 2]
    assert assign(rated, once=False) == [0, 0, 2]
    # What is added to all ratings of a blank, as a softmax does, changes nothing.
    assert assign(rated + np.array([[100.0], [-3.0], [0.0]])) == [1, 0, 2]


def test_the_blank_is_in_the_middle_and_other_blanks_are_masked(model: Path) -> None:
    tokenizer = Tokenizer(model / "vocab.txt")
    kind = kinds.of(CHID)
    content = "一" * 20 + "#idiom000001#" + "二" * 2 + "#idiom000002#" + "三" * 9
    text = kind.text({"candidates": ["好好", "坏坏坏"], "content": content}, "")
    first, second = kind.encode(tokenizer, text, 23)
    # 23 - 3 special tokens, the mark of the blank and the longest candidate leave 16.
    shown = ["".join(tokenizer.tokens[i] for i in row.input_ids) for row in first.rows]
    mask = "[MASK]"
    assert shown[0] == f"[CLS]好好[SEP]{'一' * 8}{mask}二二{mask * 4}三三[SEP]"
    assert shown[1] == f"[CLS]坏坏坏[SEP]{'一' * 8}{mask}二二{mask * 4}三三[SEP]"
    left = "".join(tokenizer.tokens[i] for i in second.rows[0].input_ids)
    assert left == f"[CLS]好好[SEP]{'一' * 2}{mask * 4}二二{mask}{'三' * 8}[SEP]"
    assert first.truncated and all(row.num_first == row.size for row in first.rows)
    with pytest.raises(UserError, match="larger --max-length or shorter"):
        kind.encode(tokenizer, text, 12)


def test_both_kinds_learn_and_are_in_one_table(runs: Path) -> None:
    groups = {group.task: group for group in score.collect((runs,))}
    assert groups["c3"].score > 0.9 and groups["chid"].score > 0.9
    result = groups["c3"].results[0]
    chance = [1 / (n % 9 + 2) for n in [*range(9), *range(3)]]
    assert result["baselines"]["guessing"]["accuracy"] == pytest.approx(sum(chance) / 12)
    text = score.as_markdown(list(groups.values()))
    assert "always choosing the longest choice" in text and "| 64.50 |" in text
    report((runs / "chid" / "best",))


def test_a_stopped_run_continues(model: Path, data: Path, tmp_path: Path, runs: Path) -> None:
    """The loop is the same for all kinds; this is that what it saves can be loaded again."""
    changes = {"lr": 5e-3, "epochs": 2, "batch_size": 8, "max_length": 16, "save_every": 2}
    specs = [run.RunSpec("chid", str(model), str(data), tmp_path / name, changes) for name in "ab"]
    whole = run.run(specs[0], show=False)
    finish = run._finish
    try:
        run._finish = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore
        with pytest.raises(KeyboardInterrupt):
            run.run(specs[1], show=False)
    finally:
        run._finish = finish
    assert saved_steps(tmp_path / "b")
    assert run.run(specs[1], show=False)["epochs"] == whole["epochs"]


def test_transformers_loads_the_model_and_answers_the_same(runs: Path, data: Path) -> None:
    directory = runs / "c3" / "best" / "model"
    peer, info = transformers.AutoModelForMultipleChoice.from_pretrained(
        directory, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    predictor = Predictor(directory, max_length=16)
    dev = examples.read(C3, examples.find(C3, data, "dev"))
    answers = predictor.answers(dev)
    for example, answer in zip(dev, answers, strict=True):
        context, question, choices = example.text
        first = context.replace("\n", " ")
        texts = [f"{question}[SEP]{choice}" for choice in choices]
        batch = tokenizer([first] * len(texts), texts, padding=True, return_tensors="pt")
        with torch.inference_mode():
            logits = peer.eval()(**{name: t[None] for name, t in batch.items()}).logits[0]
        assert int(logits.argmax()) == answer.value
        chances = torch.softmax(logits, -1).tolist()
        assert answer.details["probabilities"] == pytest.approx(chances, abs=1e-5)


def test_the_service_answers_objects_and_refuses_plain_texts(runs: Path) -> None:
    predictor = Predictor(runs / "chid" / "best" / "model")
    batcher = Batcher(service.compute(predictor), 8, 0.0, 64)
    row = {"content": "一#idiom000001#二", "candidates": ["坏", "好"]}
    too_long = {**row, "candidates": ["坏", "好" * 20]}
    with TestClient(service.create_app(predictor, batcher)) as client:
        found = client.post("/predict", json={"texts": [row, row]}).json()["predictions"]
        assert found[0]["label"] == {"#idiom000001#": 1} and found[0] == found[1]
        assert found[0]["candidates"] == {"#idiom000001#": "好"} and not found[0]["truncated"]
        assert client.get("/health/ready").json()["fields"] == ["content", "candidates"]
        for texts, status, what in (
            (["一"], 422, "chid reads content, candidates"),
            ([row, too_long], 422, "a candidate has 20 tokens"),
            ([{"content": "一"}], 422, "no field 'candidates'"),
        ):
            refused = client.post("/predict", json={"texts": texts})
            assert refused.status_code == status and what in refused.json()["error"]["what"]
        assert len(client.post("/embed", json={"texts": ["一"]}).json()["embeddings"]) == 1


def test_answers_are_written_submitted_and_checked(
    runs: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = (runs / "c3/best/model", runs / "chid/best/model")
    submit.submit(data, tmp_path / "s.zip", models=models)
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        lines = archive.read("c311_predict.json").decode().splitlines()
        filled = json.loads(archive.read("chid11_predict.json"))
    assert [json.loads(line) for line in lines] == [{"id": n, "label": 1} for n in range(8)]
    assert filled["#idiom623377#"] == 1 and len(filled) == 10
    # The same from what predict writes, for which a file need not be the task's own.
    named = (("c3_public/test1.1.json", "c311"), ("chid_public/test.json", "chid11"))
    for directory, (file, name) in zip(models, named, strict=True):
        out = tmp_path / "answers" / f"{name}_predict.json"
        predict_command.predict(directory, file=data / file, output=out, max_length=16)
    submit.submit(data, tmp_path / "t.zip", predictions=tmp_path / "answers")
    contents = [(tmp_path / name).read_bytes() for name in ("s.zip", "t.zip")]
    assert contents[0] == contents[1]
    spoiled = {"c311_predict.json": "\n".join([lines[0].replace("1}", "9}"), *lines[1:]]) + "\n"}
    del filled["#idiom623377#"]
    spoiled["chid11_predict.json"] = json.dumps(filled | {"#idiom623378#": "2", "#idiom1#": 0})
    with zipfile.ZipFile(tmp_path / "u.zip", "w") as archive:
        for name, text in spoiled.items():
            archive.writestr(name, text)
    with pytest.raises(UserError) as caught:
        submit.submit(data, check=tmp_path / "u.zip")
    for message in ("label 9 must be the index of one of the 2", "1 missing: #idiom623377#",
                    '"2" must be the index of one of the 3', "1 unknown: #idiom1#"):  # fmt: skip
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "row", "label"),
    [
        ("kind: choice\nquestion: q\n",
         {"text": "一", "q": "二", "choices": ["三", "四"], "answer": "B"}, 1),
        ("kind: choice\n", {"text": "一", "choices": ["三", "四", "五"], "answer": 2}, 2),
        ("kind: cloze\nblank: ____\nonce: false\n",
         {"content": "一____二____", "candidates": ["三", "四"], "answers": [1, 1]},
         {"0": 1, "1": 1}),
    ],
)  # fmt: skip
def test_own_tasks_of_these_kinds(
    text: str, row: dict[str, Any], label: Any, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(f"name: mine\n{text}", encoding="utf-8")
    task = registry.get(tmp_path / "mine.yaml")
    (example,) = examples.read(task, write(tmp_path / "train.jsonl", row))
    assert example.label == label
    (tmp_path / "mine.yaml").write_text(f"name: mine\n{text}labels: [a]\n", encoding="utf-8")
    with pytest.raises(UserError, match="unknown key labels"):
        registry.get(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("name: mine\nkind: poem\n", encoding="utf-8")
    with pytest.raises(
        UserError, match="kind 'poem' must be one of classify, span, choice, cloze, tag"
    ):
        registry.get(tmp_path / "mine.yaml")


def test_models_of_cmnli_answer_the_diagnostics(model: Path, tmp_path: Path) -> None:
    row = {"sentence1": "一", "sentence2": "二"}
    labelled = [{**row, "label": label} for label in registry.NLI_LABELS]
    folder = tmp_path / "clue" / "cmnli_public"
    for split in ("train", "dev"):
        write(folder / f"{split}.json", *labelled)
    write(folder / "test.json", row)
    asked = [{"index": n, "premise": "一", "hypothesis": "二"} for n in (1, 2)]
    write(tmp_path / "clue" / "clue_diagnostics_public" / "diagnostics_test.json", *asked)
    out = tmp_path / "out"
    command.finetune(("cmnli",), str(model), str(tmp_path / "clue"), out, epochs=1)
    submit.submit(tmp_path / "clue", tmp_path / "s.zip", models=(out / "cmnli/best/model",))
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        lines = archive.read("diagnostics_predict.json").decode().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [1, 2]
    with pytest.raises(UserError, match="no training data; fine-tune cmnli or ocnli"):
        command.finetune(("clue_diagnostics",), str(model), str(tmp_path / "clue"), out)


def test_the_published_files_have_the_published_baselines(shared_data: Path) -> None:
    """Chance 27.1 and longest choice 31.5, measured before there was a reader of C3."""
    dev = examples.read(C3, examples.find(C3, shared_data / "clue", "dev"))
    found = kinds.of(C3).baselines([], dev)
    assert len(dev) == 3_816
    assert [round(100 * s["accuracy"], 1) for s in found.values()] == [27.1, 31.5]
    tests = examples.test_files(C3, shared_data / "clue")
    counts = {v: len(examples.read(C3, path, labelled=False)) for v, path in tests.items()}
    assert counts == {"1.1": 1_625, "1.0": 3_892}
    chid = examples.read(CHID, examples.find(CHID, shared_data / "clue", "dev"))
    assert sum(len(e.text.blanks) for e in chid) == 411
