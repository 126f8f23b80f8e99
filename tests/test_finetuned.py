"""A classifier keeps its labels, their names, its length and scores in every layout, both ways."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import onnxruntime
import pytest
import safetensors.torch
import torch
import transformers
from models import random_model, without, write_vocab
from transformers import BertConfig, BertTokenizer

from clue_ds import export
from clue_ds.cli import main
from clue_ds.errors import UserError
from clue_ds.export import FineTuned
from clue_ds.model import finetuned
from clue_ds.model.weights import TASK_HEADS, StateDict
from clue_ds.presets import ModelConfig
from clue_ds.tasks import Predictor, kinds, registry
from clue_ds.tasks.kinds import Example
from clue_ds.tasks.kinds.choice import Question
from clue_ds.tasks.predict.command import predict

CONFIG = ModelConfig(
    vocab_size=60,
    hidden_size=24,
    num_hidden_layers=1,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=32,
)
LABELS = tuple(str(n) for n in range(100, 107))
NAMES = {label: f"news_{label}" for label in LABELS}
ABOUT = finetuned.describe(
    LABELS,
    NAMES,
    task="tone",
    max_length=12,
    dev={"accuracy": 0.5, "f1": 0.25, "epoch": 2},
    data={"train": "a" * 64, "dev": "b" * 64},
)
NAMES_OF = {"1": "好评", "2": "差评"}
TEXTS = ["一丁七万", "丈三上下不与丐丑专且丕世", "丘丙业丛东丝", "一"]


def weights(num_classes: int = len(LABELS)) -> StateDict:
    state = without(dict(random_model(CONFIG, 0).state_dict()), "cls.")
    torch.manual_seed(1)
    classifier = {
        "classifier.weight": torch.randn(num_classes, CONFIG.hidden_size) * 3,
        "classifier.bias": torch.randn(num_classes),
    }
    return state | classifier


@pytest.fixture(scope="module")
def vocab_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocab(tmp_path_factory.mktemp("vocab") / "vocab.txt", CONFIG.vocab_size)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, vocab_file: Path) -> Path:
    place = tmp_path_factory.mktemp("classifier") / "hf"
    return export.save(CONFIG, weights(), vocab_file, place, finetuned=ABOUT)


COMMANDS = {
    "hf": [],
    "tf": ["--to", "tf"],
    "fp16": ["--fp16"],
    "slimmed": ["--trim-vocab", "--drop-heads"],
    "zip": ["--zip"],
    "tf zip": ["--zip", "--to", "tf"],
}


@pytest.mark.parametrize("layout", COMMANDS)
def test_every_layout_carries_what_a_classifier_is(
    layout: str, classifier: Path, tmp_path: Path
) -> None:
    output = tmp_path / ("out.zip" if "zip" in layout else "out")
    command = ["export", str(classifier), "--output", str(output), *COMMANDS[layout]]
    assert main(command) == 0
    assert main(["import", str(output), "--output", str(tmp_path / "back")]) == 0
    for place in (output, tmp_path / "back"):
        with export.opened(place) as model:
            assert model.finetuned == ABOUT
    expected, found = (Predictor(place).predict(TEXTS) for place in (classifier, output))
    for one, other in zip(expected, found, strict=True):
        assert one.label == other.label
        assert one.probabilities == pytest.approx(other.probabilities, abs=2e-2)


KINDS = {"cmrc2018": {"doc_stride": 5}, "c3": {}, "cluener": {"overlapping": "skip"}}
QUESTION = "丈三与不？"


def model_of(name: str, options: dict[str, object], vocab_file: Path, place: Path) -> FineTuned:
    """A random model of a user's own task that is like the CLUE task `name`, written to `place`."""
    task = dataclasses.replace(registry.get(name), name="own", options=options)
    kind = kinds.of(task)
    about = finetuned.describe(
        task.labels if kind.has_labels else (),
        architecture=kind.architecture,
        task="own",
        max_length=28,
        options=options,
    )
    state = dict(kind.network(CONFIG, 3).state_dict())
    state |= {n: t * 50 for n, t in state.items() if n.startswith(TASK_HEADS)}
    export.save(CONFIG, state, vocab_file, place, finetuned=about)
    return about


def answers(place: Path) -> list[object]:
    """What a Predictor that is told no task answers."""
    predictor = Predictor(place)
    assert predictor.kind is not None
    asked = {
        "span": (QUESTION, "".join(TEXTS * 2)),
        "choice": Question(TEXTS[1], QUESTION, ("一丁", "七万丈", "三")),
        "tag": TEXTS[1],
    }
    text = asked[predictor.kind.task.kind]
    if predictor.kind.task.kind == "span":
        text = predictor.kind.plain(text, "")
    return [one.value for one in predictor.answers([Example(0, text, None)])]


