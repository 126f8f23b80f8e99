"""A task of entities from its files to a submission: trained, resumed, predicted, exported."""

from __future__ import annotations

import json
import random
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from clue_ds.errors import UserError
from clue_ds.export import huggingface
from clue_ds.model import BertForPreTraining
from clue_ds.presets import ModelConfig
from clue_ds.tasks import examples, kinds, registry
from clue_ds.tasks.finetune import loop, run
from clue_ds.tasks.finetune.run import RunSpec
from clue_ds.tasks.kinds.tag import baselines, entities
from clue_ds.tasks.kinds.tag.entities import Entity, Label
from clue_ds.tasks.kinds.tag.kind import WINDOWS
from clue_ds.tasks.predict.predictor import Predictor
from clue_ds.tasks.predict.submit import submit

FILLER = "叫在的了是说和"
# Type -> the characters that it begins with, and those that it goes on with.
PARTS = {"name": ("张寒来", "天地玄黄宇宙"), "address": ("暑往秋", "洪荒日月盈昃")}
CHARS = "".join(map("".join, PARTS.values()))
CONFIG = ModelConfig(
    vocab_size=0,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
    initializer_range=0.2,
)
SETTINGS = {"batch_size": 16, "lr": 5e-3, "epochs": 4, "max_length": 32}


