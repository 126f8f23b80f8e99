"""The tokenizer against `transformers`' BertTokenizer: exact, on real text and odd code points."""

from __future__ import annotations

import gzip
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer

import clue_ds
from clue_ds.data import Tokenizer
from clue_ds.data.text.special_tokens import LEADING_TOKENS
from clue_ds.data.text.tokenizer import continues_bit, token_dtype
from clue_ds.errors import UserError

Reference = Callable[[list[str]], list[list[int]]]

# Latin pieces, accents' bases, Greek, Cyrillic, jamo, kana, CJK, punctuation, an emoji, and a piece
# that is longer than any word of the text.
TOKENS = (
    *LEADING_TOKENS,
    *"abcdefghijklmnopqrstuvwxyzABCÀÉ0123456789!#[].,-。，“中国人民龙龍豈αβσς한하ᄒ한がが😀",
    *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789αβσᅡᆫ゙〮"),
    *("the", "##ing", "mask", "un", "##aff", "##able", "ab", "##abab", "10", "##00", "##ababababc"),
)


def write_vocab(directory: Path, tokens: tuple[str, ...] = TOKENS) -> Path:
    path = directory / "vocab.txt"
    path.write_text("".join(f"{token}\n" for token in dict.fromkeys(tokens)), encoding="utf-8")
    return path


def reference(vocab_file: Path, lower_case: bool = True) -> Reference:
    """Ids of lines by `transformers`, which encodes special tokens in the text as text."""
    tokenizer = BertTokenizer.from_pretrained(vocab_file.parent, do_lower_case=lower_case)
    tokenizer.backend_tokenizer.encode_special_tokens = True

    def encode(lines: list[str]) -> list[list[int]]:
        batch = tokenizer.backend_tokenizer.encode_batch_fast(lines, add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    return encode


def assert_lines_equal(tokenizer: Tokenizer, encode: Reference, lines: list[str]) -> None:
    ids, lengths = tokenizer.encode_lines("".join(f"{line}\n" for line in lines).encode())
    expected = encode(lines)
    assert len(lengths) == len(lines)
    flat = np.fromiter((i for line in expected for i in line), dtype=np.int32)
    if np.array_equal(ids, flat) and lengths.tolist() == [len(line) for line in expected]:
        return
    got = np.split(ids, np.cumsum(lengths)[:-1])
    for line, ours, theirs in zip(lines, got, expected, strict=True):
        assert ours.tolist() == theirs, repr(line)


@pytest.fixture(scope="module")
def vocab_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocab(tmp_path_factory.mktemp("vocab"))


@pytest.fixture(scope="module", params=[True, False], ids=["lower", "cased"])
def pair(request: pytest.FixtureRequest, vocab_file: Path) -> tuple[Tokenizer, Reference]:
    return Tokenizer(vocab_file, request.param), reference(vocab_file, request.param)


CODE_POINTS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and c != 10]


@pytest.mark.heavy
def test_every_code_point_between_letters(pair: tuple[Tokenizer, Reference]) -> None:
    """All of Unicode, 1,112,063 of them."""
    for begin in range(0, len(CODE_POINTS), 100_000):
        points = CODE_POINTS[begin : begin + 100_000]
        assert_lines_equal(*pair, [f"ab{c}ab" for c in points])


def test_code_points_side_by_side(pair: tuple[Tokenizer, Reference]) -> None:
    """Runs of neighbouring code points, so that combining marks follow letters and marks."""
    points = [c for c in CODE_POINTS if ord(c) < 0x20000]
    lines = ["".join(points[i : i + 7]) for i in range(0, len(points), 7)]
    assert_lines_equal(*pair, lines)


# Drawn more often than chance would: what the fast path treats in its own way.
ODD = (
    "\x00\t\r\x0b\x1c\x85\xa0\u200b\u2028\u3000\ufeff\ufffd"
    + "İıßſﬁªﾞゞがが한ᄒ\u1161𝅥〮〯𝅭\u0301\u0334豈契龍"
)
TEXT = st.text(
    st.one_of(
        st.sampled_from(ODD),
        st.sampled_from("abcxyzABC 019[]#。，中国人民"),
        st.characters(exclude_categories=["Cs"], exclude_characters="\n"),
    ),
    max_size=40,
)