@pytest.mark.parametrize("name", KINDS)
def test_every_layout_carries_what_a_task_of_each_kind_is(
    name: str, vocab_file: Path, tmp_path: Path
) -> None:
    """A user's own task: predict opens it without the task's file, with the options of training."""
    source = tmp_path / "source"
    about = model_of(name, KINDS[name], vocab_file, source)
    for layout, command in COMMANDS.items():
        output = tmp_path / (layout.replace(" ", "-") + (".zip" if "zip" in layout else ""))
        assert main(["export", str(source), "--output", str(output), *command]) == 0
        back = tmp_path / f"{output.stem}-back"
        assert main(["import", str(output), "--output", str(back)]) == 0
        for place in (output, back):
            with export.opened(place) as model:
                assert model.finetuned == about, (layout, place)
            if layout != "fp16":  # its answers may be others
                assert answers(place) == answers(source), (layout, place)
    assert main(["export", str(source), "--to", "uer", "--output", str(tmp_path / "u")]) == 2


@pytest.mark.parametrize("name", KINDS)
def test_onnx_answers_what_transformers_does(name: str, vocab_file: Path, tmp_path: Path) -> None:
    about = model_of(name, KINDS[name], vocab_file, tmp_path / "hf")
    assert (
        main(["export", str(tmp_path / "hf"), "--to", "onnx", "--output", str(tmp_path / "o")]) == 0
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "o" / "model.onnx"))
    ids = torch.arange(6, 30).reshape(3, 8)
    if about.architecture == "BertForMultipleChoice":
        ids = torch.arange(6, 54).reshape(3, 2, 8)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids * 0}
    inputs["attention_mask"][..., 5:] = 0
    model = getattr(transformers, about.architecture.replace("Bert", "AutoModel"))
    with torch.no_grad():
        right = model.from_pretrained(tmp_path / "hf").eval()(**inputs)
    names = ["start_logits", "end_logits"] if name == "cmrc2018" else ["logits"]
    found = session.run(names, {key: value.numpy() for key, value in inputs.items()})
    for key, value in zip(names, found, strict=True):
        torch.testing.assert_close(torch.from_numpy(value), right[key], atol=2e-3, rtol=1e-4)


# The YAML file of a user's own task with field names of its own, and a record of its files.
OWN_TASKS: dict[str, tuple[str, dict[str, object]]] = {
    "classify": (
        "text: [review]\nlabels: [好, 坏]\nlabel: tone\n",
        {"id": "a", "review": TEXTS[1]},
    ),
    "pair": (
        "text: [question, answer]\nlabels: [好, 坏]\n",
        {"question": QUESTION, "answer": TEXTS[0]},
    ),
    "choice": (
        "kind: choice\ntext: passage\nquestion: asked\nchoices: options\n",
        {"passage": TEXTS, "asked": QUESTION, "options": TEXTS[:3]},
    ),
    "choice without question": (
        "kind: choice\ntext: passage\nchoices: options\n",
        {"passage": TEXTS[1], "options": TEXTS[:2]},
    ),
    "cloze": (
        "kind: cloze\ncontent: passages\ncandidates: idioms\nblank: __\n",
        {"passages": [f"{TEXTS[1]}__{TEXTS[2]}__"], "idioms": TEXTS[:3]},
    ),
    "tag": ("kind: tag\nlabels: [人, 地]\ntext: body\n", {"body": TEXTS[1]}),
    "pointer": ("kind: tag\nhead: pointer\nlabels: [人, 地]\ntext: body\n", {"body": TEXTS[1]}),
}


@pytest.mark.parametrize("name", OWN_TASKS)
def test_a_model_knows_what_its_users_own_task_reads(
    name: str, vocab_file: Path, tmp_path: Path
) -> None:
    """predict answers the same with and without the task's file, also after an export."""
    yaml, record = OWN_TASKS[name]
    (tmp_path / "own.yaml").write_text(f"name: own\n{yaml}", encoding="utf-8")
    task = registry.get(tmp_path / "own.yaml")
    kind = kinds.of(task)
    about = finetuned.describe(
        task.labels,
        architecture=kind.architecture,
        task="own",
        max_length=28,
        options=task.options,
        reads=kinds.reads(task),
    )
    state = dict(kind.network(CONFIG, 3).state_dict())
    place = export.save(CONFIG, state, vocab_file, tmp_path / "model", finetuned=about)
    assert main(["export", str(place), "--zip", "--output", str(tmp_path / "m.zip")]) == 0
    (tmp_path / "in.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", "utf-8")
    found = []
    for number, (where, given) in enumerate(
        [(place, tmp_path / "own.yaml"), (place, None), (place, "own"), (tmp_path / "m.zip", None)]
    ):
        output = tmp_path / f"{number}.jsonl"
        predict(where, given and str(given), file=tmp_path / "in.jsonl", output=output)
        found.append(output.read_text(encoding="utf-8"))
        predictor = Predictor(where)
        assert predictor.task is not None and predictor.task.fields == task.fields
    assert len(set(found)) == 1, found