def line(draws: random.Random) -> dict[str, Any]:
    """Names and addresses, each put together anew, between other characters."""
    text, found = "", []
    for _ in range(3):
        text += "".join(draws.choices(FILLER, k=draws.randint(1, 3)))
        kind = draws.choice(list(PARTS))
        first, others = PARTS[kind]
        word = draws.choice(first) + "".join(draws.choices(others, k=draws.randint(1, 3)))
        found.append(Entity(kind, len(text), len(text) + len(word)))
        text += word
    return {"text": text + "了", "label": entities.label_of(found, text)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder whose vocabulary has Latin pieces and digits."""
    directory = tmp_path_factory.mktemp("tag")
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *CHARS,
        *FILLER,
        "2",
        "##0",
        "r",
        "##id",
        "##x",
    ]
    (directory / "vocab.txt").write_text("\n".join(tokens) + "\n", "utf-8")
    config = CONFIG.replace(vocab_size=len(tokens))
    torch.manual_seed(0)
    state = BertForPreTraining(config).state_dict()
    return huggingface.write(config, state, directory / "vocab.txt", directory / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLUENER's own files, and the same as columns with a task of the user's."""
    directory = tmp_path_factory.mktemp("data")
    draws = random.Random(0)
    (directory / "cluener_public").mkdir()
    for split, count in (("train", 300), ("dev", 40), ("test", 9)):
        rows = [line(draws) for _ in range(count)]
        if split == "test":
            rows = [{"id": n, "text": row["text"]} for n, row in enumerate(rows)]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (directory / "cluener_public" / f"{split}.json").write_text("\n".join(lines), "utf-8")
        if split != "test":
            columns = "\n".join(map(in_columns, rows))
            (directory / f"{split}.conll").write_text(columns, "utf-8")
    (directory / "own.yaml").write_text("kind: tag\nname: own\nlabels: [name, address]\n", "utf-8")
    return directory


def in_columns(row: dict[str, Any]) -> str:
    tags = ["O"] * len(row["text"])
    for entity in entities.entities_of(row["label"]):
        tags[entity.start] = f"B-{entity.type}"
        for at in range(entity.start + 1, entity.end):
            tags[at] = f"I-{entity.type}"
    return "".join(f"{c}\t{t}\n" for c, t in zip(row["text"], tags, strict=True))


def spec(task: str, model: Path, data: Path, directory: Path, **changes: Any) -> RunSpec:
    return RunSpec(task, str(model), str(data), directory, {**SETTINGS, **changes})


@pytest.fixture(scope="module")
def finetuned(
    model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    place = tmp_path_factory.mktemp("run") / "cluener"
    return place / "model", run.run(spec("cluener", model, data, place), show=False)


def test_entities_never_seen_are_found_and_both_f1_stand_beside_the_baselines(
    finetuned: tuple[Path, dict[str, Any]],
) -> None:
    result = finetuned[1]
    best = result["best"]
    assert best["text_set_f1"] > 0.9 and best["span_f1"] > 0.9, best
    assert result["baselines"][baselines.MAJORITY]["span_f1"] == 0.0
    assert 0 < result["baselines"][baselines.LEXICON]["span_f1"] < best["span_f1"]
    assert [key for key, _ in result["columns"]] == ["text_set_f1", "span_f1"]
    types = result["types"]
    assert set(types) == {"name", "address"}
    assert sum(counts["f1"] for counts in types.values()) / 2 == pytest.approx(best["text_set_f1"])


def test_a_run_that_was_interrupted_continues_bit_for_bit(
    finetuned: tuple[Path, dict[str, Any]],
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut = spec("cluener", model, data, tmp_path / "cut", save_every=10)
    original, calls = loop._step, Counter[str]()

    def failing(*arguments: Any) -> float:
        calls["step"] += 1
        if calls["step"] == 38:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(loop, "_step", failing)
    with pytest.raises(KeyboardInterrupt):
        run.run(cut, show=False)
    resumed = run.run(cut, show=False)
    assert calls["step"] == 38 + len(resumed["losses"]) - 30
    whole = finetuned[1]
    assert resumed["losses"] == whole["losses"] and resumed["best"] == whole["best"]


def test_own_columns_give_what_the_same_lines_of_json_give(
    finetuned: tuple[Path, dict[str, Any]], data: Path
) -> None:
    task = registry.get(data / "own.yaml")
    assert task.labels == ("O", "B-name", "I-name", "B-address", "I-address")
    for split in ("train", "dev"):
        own = examples.read(task, examples.find(task, data, split))
        cluener = registry.get("cluener")
        others = examples.read(cluener, examples.find(cluener, data, split))
        assert [e[1:] for e in own] == [e[1:] for e in others]


TEXTS = [
    "的张天地在暑洪荒了",
    "叫　张 Ridx天的在  20往日\u200b月收",
    "叫RIDX的寒玄",
    "在é来天叫玄\U00020000",
    "的了是",
]


def test_pipeline_of_transformers_gives_the_same_entities(
    finetuned: tuple[Path, dict[str, Any]],
) -> None:
    import transformers

    directory = finetuned[0]
    network = transformers.AutoModelForTokenClassification.from_pretrained(directory)
    assert type(network).__name__ == "BertForTokenClassification"
    assert network.config.id2label[1] == "B-address"
    pipeline = transformers.pipeline(
        "token-classification",
        model=network,
        tokenizer=transformers.AutoTokenizer.from_pretrained(directory),
        aggregation_strategy="simple",
    )
    predictor = Predictor(directory)
    found = predictor.answers([examples.Example(n, t, None) for n, t in enumerate(TEXTS)], "")
    assert sum(len(answer.details["entities"]) for answer in found) >= 6
    for text, answer in zip(TEXTS, found, strict=True):
        theirs = [
            (one["entity_group"], one["start"], one["end"], pytest.approx(one["score"], abs=1e-4))
            for one in pipeline(text)
        ]
        ours = [
            (one["type"], one["start"], one["end"], one["score"])
            for one in answer.details["entities"]
        ]
        assert ours == theirs, text
        for one in answer.details["entities"]:
            assert one["text"] == text[one["start"] : one["end"]]


def test_a_text_of_many_windows_is_read_to_its_end(
    finetuned: tuple[Path, dict[str, Any]],
) -> None:
    """100 sentences of 9 tokens: the same entities in each, wherever the windows are cut."""
    sentence = "张天地的在暑洪荒了"
    predictor = Predictor(finetuned[0], max_length=32)
    ((answer,),) = [predictor.answers([examples.Example(0, sentence * 100, None)], "")]
    names = answer.value.get("name", {}).get("张天地", [])
    assert len(names) > 90 and names[-1] == [99 * 9, 99 * 9 + 2]
    units = predictor.kind.encode(predictor.tokenizer, sentence * 100, 32)
    assert len(units) > 50 and not any(unit.truncated for unit in units)


def test_submission_has_cluener_s_lines_and_wrong_ones_are_explained(
    finetuned: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "s.zip"
    submit(data, output, models=(finetuned[0],))
    with zipfile.ZipFile(output) as archive:
        (name,) = archive.namelist()
        content = archive.read(name).decode()
    assert name == "cluener_predict.json"
    rows = [json.loads(row) for row in content.splitlines()]
    assert [row["id"] for row in rows] == list(range(9))
    assert all(set(row) == {"id", "label"} for row in rows)
    assert any(row["label"] for row in rows) and "\\u" not in content
    bad = content.splitlines()
    bad[2] = '{"id": 2, "label": {"place": {}}}'
    bad[4] = '{"id": 4, "label": {"name": {"天": [[0, 99]]}}}'
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr(name, "\n".join(bad[:8]))
    with pytest.raises(UserError) as caught:
        submit(data, check=tmp_path / "bad.zip")
    message = str(caught.value)
    assert ":3: label: 'place' is not one of the task's types" in message
    assert ":5: label: name '天' is at [0, 99], beyond the text" in message
    assert "8 answers, but the test set has 9 lines" in message and "ids missing: 8" in message


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("labels: [B-name]", "labels B-name are tags; list the types only"),
        ("labels: [a, a]", "labels a are listed twice"),
        ("labels: [a]\noverlapping: keep", "overlapping: keep needs head: pointer"),
        ("labels: [a]\nhead: pointer\nscheme: bios", "head: pointer has no tags"),
        ("labels: [a]\nscheme: iob", "scheme"),
        ("labels: [a]\nlabes: x", "labes"),
    ],
)
def test_mistakes_in_the_yaml_file(yaml: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(f"kind: tag\nname: t\n{yaml}\n", "utf-8")
    with pytest.raises(UserError, match=message):
        registry.get(tmp_path / "t.yaml")


def test_overlapping_entities_are_refused_with_their_line_or_counted(tmp_path: Path) -> None:
    rows = [
        {"text": "天地玄黄", "label": {"a": {"天地": [[0, 1]]}}},
        {"text": "天地玄黄", "label": {"a": {"天地玄": [[0, 2]]}, "b": {"地": [[1, 1]]}}},
    ]
    path = tmp_path / "train.json"
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    base = "kind: tag\nname: t\nlabels: [a, b]\n"
    notes = {}
    for extra in ("", "overlapping: skip", "head: pointer\noverlapping: keep"):
        (tmp_path / "t.yaml").write_text(base + extra, "utf-8")
        task = registry.get(tmp_path / "t.yaml")
        if not extra:
            with pytest.raises(UserError, match=r"train\.json:2: a '天地玄' \[0, 2\] and b '地'"):
                examples.read(task, path)
            continue
        (_, example) = examples.read(task, path)
        assert example.label == rows[1]["label"]
        notes[extra[:4]] = targets(task, example.text, example.label)
    skipped, counted = notes["over"]
    assert skipped[0].tolist() == [1, 2, 2, 0]
    assert [count for note, count in counted.items() if "overlap" in note] == [1]
    both, counted = notes["head"]
    assert both[0].tolist() == [[0, 1, 3], [1, 2, 2]] and not counted


class OneTokenEach:
    """Every two characters are a token, except that spaces are in none."""

    cls_id, sep_id = 1, 2

    def encode_with_offsets(self, text: str) -> tuple[Any, Any]:
        import numpy as np

        offsets = [(i, i + 1) for i, c in enumerate(text) if c != " "]
        joined = [(a, b + 1) if text[a] == "W" else (a, b) for a, b in offsets]
        kept = [(a, b) for a, b in joined if a == 0 or text[a - 1] != "W"]
        return np.arange(len(kept)), np.array(kept, dtype=np.int64).reshape(-1, 2)


def targets(task: Any, text: str, label: Label, max_length: int = 32) -> tuple[list, Counter[str]]:
    kind = kinds.of(task)
    units = kind.encode(OneTokenEach(), text, max_length)
    return list(kind.targets(text, label, units)), Counter(kind.notes(text, label, units))


def test_what_tags_can_t_say_is_counted(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("kind: tag\nname: t\nlabels: [a]\n", "utf-8")
    task = registry.get(tmp_path / "t.yaml")
    label = entities.label_of([Entity("a", 0, 2), Entity("a", 4, 5), Entity("a", 6, 7)], "xWyz pq ")
    (tags,), notes = targets(task, "xWyz pq ", label)
    assert tags.tolist() == [1, 2, 0, 0, 1] or tags.tolist() == [1, 2, 0, 0, 1, 0], tags
    assert sorted(notes.values()) == [1, 1], notes


def test_each_token_of_windows_is_trained_once(data: Path) -> None:
    task = registry.get(data / "own.yaml")
    text = "".join(random.Random(1).choices(CHARS, k=101))
    found = [Entity("name", at, at + 3) for at in range(0, 99, 5)]
    tags, notes = targets(task, text, entities.label_of(found, text), max_length=12)
    trained = [tag for window in tags for tag in window.tolist() if tag != -100]
    assert trained == [1, 2, 2, 0, 0] * 20 + [0] and list(notes) == [WINDOWS]
    kind = kinds.of(task)
    units = kind.encode(OneTokenEach(), text, 12)
    assert kind.count(units, tags) == 101


def test_pointer_head_learns_entities_inside_others_and_opens_again(
    model: Path, data: Path, tmp_path: Path
) -> None:
    draws = random.Random(3)
    yaml = "kind: tag\nname: nested\nlabels: [name, address]\nhead: pointer\noverlapping: keep\n"
    (tmp_path / "nested.yaml").write_text(yaml, "utf-8")
    for split, count in (("train", 200), ("dev", 30)):
        rows = []
        for _ in range(count):
            row = line(draws)
            found = entities.entities_of(row["label"])
            found += [Entity("address", e.start, e.start + 1) for e in found if e.type == "name"]
            rows.append({"text": row["text"], "label": entities.label_of(found, row["text"])})
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (tmp_path / f"{split}.json").write_text("\n".join(lines), "utf-8")
    task = str(tmp_path / "nested.yaml")
    result = run.run(spec(task, model, tmp_path, tmp_path / "run", epochs=6), show=False)
    assert result["best"]["span_f1"] > 0.5, result["best"]
    both, apart = (
        Predictor(tmp_path / "run" / "model", given).answers(
            [examples.Example(0, "的张天地在来玄黄了寒宇的暑洪荒了", None)], ""
        )[0]
        for given in (task, None)
    )
    found = entities.entities_of(both.value)
    assert entities.overlaps(found)
    # The model's config.json has the task's options.
    assert entities.entities_of(apart.value) == found


def test_report_has_the_types_and_serve_answers_as_predict_does(
    finetuned: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("fastapi", reason="pip install 'clue_ds[serve]'")
    from fastapi.testclient import TestClient

    from clue_ds.tasks.finetune import score
    from clue_ds.tasks.serve import app, batcher

    page = score._classes(finetuned[1])
    assert "<td>address</td>" in page and "F1 of text sets" in page
    predictor = Predictor(finetuned[0])
    waiting = batcher.Batcher(app.compute(predictor))
    with TestClient(app.create_app(predictor, waiting)) as client:
        body = {"texts": [TEXTS[0], {"text": TEXTS[1]}]}
        found = client.post("/predict", json=body).json()["predictions"]
        ready = client.get("/health/ready").json()
        refused = client.post("/predict", json={"texts": [["天", "地"]]})
    wanted = predictor.answers([examples.Example(n, t, None) for n, t in enumerate(TEXTS[:2])], "")
    for one, answer in zip(found, wanted, strict=True):
        assert one["label"] == answer.value
        assert [e["text"] for e in one["entities"]] == [
            e["text"] for e in answer.details["entities"]
        ]
    assert ready["kind"] == "tag" and ready["can"] == ["predict", "embed"]
    assert refused.status_code == 422 and "one text" in refused.json()["error"]["what"]