@settings(max_examples=400, deadline=None)
@given(lines=st.lists(TEXT, min_size=1, max_size=4))
def test_any_text(pair: tuple[Tokenizer, Reference], lines: list[str]) -> None:
    assert_lines_equal(*pair, lines)


def fuzzed(rng: random.Random) -> str:
    """Random strings of arbitrary code points, of odd ones, and of few scripts."""
    pools = (ODD, "abcxyzABC 019[]#。，中国人民", CODE_POINTS, CODE_POINTS[:0x3000])
    begin = rng.randrange(0x20000)
    pools += (CODE_POINTS[begin : begin + 64],)
    return "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(0, 24)))


def test_fuzzed_strings(pair: tuple[Tokenizer, Reference]) -> None:
    """100,000 strings, half of them for each of the two settings of lower case."""
    rng = random.Random(f"{pair[0].lower_case} {os.environ.get('FUZZ_SEED', '')}")
    for _ in range(5):
        assert_lines_equal(*pair, [fuzzed(rng) for _ in range(10_000)])


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_encode_equals_one_line(pair: tuple[Tokenizer, Reference], text: str) -> None:
    tokenizer, encode = pair
    assert tokenizer.encode(text).tolist() == encode([text])[0]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Unaffable", ["un", "##aff", "##able"]),
        ("[MASK] [mask]", ["[", "mask", "]", "[", "mask", "]"]),  # spelled specials stay text
        ("中国the", ["中", "国", "the"]),
        ("a" * 100, ["a"] + ["##a"] * 99),
        ("a" * 101, ["[UNK]"]),  # BERT's limit of 100 characters a word
        ("ab\nab", ["ab", "ab"]),
        ("한", ["한"]),  # NFD makes three letters of one syllable, and here a token matches them
        ("naïve", ["n", "##a", "##i", "##v", "##e"]),
        ("ab§", ["ab", "[UNK]"]),
        ("", []),
    ],
)
def test_known_results(vocab_file: Path, text: str, tokens: list[str]) -> None:
    vocab = [*dict.fromkeys(TOKENS)]
    if text == "한":
        vocab.append("\u1112\u1161\u11ab")
        vocab_file = write_vocab(vocab_file.parent / "..", tuple(vocab))
        tokens = ["\u1112\u1161\u11ab"]
    tokenizer = Tokenizer(vocab_file)
    assert [tokenizer.tokens[i] for i in tokenizer.encode(text)] == tokens


def test_marks_and_character_positions(vocab_file: Path) -> None:
    """Pieces carry the top bit; starts count code points across lines, on the slow path too."""
    tokenizer = Tokenizer(vocab_file)
    slow = "中\u302e 10ab"  # a Hangul tone mark sends its line through the library
    data = f"unaffable 😀国\n{slow}\nab".encode()
    ids, starts, lengths = tokenizer.encode_marked(data)
    text = data.decode()
    assert lengths.sum() == len(ids) == len(starts)
    assert [text[s] for s in starts[: lengths[0]]] == ["u", "a", "a", "😀", "国"]
    pieces = (ids & tokenizer.continues) != 0
    assert pieces[: lengths[0]].tolist() == [False, True, True, False, False]
    assert [text[s] for s in starts[-2:]] == ["1", "a"] or text[starts[-1]] == "a"
    assert starts[-1] == text.rindex("ab")
    assert np.all(np.diff(starts.astype(np.int64)) >= 0)


def test_lines(vocab_file: Path) -> None:
    tokenizer = Tokenizer(vocab_file)
    cases = {b"": [], b"\n": [0], b"\n\n": [0, 0], b"ab": [1], b"ab\n": [1], b"ab\nab ab": [1, 2]}
    for data, lengths in cases.items():
        assert tokenizer.encode_lines(data)[1].tolist() == lengths


def test_large_vocabulary_takes_uint32(tmp_path: Path) -> None:
    tokens = (*TOKENS, *(f"zz{i}" for i in range(40_000)), "##zzlast")
    path = write_vocab(tmp_path, tokens)
    tokenizer = Tokenizer(path)
    assert token_dtype(tokenizer.vocab_size) is np.uint32
    marked, _, _ = tokenizer.encode_marked(b"zz39999zzlast ab")
    assert marked.dtype == np.uint32
    assert marked[1] >> 31 == 1
    assert_lines_equal(tokenizer, reference(path), ["zz39999zzlast ab", "zz123 中国"])