@pytest.mark.parametrize("layout", ["tf", "onnx", "uer"])
def test_the_pointer_head_is_refused_by_layouts_without_it(
    layout: str, vocab_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pointer = FineTuned((), task="own", architecture=finetuned.ENTITY_POINTER)
    kind = kinds.of(kinds.unnamed_task(pointer))
    kind = kinds.of(dataclasses.replace(kind.task, labels=("人", "地")))
    about = FineTuned(("人", "地"), task="own", architecture=kind.architecture)
    state = dict(kind.network(CONFIG, 3).state_dict())
    export.save(CONFIG, state, vocab_file, tmp_path / "hf", finetuned=about)
    command = ["export", str(tmp_path / "hf"), "--output", str(tmp_path / "out"), "--to"]
    assert main([*command, layout]) == 2
    assert f"the layout {layout} has no place for" in capsys.readouterr().err
    if layout == "tf":
        assert main([*command, "all"]) == 0
        assert [place.name for place in (tmp_path / "out").iterdir()] == ["hf"]
        with export.opened(tmp_path / "out" / "hf") as model:
            assert model.finetuned == about


@pytest.mark.parametrize("task", ["cmrc2018", "c3", "cluener"])
def test_a_head_that_is_not_finite_is_named(task: str, vocab_file: Path, tmp_path: Path) -> None:
    kind = kinds.of(registry.get(task))
    state = kind.network(CONFIG, 3).state_dict()
    about = finetuned.describe(kind.task.labels, architecture=kind.architecture, task=task)
    place = export.save(CONFIG, state, vocab_file, tmp_path / "model", finetuned=about)
    stored = safetensors.torch.load_file(place / "model.safetensors")
    name = next(name for name in stored if name.startswith(("classifier.w", "qa_outputs.w")))
    stored[name][0, 0] = float("nan")
    safetensors.torch.save_file(stored, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"NaN or infinite weights: {name}"):
        Predictor(place)


def test_onnx_has_the_labels_beside_it(classifier: Path, tmp_path: Path) -> None:
    output = tmp_path / "onnx"
    assert main(["export", str(classifier), "--to", "onnx", "--output", str(output)]) == 0
    config = transformers.AutoConfig.from_pretrained(output)
    assert list(config.id2label.values()) == list(NAMES.values())
    assert config.architectures == ["BertForSequenceClassification"]


def test_all_layouts_of_a_classifier(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(classifier), "--to", "all", "--output", str(tmp_path / "a")]) == 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["hf", "onnx", "tf"]
    assert "uer is left out" in capsys.readouterr().out


def test_transformers_pipeline_answers_the_same_with_names(classifier: Path) -> None:
    """The tokenizer says the length of training, so the pipeline truncates as training did."""
    values = json.loads((classifier / "config.json").read_text(encoding="utf-8"))
    assert values["num_labels"] == len(LABELS), "transformers before 4 needs it"
    pipeline = transformers.pipeline("text-classification", model=str(classifier))
    assert pipeline.tokenizer.model_max_length == 12
    for length in (1, 10, 30):
        text = (TEXTS[1] * 3)[:length]
        found = pipeline(text, truncation=True)[0]
        ours = Predictor(classifier).predict([text])[0]
        assert found["label"] == NAMES[ours.label]
        assert found["score"] == pytest.approx(ours.probabilities[ours.label], abs=1e-5)


