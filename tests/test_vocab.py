"""Vocabularies: reading and its errors, learning, CLUE's rule."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from clue_ds import files, vocab_file
from clue_ds.cli import main
from clue_ds.data import Tokenizer
from clue_ds.data.text.clue_vocab import slim_vocab
from clue_ds.data.text.special_tokens import LEADING_TOKENS
from clue_ds.data.text.vocab import clue, learn, read_vocab
from clue_ds.errors import UserError
from clue_ds.export import huggingface


def test_layout_is_googles() -> None:
    special = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
    assert {token: LEADING_TOKENS.index(token) for token in special} == special
    assert LEADING_TOKENS[1] == "[unused1]"
    assert LEADING_TOKENS[99] == "[unused99]"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "vocab.txt is empty"),
        (b"\n", "is not a BERT vocabulary"),
        ("中\n国\n".encode(), "not a BERT vocabulary"),
        (
            b"\xef\xbb\xbf" + "".join(f"{t}\n" for t in LEADING_TOKENS).encode(),
            r"byte order mark .* sed -i",
        ),
        ("[PAD]\n".encode("utf-16"), "is UTF-16; convert it with: iconv"),
        ("".join(f"{t}\n" for t in LEADING_TOKENS).encode() + b"\n", r"empty line \(line 105\)"),
        ("".join(f"{t}\n" for t in LEADING_TOKENS).encode() + b" \t\n", r"empty line \(line 105"),
        (b"[PAD]\n[MASK] \n", r"line 2 of .* is '\[MASK\] ', .* write '\[MASK\]' there"),
        (b"[PAD]\na\rb\n", "line 2 of .* holds a carriage return"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"[PAD]\n\xff\n", "not UTF-8 at byte 6"),
    ],
)
def test_what_is_no_vocabulary(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_vocab(path)


def test_missing_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_vocab(tmp_path / "none.txt")
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match="is a symbolic link to nowhere, which does not exist"):
        read_vocab(tmp_path / "dangling.txt")


def test_empty_line_keeps_its_id_and_is_never_found(tmp_path: Path) -> None:
    """Removing the line would move every later id by one."""
    path = tmp_path / "vocab.txt"
    path.write_text("".join(f"{t}\n" for t in (*LEADING_TOKENS, "中", "", "国", "", "##国")))
    assert read_vocab(path)[104:] == ["中", "", "国", "", "##国"]
    assert Tokenizer(path).encode("国中 国 x 中国").tolist() == [106, 104, 106, 100, 104, 106]


def test_line_ends_of_windows_are_no_part_of_tokens(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes("".join(f"{t}\r\n" for t in (*LEADING_TOKENS, "中")).encode())
    assert read_vocab(path) == [*LEADING_TOKENS, "中"]


def test_tokenizer_json_holds_the_same_tokens(tmp_path: Path) -> None:
    tokens = [*LEADING_TOKENS, "中", "", "##国"]
    library = huggingface.fast_tokenizer(tokens, lower_case=False)
    library.save(str(tmp_path / "tokenizer.json"))
    path = vocab_file.find(tmp_path)
    assert path == tmp_path / "tokenizer.json"
    assert read_vocab(path) == tokens
    assert vocab_file.lower_case(path) is False
    values = json.loads(path.read_text("utf-8"))
    # A hole keeps the ids behind it.
    del values["model"]["vocab"][""]
    path.write_text(json.dumps(values))
    assert read_vocab(path) == tokens
    values["added_tokens"].append({"id": 107, "content": "<new>"})
    path.write_text(json.dumps(values))
    assert read_vocab(path) == [*tokens, "<new>"]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert vocab_file.lower_case(path) is True
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": "false"}')
    with pytest.raises(UserError, match="do_lower_case is 'false'; it must be true or false"):
        vocab_file.lower_case(path)
    with pytest.raises(UserError, match="is not a vocab.txt; `clue-ds import`"):
        vocab_file.existing_text(path)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("model", {"type": "BPE"}, 'model.type is "BPE", not "WordPiece"'),
        ("model", {"continuing_subword_prefix": "@@"}, "continuing_subword_prefix"),
        ("model", {"vocab": ["a"]}, "model.vocab is not an object"),
        ("model", {"vocab": {"a": "0"}}, "'a' has the id '0'"),
        ("model", {"vocab": {"a": 0, "b": 0}}, "'b' have the same id 0"),
        ("model", {"vocab": {"a": 1 << 60}}, "which is no id"),
        ("model", {"vocab": {"a": 9_999_999}}, "most ids are missing"),
        ("model", {"vocab": {"a\nb": 200}}, "holds a line break"),
        ("normalizer", {"type": "NFKC"}, 'normalizer.type is "NFKC"'),
        ("normalizer", {"strip_accents": False}, "strip_accents differs"),
        ("pre_tokenizer", {"type": "ByteLevel"}, 'pre_tokenizer.type is "ByteLevel"'),
    ],
)
def test_tokenizer_json_that_is_no_berts(
    part: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    huggingface.fast_tokenizer(LEADING_TOKENS, lower_case=True).save(str(path))
    content = json.loads(path.read_text("utf-8"))
    if message.endswith("most ids are missing") or "no id" in message or "same id" in message:
        content["added_tokens"] = []
    content[part] |= values
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_vocab(path)


def test_vocabularies_are_compared_by_tokens() -> None:
    assert vocab_file.difference(["a", "b"], ["a", "b"]) is None
    assert vocab_file.difference(["a", "b"], ["a", "c"]) == "id 1 is 'b' there and 'c' here"
    assert vocab_file.difference(["a"], ["a", "c"]) == "1 tokens there and 2 here"
    # Only the last line of a token is used; tokenizer.json has no other.
    assert vocab_file.difference(["a", "b", "a"], ["", "b", "a"]) is None


def test_line_separators_other_than_line_feeds_are_tokens(tmp_path: Path) -> None:
    """Google's vocabulary has U+2028 as a token; splitting lines there would shift later ids."""
    path = tmp_path / "vocab.txt"
    path.write_text("".join(f"{t}\n" for t in (*LEADING_TOKENS, "\u2028", "中")), encoding="utf-8")
    assert read_vocab(path)[-2:] == ["\u2028", "中"]


