"""YAML files, paths and command lines: what is meant is kept, what is doubtful is refused."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from clue_ds import command_line, config
from clue_ds.errors import UserError
from clue_ds.settings import arguments, paths, yaml_file
from clue_ds.tasks import registry

TEN = ",".join
LEVELS = range(9)
# 10^9 values in 400 bytes, by lists and by merged mappings.
LISTS = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n + 1}: &a{n + 1} [{TEN([f'*a{n}'] * 10)}]\n" for n in LEVELS
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n + 1}: &a{n + 1} {{<<: [{TEN([f'*a{n}'] * 10)}]}}\n" for n in LEVELS
)
REFUSED = {
    "aliases": (LISTS, "line 1, key a4", "more than 20,000 values"),
    "merges": (MERGES, "line 1, key a4.x", "more than 20,000 values"),
    "recursion": ("a: &a [*a]", "line 1, key a[0]", "nested more than 20 deep"),
    "depth": ("a: " + "[" * 100_000, "line 1", "nested more than 20 deep"),
    "indents": ("".join(f"{' ' * n}a:\n" for n in range(900)), "line 21", "nested more"),
    "length": ("a: [" + "1," * 400_000 + "]", "line 1", "more than 20,000 values"),
    "megabytes": ("# " + "x" * (1 << 20), "", "larger than 1 MiB"),
    "twice": ("run_dir: a\nseed: 1\nrun_dir: b\n", "line 3, key run_dir", "twice, first in line 1"),
    "nested twice": ("train:\n  lr: 1\n  lr: 2\n", "line 3, key train.lr", "first in line 2"),
    "date": ("a:\n  b: 2001-99-99", "line 2, key a.b", "month must be in 1..12"),
    "long number": ("a: " + "9" * 5_000, "line 1, key a", "too long for a number"),
    "sexagesimal": ("a: 1" + ":1" * 5_000, "line 1, key a", "too long for a number"),
    "no number": ("a: !!int x", "line 1, key a", "can't read 'x'"),
    "no bool": ("a: !!bool x", "line 1, key a", "not of the type"),
    "object": ("a: !!python/object/apply:os.system [id]", "line 1, key a", "can't be used here"),
    "set": ("a: !!set {b}", "line 1, key a", "can't be used here"),
    "control": ("a: \x07", "", "control character #x0007"),
    "documents": ("a: 1\n---\nb: 2", "line 2", "another document"),
    "tab": ("a:\n\t- b", "line 2", "not valid YAML"),
    "list as key": ("? [1]\n: 2", "line 1", "a key must be a single word or text"),
    "no mapping to merge": ("a: {<<: 1}", "line 1, key a", "`<<` takes a mapping"),
    "long key": ("? " + "k" * 5_000 + "\n: 1", "line 1", "longer than any path"),
    "undefined": ("a: *" + "x" * 10_000, "line 1", "undefined alias"),
    "text": ("x" * 100_000, "", "`key: value` lines"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_doubtful_file_is_refused_with_its_place(case: str, tmp_path: Path) -> None:
    text, place, said = REFUSED[case]
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as error:
        yaml_file.read(path)
    message = str(error.value)
    assert message.startswith(f"config file {path}") and place in message and said in message
    assert len(message) < len(str(path)) + 600
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_mistakes_in_a_large_file_are_a_short_message(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    many = ",".join(["{}"] * 5_000)
    path.write_text(f"run_dir: r\n'a\\tb {'x' * 900}': 1\ndata: {{corpus: c, pairs: [{many}]}}\n")
    with pytest.raises(UserError) as error:
        config.load(path)
    assert len(str(error.value)) < 3_000
    assert "more mistakes" in str(error.value)


def test_a_key_with_spaces_is_in_quotes() -> None:
    with pytest.raises(UserError, match=r"unknown key train\.'l r'; did you mean train\.lr\?"):
        config.validate({"run_dir": "r", "data": {"corpus": "c"}, "train": {"l r": 1}}, "run.yaml")


def test_windows_line_ends_and_a_byte_order_mark_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("\ufeffrun_dir: 甲\r\ndata:\r\n  corpus: c\r\n".encode())
    assert config.load(path).run_dir == "甲"
    path.write_bytes("a: 1\nb: 甲".encode("gb18030"))
    with pytest.raises(UserError, match="line 2: not UTF-8 text"):
        config.load(path)


def test_aliases_and_merges_that_are_used_with_measure_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "base: &base {lr: 1, steps: 2}\nother: &other {lr: 3, seed: 4}\n"
        "train: {<<: [*base, *other], steps: 5}\nalso: *base\n1: null\n"
    )
    assert yaml_file.read(path) == {
        "base": {"lr": 1, "steps": 2},
        "other": {"lr": 3, "seed": 4},
        "train": {"lr": 1, "seed": 4, "steps": 5},
        "also": {"lr": 1, "steps": 2},
        1: None,
    }


def test_home_and_variables_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("NOWHERE", raising=False)
    for given, meant in {
        "~/x": "/home/me/x",
        "~": "/home/me",
        "$SCRATCH/x": "/scratch/x",
        "${SCRATCH}x": "/scratchx",
        "~/$SCRATCH": "/home/me//scratch",
        "a~b": "a~b",
        "cost$": "cost$",
        "5$/x": "5$/x",
        "clue/roberta_chinese_clue_tiny": "clue/roberta_chinese_clue_tiny",
        "hf:a:b": "hf:a:b",
        "-": "-",
        "": "",
    }.items():
        assert paths.expand(given) == meant
    for given, said in {
        "$NOWHERE/x": "the variable NOWHERE is not set",
        "~nobody-of-this-name/x": "the home directory of ~nobody-of-this-name is not known",
    }.items():
        with pytest.raises(UserError, match=said):
            paths.expand(given)


def test_every_path_of_a_config_is_expanded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", "/h")
    path = tmp_path / "run.yaml"
    path.write_text(
        "run_dir: ~/r\ndeepspeed: ~/ds.json\nmodel: {init: $HOME/m}\n"
        "data: {corpus: ~/c, held_out: ~/o, mixture: {~/d: 0.5}}\n"
    )
    read = config.load(path)
    assert (read.run_dir, read.deepspeed, read.model.init) == ("/h/r", "/h/ds.json", "/h/m")
    assert (read.data.corpus, read.data.held_out) == ("/h/c", "/h/o")
    assert read.data.mixture == {"/h/d": 0.5}
    given = ["--config", str(path), "--run_dir", "~/q", "--data.pairs", "~/p", "$HOME/p"]
    parsed = command_line.parse([*given, "--train.objective", "pair"], "clue-ds pretrain")
    assert (parsed.run_dir, parsed.data.pairs) == ("/h/q", ["/h/p", "/h/p"])


def test_paths_of_verbs_are_expanded_and_texts_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    seen = []

    def verb(
        model: arguments.PathOrName, output: Path | None = None, text: tuple[str, ...] = ()
    ) -> None:
        seen.append((model, output, text))

    words = ["--model", "~/m", "--output=$HOME/o", "--text", "~/t", "$HOME"]
    arguments.call(verb, "verb", words)
    assert seen == [("/h/m", Path("/h/o"), ("~/t", "$HOME"))]


@pytest.mark.parametrize("given", ["false", "False"])
def test_a_switch_of_the_config_is_written_as_in_yaml_or_as_in_python(given: str) -> None:
    words = ["--run_dir", "r", "--data.corpus", "c", "--data.whole_word", given, "--extend"]
    parsed = command_line.parse(words, "clue-ds pretrain")
    switches = (parsed.data.whole_word, parsed.extend, parsed.checkpoint.keep_best)
    assert switches == (False, True, False)


@pytest.mark.parametrize("given", ["--a 1 --a 2", "--a=1 --b 2 --a 3", "--no-a-b --no_a_b"])
def test_an_option_given_twice_is_refused(given: str) -> None:
    with pytest.raises(UserError, match="is given twice"):
        arguments.refuse_repeated(given.split())
    arguments.refuse_repeated(["--a", "1", "--local_rank=0", "--local_rank=0", "--", "--a", "2"])
    with pytest.raises(UserError, match=r"--train.lr is given twice"):
        command_line.parse(["--train.lr", "1", "--train.lr=2"], "clue-ds pretrain")


def test_a_task_file_is_read_by_the_same_rules(tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_text("name: x\ntext: [a]\nlabels: [p, n]\nname: y\n")
    with pytest.raises(UserError, match="line 4, key name: the key is given twice"):
        registry.custom(path)


def test_old_names_of_options_work_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    given: list[tuple[Path | None, bool]] = []

    def verb(output: Path | None = None, force: bool = False) -> None:
        """Do nothing."""
        given.append((output, force))

    arguments.call(verb, "clue-ds verb", ["--out=a", "--overwrite"])
    said = capsys.readouterr().err
    assert "clue-ds verb: note: --out is now called --output" in said
    assert "clue-ds verb: note: --overwrite is now called --force" in said
    arguments.call(verb, "clue-ds verb", ["--output", "a", "--force"])
    assert given == [(Path("a"), True)] * 2 and not capsys.readouterr().err
    with pytest.raises(UserError, match="is given twice"):
        arguments.call(verb, "clue-ds verb", ["--out", "a", "--output", "b"])


def test_the_settings_of_a_run_take_dashes_and_underscores(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {corpus: c}\n")
    words = f"--config {path} --run-dir r --data.seq-length 64 --train.warmup_steps 7".split()
    read = command_line.parse(words, "clue-ds pretrain")
    assert (read.run_dir, read.data.seq_length, read.train.warmup_steps) == ("r", 64, 7)
    assert type(read) is config.RunConfig


def test_a_name_that_is_too_long_for_a_file_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="can't be opened: File name too long; give the path"):
        yaml_file.read("x" * 300)