def test_length_of_training_is_what_is_used(classifier: Path) -> None:
    assert Predictor(classifier).max_length == 12
    assert Predictor(classifier, max_length=20).max_length == 20


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_other_peoples_classifier_stays_what_it_is(
    kind: str, tmp_path: Path, vocab_file: Path
) -> None:
    torch.manual_seed(2)
    labels = {0: "好", 1: "中", 2: "坏"}
    fields = {f: getattr(CONFIG, f) for f in ModelConfig.__dataclass_fields__}
    config = BertConfig(**fields, id2label=labels, label2id={v: k for k, v in labels.items()})
    peer = getattr(transformers, kind)(config).eval()
    peer.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "vocab.txt").write_bytes(vocab_file.read_bytes())
    assert main(["import", str(tmp_path / "theirs"), "--output", str(tmp_path / "ours")]) == 0
    auto = kind.replace("Bert", "AutoModel", 1)
    ours, info = getattr(transformers, auto).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert type(ours).__name__ == kind and ours.config.id2label == labels
    ids = BertTokenizer.from_pretrained(tmp_path / "ours")(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(peer(**ids).logits, ours.eval()(**ids).logits)
    if kind == "BertForTokenClassification":
        with pytest.raises(UserError, match="not to classify texts"):
            Predictor(tmp_path / "ours").predict(TEXTS)


def test_classes_without_labels_still_have_their_number(tmp_path: Path, vocab_file: Path) -> None:
    directory = export.save(CONFIG, weights(3), vocab_file, tmp_path / "out")
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(directory)
    assert peer.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    with pytest.raises(UserError, match="7 labels for a model with 3 classes"):
        export.save(CONFIG, weights(3), vocab_file, tmp_path / "bad", finetuned=ABOUT)


def test_labels_stay_distinct_and_names_are_used_only_if_complete() -> None:
    path = Path("config.json")
    twice = finetuned.read({"id2label": {"0": "a", "1": "a", "2": "b"}}, 3, path)
    assert twice.labels == ("a (0)", "a (1)", "b")
    assert finetuned.describe(("1", "2"), {"1": "one"}).shown == ("1", "2")
    assert finetuned.describe(("1", "2"), {"1": "one", "2": "one"}).shown == ("1", "2")
    assert finetuned.read(ABOUT.config_values(), len(LABELS), path) == ABOUT
    old = finetuned.read({"id2label": {"0": "100"}, "finetuning_task": "tnews"}, 1, path)
    assert old == FineTuned(("100",), task="tnews"), "a directory of an earlier version"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clue_ds": 3}, "clue_ds must be a JSON object"),
        ({"clue_ds": {"labels": ["1"]}}, "clue_ds.labels must be a list of 7"),
        ({"clue_ds": {"labels": [1] * 7}}, "clue_ds.labels must be a list of 7"),
        ({"clue_ds": {"max_length": "12"}}, "clue_ds.max_length is '12'"),
        ({"clue_ds": {"reads": {"kind": "tag", "fields": "text"}}}, "clue_ds.reads must have"),
        ({"problem_type": 1}, "problem_type must be"),
        ({"architectures": "Bert"}, "architectures must be"),
    ],
)
def test_damaged_description_is_one_message(
    changes: dict[str, object], message: str, classifier: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    assert main(["export", str(classifier), "--output", str(copy)]) == 0
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes))
    with pytest.raises(UserError, match=message):
        export.open_model(copy)


def test_finetuning_writes_names_length_score_and_data(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a task's files with names to answers: people read the names, files keep the labels."""
    rows = [
        {"text": text, "label": label, "desc": NAMES_OF[label]}
        for text, label in zip(TEXTS * 2, "12121212", strict=True)
    ]
    for split in ("train", "dev"):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (tmp_path / f"{split}.json").write_text("\n".join(lines), encoding="utf-8")
    task = tmp_path / "tone.yaml"
    task.write_text("name: tone\ntext: [text]\nlabels: ['1', '2']\nlabel_name: desc\n", "utf-8")
    place = tmp_path / "ft"
    assert main(
        ["finetune", "--task", str(task), "--model", str(classifier), "--data", str(tmp_path)]
        + ["--output", str(place), "--epochs", "1", "--max-length", "9"]
    ) == 0  # fmt: skip
    model = place / "tone" / "best" / "model"
    # Every verb takes the same places for this one model.
    packed = tmp_path / "packed.zip"
    assert main(["export", str(place / "tone"), "--zip", "--output", str(packed)]) == 0
    for where in (place / "tone", place / "tone" / "best", packed):
        found = Predictor(where).predict(TEXTS[:1])
        assert found == Predictor(model).predict(TEXTS[:1])
        if where != packed:
            capsys.readouterr()
            assert main(["score", str(where)]) == 0
            table = capsys.readouterr().out
            assert main(["score", str(model)]) == 0
            assert capsys.readouterr().out == table
    assert main(["score", str(packed)]) == 0
    assert "tone" in capsys.readouterr().out
    about = export.open_model(model).finetuned
    result = json.loads((place / "tone" / "best" / "result.json").read_text("utf-8"))
    assert about is not None
    assert (about.labels, about.names, about.task) == (("1", "2"), ("好评", "差评"), "tone")
    assert about.max_length == 9 == Predictor(model).max_length
    assert about.reads == {"kind": "single", "fields": ["text"], "label": "label"}
    assert about.dev == result["best"]
    assert about.data == {s: result["data"][s]["sha256"] for s in ("train", "dev")}
    capsys.readouterr()
    assert main(["predict", "--model", str(model), "--text", TEXTS[0]]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert NAMES_OF[answer["label"]] == answer["name"]
    assert set(answer["probabilities"]) == {"好评", "差评"}
    out = tmp_path / "out.jsonl"
    command = ["predict", "--model", str(model), "--file", str(tmp_path / "dev.json")]
    assert main([*command, "--out", str(out)]) == 0
    first = json.loads(out.read_text("utf-8").splitlines()[0])
    assert set(first["probabilities"]) == {"1", "2"} and "name" not in first
