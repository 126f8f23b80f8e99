"""The config is typed: a mistake is named by its key, and what is right survives a save."""

from __future__ import annotations

from pathlib import Path

import pytest

from clue_ds import command_line, config
from clue_ds.config import RunConfig
from clue_ds.errors import UserError

MINIMAL = {"run_dir": "runs/x", "data": {"corpus": "corpus"}}


def _write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_saved_config_loads_back_equal(tmp_path: Path) -> None:
    train = {"lr": 3e-4, "steps": 5000}
    values = {**MINIMAL, "train": train, "model": {"preset": "bert_base_clue"}}
    original = config.validate(values, "test")
    config.save(original, tmp_path / "config.yaml")
    assert config.load(tmp_path / "config.yaml") == original


def test_exponent_without_a_point_is_a_number(tmp_path: Path) -> None:
    path = _write(tmp_path, "run_dir: r\ndata: {corpus: c}\ntrain: {lr: 1e-4}\n")
    assert config.load(path).train.lr == 1e-4


def test_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = _write(tmp_path, "run_dir: r\ndata: {corpus: c}\ntrain: {lr: 1e-4, steps: 4000}\n")
    parsed = command_line.parse(["--config", path, "--train.lr", "2e-4"], "clue-ds pretrain")
    assert (parsed.train.lr, parsed.train.steps) == (2e-4, 4000)


def test_required_keys_may_come_from_the_command_line(tmp_path: Path) -> None:
    path = _write(tmp_path, "train: {steps: 4000}\n")
    parsed = command_line.parse(
        [f"--config={path}", "--data.corpus", "c", "--run_dir", "r"], "clue-ds pretrain"
    )
    assert (parsed.run_dir, parsed.data.corpus, parsed.train.steps) == ("r", "c", 4000)


def test_required_key_that_nobody_gave_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = _write(tmp_path, "run_dir: r\n")
    with pytest.raises(SystemExit) as stop:
        command_line.parse(["--config", path], "clue-ds pretrain")
    assert stop.value.code == 2
    assert "--data.corpus" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"learning_rate": 1}}, "unknown key train.learning_rate"),
        ({"train": {"warmup_step": 1}}, "did you mean train.warmup_steps?"),
        ({"trian": {"lr": 1}}, "unknown key trian; did you mean train?"),
        ({"train": {"lr": -1}}, "train.lr: Input should be greater than 0 (got -1)"),
        ({"train": {"lr": "fast"}}, "train.lr"),
        ({"train": {"schedule": "cos"}}, "'linear', 'cosine' or 'wsd'"),
        ({"train": {"steps": 5, "warmup_steps": 9}}, "exceed steps 5"),
        ({"train": {"decay_steps": 9}}, "decay_steps applies only to schedule wsd"),
        (
            {"train": {"steps": 9, "warmup_steps": 0, "profile": [8, 10]}},
            "the last step to record, of steps 1 to 9",
        ),
        ({"train": {"profile": [3]}}, "must be the first and the last step"),
        ({"train": {"lr": -1, "stepz": 1}}, "did you mean train.steps?"),
    ],
)
def test_mistake_in_a_file_names_the_key(values: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        config.validate({**MINIMAL, **values}, "run.yaml")
    assert message in str(error.value)
    assert str(error.value).startswith("run.yaml: ")


def test_all_mistakes_are_listed_at_once() -> None:
    values = {**MINIMAL, "train": {"lr": -1, "stepz": 1}}
    with pytest.raises(UserError) as error:
        config.validate(values, "run.yaml")
    assert "train.lr" in str(error.value) and "train.stepz" in str(error.value)


def test_unknown_option_suggests_the_right_one(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command_line.parse("--run_dir r --data.corpus c --train.lrr 1".split(), "clue-ds pretrain")
    assert stop.value.code == 2
    assert "--train.lr" in capfd.readouterr().err.split("Perhaps you meant")[1]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--train.steps 5", "Error parsing train: warmup_steps 9 + decay_steps 0 exceed steps 5"),
        (
            "--train.steps 9 --data.mask_prob 2",
            "Error parsing data: mask_prob: Input should be less than 1",
        ),
    ],
)
def test_a_mistake_in_an_option_is_one_sentence(
    option: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    words = f"--run_dir r --data.corpus c --train.warmup_steps 9 {option}".split()
    with pytest.raises(SystemExit) as stop:
        command_line.parse(words, "clue-ds pretrain")
    said = capfd.readouterr().err
    assert stop.value.code == 2 and "pydantic" not in said
    assert message in " ".join(said.replace("│", " ").split())


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not valid YAML"), ("- 1\n", "`key: value`"), ("", "`key: value`")],
)
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.load(_write(tmp_path, text))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml does not exist"):
        config.load(tmp_path / "nowhere.yaml")


def test_accumulation_follows_from_the_batch_sizes() -> None:
    train = config.validate(MINIMAL, "test").train
    assert (train.global_batch_size, train.micro_batch_size) == (256, "auto")
    train = train.model_copy(update={"micro_batch_size": 32})
    assert [train.gradient_accumulation_steps(world_size) for world_size in (1, 2, 8)] == [8, 4, 1]
    with pytest.raises(UserError, match="set train.global_batch_size to 192 or 288"):
        train.gradient_accumulation_steps(3)
    with pytest.raises(UserError, match="set train.global_batch_size to 512 "):
        train.gradient_accumulation_steps(16)


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "fits"),
    [
        (256, 32, 16, "set train.micro_batch_size to 16, or start 8 ranks, or"),
        (8, 2, 3, "= 6; start 2 or 4 ranks, or"),
        (8, 16, 1, "= 16; set train.micro_batch_size to 8, or"),
        (32, 32, 8, "set train.micro_batch_size to 4, or start 1 rank, or"),
        (9, 5, 2, "start 1 or 3 ranks with train.micro_batch_size 1, or"),
    ],
)
def test_what_does_not_divide_says_which_ranks_and_micro_batches_fit(
    batch: int, micro: int, ranks: int, fits: str
) -> None:
    sizes = {"global_batch_size": batch, "micro_batch_size": micro}
    train = config.validate({**MINIMAL, "train": sizes}, "test").train
    with pytest.raises(UserError, match=fits):
        train.gradient_accumulation_steps(ranks)


def test_predictions_are_20_at_128_and_77_at_512() -> None:
    def predictions(seq_length: int) -> int:
        data = {"corpus": "c", "seq_length": seq_length}
        return config.validate({**MINIMAL, "data": data}, "test").data.num_predictions()

    assert (predictions(128), predictions(512)) == (20, 77)


def test_model_section_overrides_the_preset() -> None:
    values = {**MINIMAL, "model": {"preset": "roberta_tiny_clue", "num_hidden_layers": 2}}
    resolved = config.validate(values, "test").model.resolve(vocab_size=100)
    assert (resolved.vocab_size, resolved.num_hidden_layers, resolved.hidden_size) == (100, 2, 312)


def test_every_key_has_a_description() -> None:
    def check(section: type, prefix: str) -> None:
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                assert field.annotation.__doc__
                check(field.annotation, f"{prefix}{name}.")
            else:
                assert field.description, prefix + name

    check(RunConfig, "")


@pytest.mark.parametrize("value", ["inf", "nan", "1e400"])
def test_a_number_without_end_is_refused(value: str) -> None:
    values = {"run_dir": "r", "data": {"corpus": "c"}, "train": {"lr": float(value)}}
    with pytest.raises(UserError, match="train.lr: Input should be a finite number"):
        config.validate(values, "run.yaml")
