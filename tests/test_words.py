"""Whole-word marks: rjieba's words on tokens, against a plain Python rule."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import rjieba
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import ODD, TOKENS, write_vocab

from clue_ds.data import Tokenizer
from clue_ds.data.text.words import mark_words, word_lengths


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_vocab(tmp_path_factory.mktemp("vocab"), (*TOKENS, *"的研究小组3.5%年")))


def marked(tokenizer: Tokenizer, text: str) -> tuple[list[str], list[bool]]:
    tokens, starts, lengths = tokenizer.encode_marked(text.encode())
    mark_words(tokens, starts, lengths, word_lengths(text, "rjieba"), tokenizer.continues)
    ids = tokens & (tokenizer.continues - 1)
    return [tokenizer.tokens[i] for i in ids], ((tokens & tokenizer.continues) != 0).tolist()


def test_words_of_a_sentence(tokenizer: Tokenizer) -> None:
    tokens, continues = marked(tokenizer, "中国人民的研究小组")
    assert tokens == list("中国人民的研究小组")
    words = "".join(("" if c else "|") + t for t, c in zip(tokens, continues, strict=True))
    assert words == "|" + "|".join(rjieba.cut("中国人民的研究小组"))
    assert any(continues)


def test_pieces_and_numbers_continue(tokenizer: Tokenizer) -> None:
    tokens, continues = marked(tokenizer, "unaffable 3.5%")
    assert tokens == ["un", "##aff", "##able", "3", ".", "5", "%"]
    assert continues == [False, True, True, False, True, True, True]


def test_a_line_begins_a_word(tokenizer: Tokenizer) -> None:
    tokens, continues = marked(tokenizer, "中\n国")
    assert tokens == ["中", "国"]
    assert continues == [False, False]


def plain_marks(tokenizer: Tokenizer, text: str) -> list[bool]:
    """In plain Python: the token is a ## piece, or begins in the word of the token before it."""
    result = []
    for line in text.split("\n"):
        word_of = [n for n, word in enumerate(rjieba.cut(line)) for _ in word]
        tokens, starts, _ = tokenizer.encode_marked(line.encode())
        words = [word_of[s] for s in starts]
        piece = [bool(t & tokenizer.continues) for t in tokens]
        result += [piece[i] or (i > 0 and words[i] == words[i - 1]) for i in range(len(words))]
    return result


TEXT = st.text(st.sampled_from("中国人民的研究小组年 ab10c3.5%，。\n" + ODD), max_size=60)


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_marks_equal_the_plain_rule(tokenizer: Tokenizer, text: str) -> None:
    assert marked(tokenizer, text)[1] == plain_marks(tokenizer, text)


def test_many_lines_are_cut_as_each_line_is(shared_data: Path) -> None:
    """`clue-ds shard` segments whole blocks; here the first 2 MB of the mixed corpora."""
    for name in ("d2l_zh.txt.gz", "uer_CLUECorpusSmall_bert_sampled.txt.gz"):
        text = gzip.decompress((shared_data / "corpora" / name).read_bytes()).decode()[:700_000]
        by_line = [len(w) for line in text.split("\n") for w in (*rjieba.cut(line), "\n")][:-1]
        assert np.array_equal(word_lengths(text, "rjieba"), by_line)


def test_no_words_only_pieces(tokenizer: Tokenizer) -> None:
    tokens, _, _ = tokenizer.encode_marked("中国 unaffable".encode())
    assert ((tokens & tokenizer.continues) != 0).tolist() == [False, False, False, True, True]