def test_dtype_limits() -> None:
    assert token_dtype(1 << 15) is np.uint16
    assert token_dtype((1 << 15) + 1) is np.uint32
    assert continues_bit(np.uint16) == 0x8000


def test_repeated_token_means_its_last_line(tmp_path: Path) -> None:
    """As in `transformers`: some published vocabularies repeat a token."""
    path = tmp_path / "vocab.txt"
    path.write_text("".join(f"{t}\n" for t in (*LEADING_TOKENS, "中", "国", "中")))
    assert_lines_equal(Tokenizer(path), reference(path), ["中国"])


def test_bad_utf8_names_the_byte(vocab_file: Path) -> None:
    with pytest.raises(UserError, match="byte 3"):
        Tokenizer(vocab_file).encode_lines(b"ab\n\xff")


def test_threads_share_a_tokenizer(vocab_file: Path) -> None:
    """Pages are probed on demand; threads that need the same page at once get the same ids."""
    tokenizer = Tokenizer(vocab_file)
    data = "".join(CODE_POINTS[:0xD7A4]).encode("utf-8")  # Hangul syllables included
    results: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: results.append(tokenizer.encode_lines(data)[0]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = Tokenizer(vocab_file).encode_lines(data)[0]
    assert len(results) == 4
    assert all(np.array_equal(result, expected) for result in results)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[2])
import clue_ds.data.text.wordpiece
from clue_ds.data import Tokenizer
print(clue_ds.data.text.wordpiece.__file__, Tokenizer(sys.argv[1]).encode("ab"))
"""


@pytest.mark.parametrize("writable", ["package", "home", "nothing"])
def test_processes_that_start_together(vocab_file: Path, tmp_path: Path, writable: str) -> None:
    """Two at once, with an empty compile cache in the package, in the home, or with none at all.

    A file where a directory should be keeps everybody, root included, from writing into it.
    """
    package = Path(clue_ds.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__")
    copy = shutil.copytree(package, tmp_path / "clue_ds", ignore=ignored) / "data"
    if writable != "package":
        (copy / "text" / "__pycache__").touch()
    home = tmp_path / "home"
    home.touch() if writable == "nothing" else home.mkdir()
    environment = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home)}
    environment.pop("NUMBA_CACHE_DIR", None)
    command = [sys.executable, "-c", SCRIPT, str(vocab_file), str(tmp_path)]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith(str(copy))
    cached = {"package": copy, "home": home, "nothing": tmp_path}[writable]
    assert any(cached.rglob("*.nbi")) is (writable != "nothing")


CORPORA = [
    pytest.param("laws_zh.txt.gz", marks=pytest.mark.heavy),
    pytest.param("poetry_traditional.txt.gz", marks=pytest.mark.heavy),
    "paddle_docs_zh.txt.gz",
    "d2l_zh.txt.gz",
    "uer_CLUECorpusSmall_bert_sampled.txt.gz",
    "sample_zh.txt",
]


@pytest.mark.parametrize("vocabulary", ["vocab_clue.txt", "vocab_google_chinese.txt"])
@pytest.mark.parametrize("corpus", CORPORA)
def test_every_line_of_the_corpora(
    shared_data: Path, tmp_path: Path, corpus: str, vocabulary: str
) -> None:
    """Each distinct line once: the corpora repeat headings, and the reference takes all the time.

    With Google's vocabulary it is every line; with CLUE's, one in four of the two large corpora.
    """
    path = shared_data / "corpora" / corpus
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = data.decode()
    if "traditional" in corpus:
        import opencc

        text = opencc.OpenCC("t2s").convert(text)
    shutil.copy(shared_data / "vocab" / vocabulary, tmp_path / "vocab.txt")
    tokenizer = Tokenizer(tmp_path / "vocab.txt")
    encode = reference(tmp_path / "vocab.txt")
    lines = list(dict.fromkeys(text.split("\n")))
    if corpus.startswith(("laws", "poetry")) and "clue" in vocabulary:
        lines = lines[::4]
    for begin in range(0, len(lines), 50_000):
        assert_lines_equal(tokenizer, encode, lines[begin : begin + 50_000])