def test_hash_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(b"[PAD]\n")
    assert files.sha256(path) == hashlib.sha256(b"[PAD]\n").hexdigest()


@pytest.fixture
def text_file(tmp_path: Path, sample_text: str) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(sample_text * 3 + "Transformers transform transformer models\n" * 5)
    return path


def test_learned_vocabulary_covers_the_text(text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "vocab.txt"
    learn((str(text_file),), output=output, size=600)
    tokens = read_vocab(output)
    assert tokens[: len(LEADING_TOKENS)] == list(LEADING_TOKENS)
    assert len(tokens) <= 600
    assert len(set(tokens)) == len(tokens)
    assert "的" in tokens
    assert "transform" in tokens  # joined, not only letters
    tokenizer = Tokenizer(output)
    assert tokenizer.unk_id not in tokenizer.encode(text_file.read_text())


def test_learning_twice_gives_the_same(text_file: Path, tmp_path: Path) -> None:
    """The trainer's hash tables get a new seed each time; here the lines are reversed too."""
    reverse = tmp_path / "reverse.txt"
    reverse.write_text("\n".join(reversed(text_file.read_text().split("\n"))))
    learn((str(text_file),), output=tmp_path / "one.txt", size=400)
    learn((str(reverse),), output=tmp_path / "two.txt", size=400)
    assert (tmp_path / "one.txt").read_bytes() == (tmp_path / "two.txt").read_bytes()


def test_size_limits_the_characters_too(text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "vocab.txt"
    learn((str(text_file),), output=output, size=150)
    assert len(read_vocab(output)) <= 150


def test_min_frequency(text_file: Path, tmp_path: Path) -> None:
    """ "transform" occurs 15 times, "transformers" 5 times."""
    learn((str(text_file),), output=tmp_path / "v", size=600, min_frequency=8)
    tokens = read_vocab(tmp_path / "v")
    assert "transform" in tokens
    assert "transformers" not in tokens
    assert "湖" not in tokens


def test_t2s_and_case(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("漢字漢字 ABC\n" * 3)
    learn((str(path),), output=tmp_path / "v", size=200, t2s=True)
    assert {"汉", "a"} <= set(read_vocab(tmp_path / "v"))
    learn((str(path),), output=tmp_path / "v", size=200, lower_case=False)
    assert {"漢", "A"} <= set(read_vocab(tmp_path / "v"))


def test_learning_errors(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leaves no room"):
        learn((str(text_file),), output=tmp_path / "v", size=104)
    blank = tmp_path / "blank.txt"
    blank.write_text("\n \n")
    with pytest.raises(UserError, match="nothing to learn"):
        learn((str(blank),), output=tmp_path / "v")
    assert not (tmp_path / "v").exists()


def test_command_line(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "vocab.txt"
    arguments = ["vocab", "learn", str(text_file), "--output", str(output), "--size", "200"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "104 special and unused" in printed and "was not reached" not in printed
    with text_file.open("ab") as file:
        file.write(b"\xff\n")
    arguments[-1] = "9000"
    assert main(arguments) == 2
    assert "--on-error skip" in capsys.readouterr().err
    assert main([*arguments, "--on-error", "skip"]) == 0
    assert "so --size 9,000 was not reached" in capsys.readouterr().out
    assert main(["vocab", "clue", str(tmp_path / "none"), "--output", str(output)]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_clue_rule_on_a_small_list() -> None:
    tokens = [*LEADING_TOKENS, "<S>", "<T>", '"', "9", "2016", "國", "国", "##国", "the", "##the"]
    tokens += [
        "x",
        "##1",
        "##12",
        "か",
        "한",
        "ㄅ",
        "😀",
        "❤",
        "！",
        "##°c",
        "㎡",
        "##㎡",
        "\u2028",
    ]
    slim = slim_vocab(tokens)
    inserted = ["9", *map(str, range(10, 101)), *map(str, range(2016, 2023))]
    expected = [*LEADING_TOKENS, "<S>", "<T>", '"', "“", "‘", *inserted, "国", "##the", "x", "##1"]
    assert slim.tokens == [*expected, "😀", "！", "##°c", "㎡"]
    # The published rule names its emoji one by one; 😀 is not in Google's list and not among them.
    assert sum(slim.kept.values()) == len(slim.tokens)
    num_inserted = slim.kept["inserted"]
    assert len(slim.tokens) - num_inserted + sum(slim.dropped.values()) == len(tokens)


def test_clue_rule_gives_the_published_list(shared_data: Path, tmp_path: Path) -> None:
    clue(shared_data / "vocab" / "vocab_google_chinese.txt", output=tmp_path / "vocab.txt")
    published = (shared_data / "vocab" / "vocab_clue.txt").read_text(encoding="utf-8")
    assert (tmp_path / "vocab.txt").read_text(encoding="utf-8") == published
