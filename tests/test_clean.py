"""Cleaning rules, duplicates, held-out documents, report: they drop, and count, the right text."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clue_ds.data import Corpus, Tokenizer
from clue_ds.data.build import clean, dedup
from clue_ds.data.build.clean import line_facts
from clue_ds.data.build.command import shard
from clue_ds.data.build.options import DUPLICATE, KEPT, MAX_SIMILARITY, NEAR_DUPLICATE, Cleaning
from clue_ds.data.build.report import write_report
from clue_ds.data.corpus import ShardArrays
from clue_ds.data.text.decode import Tally
from clue_ds.data.text.special_tokens import LEADING_TOKENS
from clue_ds.errors import UserError


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    characters = sorted({c for c in sample_text if not c.isspace()} | set("abcdefghij0123456789"))
    tokens = (*LEADING_TOKENS, *characters, *(f"##{c}" for c in "abcdefghij0123456789"))
    path.write_text("".join(f"{token}\n" for token in dict.fromkeys(tokens)), encoding="utf-8")
    return path


def make(path: Path, text: str, vocab: Path, **options: Any) -> tuple[Corpus, dict[str, Any]]:
    """A corpus of `text` in small shards, and its corpus.json; `options` may be cleaning rules."""
    path.mkdir(exist_ok=True)
    (path / "text.txt").write_text(text, encoding="utf-8")
    rules = {k: options.pop(k) for k in list(options) if k in Cleaning.__dataclass_fields__}
    arguments = {"workers": 1, "shard_megabytes": 0.001, "words": "none"} | options
    inputs = (str(path / "text.txt"),)
    shard(inputs, output=path / "corpus", vocab=vocab, clean=Cleaning(**rules), **arguments)
    corpus = Corpus(path / "corpus")
    return corpus, json.loads(corpus.manifest_file.read_text())


def sentences(corpus: Corpus) -> list[str]:
    tokenizer = Tokenizer(corpus.vocab_file)
    return [
        tokenizer.text(ids)
        for one in corpus.shards
        for ids in np.split(one.tokens & (tokenizer.continues - 1), one.sentence_ends[:-1])
    ]


def test_controls_are_only_what_the_tokenizer_drops_anyway(vocab: Path) -> None:
    """BERT's tokens are the same with and without any code point that the rule removes."""
    tokenizer = Tokenizer(vocab)
    matched = [c for c in map(chr, range(0x110000)) if clean._CONTROLS.fullmatch(c)]
    assert {unicodedata.category(c) for c in matched} == {"Cc", "Cf", "So"}  # So: U+FFFD
    assert len(matched) == 65 - 3 + 18  # C0, DEL and C1 without tab, LF, CR; the others
    for character in matched:
        assert tokenizer.encode(f"a{character}b").tolist() == tokenizer.encode("ab").tolist()
        assert clean.has_controls(np.frombuffer(f"中{character}文".encode(), np.uint8))


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_the_quick_look_misses_nothing(text: str) -> None:
    if clean._CONTROLS.search(text):
        assert clean.has_controls(np.frombuffer(text.encode(), np.uint8))


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from("中a &\n;#amptlgn1038x\u200b\ufeff"), max_size=60))
def test_editing_keeps_lines_and_ends(text: str) -> None:
    """The number of lines is kept; editing again changes only entities inside entities."""
    tally = Tally()
    edited = clean.edit(text, text.encode(), Cleaning(html=True), tally)
    assert edited.count("\n") == text.count("\n")
    assert not clean._CONTROLS.search(edited)
    assert clean.edit(text, text.encode(), Cleaning(controls=False), Tally()) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A&amp;B &#20013;&#x6587;&nbsp;&lt;", "A&B 中文\xa0<"),
        ("R&D; AT&T &unknown; &", "R&D; AT&T &unknown; &"),
        ("a&#10;b&#0;c&NewLine;d", "a bc d"),
    ],
)
def test_entities(text: str, expected: str) -> None:
    result = clean.edit(text, text.encode(), Cleaning(html=True), Tally())
    assert result.replace("�", "") == expected


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("中国a é😀𠀀龍\t\u3000\n。"), max_size=60))
def test_line_facts_equal_the_plain_rule(text: str) -> None:
    lines = text.split("\n")
    facts = np.zeros((3, len(lines)), dtype=np.uint64)
    line_facts(np.frombuffer(text.encode(), np.uint8), *facts)
    plain = ["".join(c for c in line if c not in " \t\xa0\u3000") for line in lines]
    assert facts[1].tolist() == [len(line) for line in plain]
    assert facts[2].tolist() == [sum(c in "中国𠀀龍" for c in line) for line in plain]
    assert len(set(facts[0].tolist())) == len(set(plain))


def test_nothing_is_dropped_by_default(tmp_path: Path, vocab: Path, sample_text: str) -> None:
    text = f"{sample_text}\n\n{sample_text}\n\na\n\na\n\n&amp;\n"
    _, manifest = make(tmp_path, text, vocab)
    assert manifest["num_sentences"] == len([line for line in text.split("\n") if line])
    assert manifest["samples"] == {}


DOCUMENTS = "短\n够长的一句话\n够长的一句话\n长得过分" + "啊" * 50 + "\n\nabc def\nabc 中\n\n短\n"


@pytest.mark.parametrize(
    ("rules", "counts"),
    [
        ({"min_chars": 2}, {"lines_too_short": 2, "documents_emptied": 1}),
        ({"max_chars": 20}, {"lines_too_long": 1}),
        ({"repeated_lines": True}, {"lines_repeated": 1}),
        ({"min_han": 0.5}, {"lines_foreign": 2, "documents_foreign": 1}),
        (
            {"min_chars": 2, "max_chars": 20, "repeated_lines": True, "min_han": 0.5},
            {"lines_too_short": 2, "lines_too_long": 1, "lines_repeated": 1, "lines_foreign": 2,
             "documents_foreign": 1, "documents_emptied": 1},
        ),
    ],
)  # fmt: skip
def test_each_rule_is_counted_and_sampled(
    tmp_path: Path, vocab: Path, rules: dict[str, Any], counts: dict[str, int]
) -> None:
    _, manifest = make(tmp_path, DOCUMENTS, vocab, **rules)
    got = {k: n for k, n in manifest["counts"].items() if k.startswith(("lines_", "documents_"))}
    assert {k: n for k, n in got.items() if n} == counts
    assert manifest["num_sentences"] == 7 - sum(
        n for name, n in counts.items() if name.startswith("lines_")
    )
    reasons = {name.partition("_")[2] for name in counts if name.startswith("lines_")}
    assert set(manifest["samples"]) == reasons


def random_documents(seed: int, sample_text: str, num: int) -> list[str]:
    """Documents of a few sentences, a third of them copies of earlier ones."""
    rng = random.Random(seed)
    lines = [line for line in sample_text.split("\n") if line]
    result: list[str] = []
    for i in range(num):
        if result and rng.random() < 0.3:
            result.append(rng.choice(result))
        else:
            body = [rng.choice(lines) for _ in range(rng.randint(1, 3))]
            result.append("\n".join([f"{i}", *body]))
    return result


def test_duplicates_are_dropped_across_shards(
    tmp_path: Path, vocab: Path, sample_text: str
) -> None:
    documents = random_documents(1, sample_text, 120)
    _, manifest = make(tmp_path / "c", "\n\n".join(documents), vocab, duplicates=True)
    unique = list(dict.fromkeys(documents))
    corpus, expected = make(tmp_path / "u", "\n\n".join(unique), vocab)
    assert len(manifest["shards"]) > 5
    assert sentences(Corpus(tmp_path / "c" / "corpus")) == sentences(corpus)
    assert manifest["num_documents"] == len(unique) == expected["num_documents"]
    assert manifest["counts"]["documents_duplicate"] == len(documents) - len(unique)
    assert not (tmp_path / "c" / "corpus" / ".building").exists()


def test_duplicates_do_not_depend_on_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    files = []
    for i in range(4):
        keys = rng.integers(0, 60, (3, 25), dtype=np.uint64) << np.uint64(33)
        np.save(tmp_path / f"{i}.npy", keys)
        files.append(tmp_path / f"{i}.npy")
    np.save(tmp_path / "none.npy", np.empty((1, 0), np.uint64))  # a chunk without documents
    files.insert(0, tmp_path / "none.npy")
    keys = np.concatenate([np.load(file) for file in files[1:]], axis=1)
    for keys_per_pass in (dedup.KEYS_PER_PASS, 7):
        monkeypatch.setattr(dedup, "KEYS_PER_PASS", keys_per_pass)
        dedup.find_duplicates(files, Cleaning(duplicates=True, near_duplicates=0.8))
        reasons = np.concatenate([dedup.reasons_beside(file) for file in files])
        for document, reason in enumerate(reasons):
            earlier = keys[:, :document] == keys[:, document : document + 1]
            expected = DUPLICATE if earlier[0].any() else NEAR_DUPLICATE
            assert reason == (expected if earlier.any() else KEPT)


def test_no_documents_have_no_duplicates() -> None:
    dedup.find_duplicates([], Cleaning(duplicates=True, near_duplicates=0.8))


def test_keys_of_a_long_document_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard without a blank line is one document, whose shingles are hashed in batches."""
    pytest.importorskip("datasketch")
    tokens = np.random.default_rng(0).integers(0, 20_000, 200_000, dtype=np.uint16)
    ends = np.array([len(tokens) - 3, len(tokens)])
    arrays = ShardArrays(tokens, ends, np.array([1, 2]))
    dedup.near_keys(arrays, 1 << 15, 0.8)  # imports and compiles
    tracemalloc.start()
    keys = dedup.near_keys(arrays, 1 << 15, 0.8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20  # 100 MB when all shingles are hashed at once
    monkeypatch.setattr(dedup, "BATCH_SHINGLES", 1 << 20)
    assert np.array_equal(dedup.near_keys(arrays, 1 << 15, 0.8), keys)


def test_the_largest_similarity_still_has_bands() -> None:
    pytest.importorskip("datasketch")
    assert dedup.similarity_bands(MAX_SIMILARITY)[0] >= 2


def test_unknown_words_of_many_shards_are_bounded() -> None:
    """Every shard has rare words of its own; the counts of frequent ones stay exact."""
    total = Tally()
    for shard_number in range(120):
        rare = {f"{shard_number}-{i}": 1 for i in range(1999)}
        total.add(Tally(unknown=Counter(rare | {"often": 7})))
        assert len(total.unknown) <= 100_000
    assert total.unknown.most_common(1) == [("often", 840)]


def test_near_duplicates(tmp_path: Path, vocab: Path, sample_text: str) -> None:
    """A document of 300 characters with one changed is a near duplicate; another one isn't."""
    pytest.importorskip("datasketch")
    documents = [d.replace("\n", "") for d in sample_text.strip().split("\n\n")]
    long = [a + b for a, b in zip(documents, documents[1:], strict=False)]
    texts = [documents[0] + documents[1], documents[2] + documents[3]]
    changed = texts[0][:100] + "好" + texts[0][101:]
    assert len(long) == 3
    _, manifest = make(tmp_path, "\n\n".join([*texts, changed]), vocab, near_duplicates=0.8)
    assert manifest["counts"]["documents_near_duplicate"] == 1
    assert manifest["num_documents"] == 2
    assert manifest["options"]["datasketch_version"]


@pytest.mark.parametrize("duplicates", [False, True])
def test_held_out_documents_are_a_corpus_of_their_own(
    tmp_path: Path, vocab: Path, sample_text: str, duplicates: bool
) -> None:
    """A document is always on the same side, and on one only, whatever else the input has."""
    documents = list(dict.fromkeys(random_documents(2, sample_text, 100)))
    options = {"held_out": 0.3, "duplicates": duplicates}
    training, manifest = make(tmp_path / "a", "\n\n".join(documents), vocab, **options)
    held_out = Corpus(training.directory / "held_out")
    held_out.verify()
    ours, theirs = sentences(training), sentences(held_out)
    number = {line for line in ours if line.isdigit()}, {line for line in theirs if line.isdigit()}
    assert len(number[0]) + len(number[1]) == len(documents)
    assert not number[0] & number[1]
    assert 15 <= len(number[1]) <= 45  # 30 of 100 and four standard deviations
    assert manifest["counts"]["documents_held_out"] == held_out.num_documents == len(number[1])
    assert manifest["counts"]["lines_held_out"] == held_out.num_sentences == len(theirs)
    assert held_out.vocab_sha256 == training.vocab_sha256
    other = ["别的文字", *documents[::-2]]
    again, _ = make(tmp_path / "b", "\n\n".join(other), vocab, **options)
    numbers = {line for line in sentences(Corpus(again.directory / "held_out")) if line.isdigit()}
    assert numbers == number[1] & {document.split("\n")[0] for document in other}


def test_nothing_held_out_is_said(
    tmp_path: Path, vocab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, "一\n\n二\n", vocab, held_out=1e-9)
    assert "held out: none of the 2 documents" in capsys.readouterr().out
    assert not (tmp_path / "corpus" / "held_out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_chars": 5, "max_chars": 4}, "no line would be left"),
        ({"min_chars": -1}, "must be 0 .off. or more"),
        ({"min_han": 1.5}, "must be from 0 to 1"),
        ({"near_duplicates": 0.99}, "must be from 0 to 0.98; use --clean.duplicates"),
        ({"near_duplicates": -0.1}, "must be from 0 to 0.98"),
        ({"held_out": 1.0}, "--held-out must be"),
    ],
)
def test_values_that_mean_nothing(
    tmp_path: Path, vocab: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(tmp_path, "一\n", vocab, **options)
    assert not (tmp_path / "corpus").exists()


def test_report(tmp_path: Path, vocab: Path) -> None:
    """All counts add up; the page shows samples and the characters that the vocabulary lacks."""
    pytest.importorskip("matplotlib")
    text = DOCUMENTS + "\n\n龘龘龘龘 zzz\n\n龘龘龘龘 zzz\n"
    rules = {"min_chars": 2, "duplicates": True, "repeated_lines": True, "held_out": 0.01}
    corpus, _ = make(tmp_path, text, vocab, **rules)
    page = write_report(corpus.directory).read_text(encoding="utf-8")
    report = json.loads((corpus.directory / "report" / "report.json").read_text())
    for account in report["accounts"].values():
        assert account["read"] == sum(n for name, n in account.items() if name != "read")
    assert report["unknown"]["龘"] == 8  # before duplicates were dropped
    assert report["unknown"]["zzz"] == 2
    assert "## Samples: repeated\n\n- `[UNK]" in page
    assert (corpus.directory / "report" / "report.png").read_bytes()[1:4] == b"PNG"
    assert sum(report["sentence_tokens"].values()) == corpus.num_sentences
    corpus.verify()


def test_overwriting_leaves_nothing_of_the_old_corpus(tmp_path: Path, vocab: Path) -> None:
    pytest.importorskip("matplotlib")
    text = "\n\n".join(f"第{i}句话" for i in range(50))
    corpus, _ = make(tmp_path, text, vocab, held_out=0.5)
    write_report(corpus.directory)
    make(tmp_path, text, vocab, force=True)
    left = {path.name for path in corpus.directory.iterdir()}
    assert {name for name in left if not name.startswith("shard-")} == {
        "checksums.bin",
        "corpus.json",
        "vocab.txt",
    }


def test_rules_are_part_of_the_run(tmp_path: Path, vocab: Path) -> None:
    """An unfinished run with other rules is not resumed, and the message names the rule."""
    (tmp_path / "text.txt").write_bytes("一句话\n\n".encode() * 500 + b"\xff\n")
    arguments: dict[str, Any] = {"output": tmp_path / "c", "vocab": vocab, "workers": 1}
    inputs = (str(tmp_path / "text.txt"),)
    with pytest.raises(UserError, match="is not UTF-8"):
        shard(inputs, shard_megabytes=0.001, **arguments)
    rules = replace(Cleaning(), duplicates=True)
    with pytest.raises(UserError, match=r"clean\.duplicates: False then, True now"):
        shard(inputs, shard_megabytes=0.001, clean=rules, **arguments)


def test_segmented_text(tmp_path: Path, vocab: Path) -> None:
    """Spaces separate words, and ids are those of the text without spaces."""
    corpus, _ = make(tmp_path, "清晨 的 湖面 abc de\n渔船\n", vocab, segmented=True)
    tokens = corpus.shards[0].tokens
    assert (tokens >> 15).tolist() == [0, 1, 0, 0, 1, 0, 1, 1, 0, 1, 0, 1]
    tokenizer = Tokenizer(vocab)
    assert (tokens & 0x7FFF).tolist() == tokenizer.encode("清晨的湖面abc de渔船").tolist()


def test_rules_on_real_text(shared_data: Path, tmp_path: Path, vocab: Path) -> None:
    """Technical pages with all rules: the same bytes with 1 and 2 processes, and counts add up."""
    path = shared_data / "corpora" / "d2l_zh.txt.gz"
    text = gzip.decompress(path.read_bytes()).decode()[:200_000]
    rules = {"html": True, "min_chars": 2, "max_chars": 500, "min_han": 0.2, "held_out": 0.1}
    rules |= {"repeated_lines": True, "duplicates": True, "near_duplicates": 0.7}
    results = []
    for workers in (1, 2):
        options = rules | {"workers": workers, "shard_megabytes": 0.1}
        corpus, manifest = make(tmp_path / str(workers), text, vocab, **options)
        files = sorted(p for p in corpus.directory.rglob("*") if p.is_file())
        results.append({str(p.relative_to(corpus.directory)): p.read_bytes() for p in files})
        lines = {k: n for k, n in manifest["counts"].items() if k.startswith("lines_")}
        counts = manifest["counts"]
        assert counts["lines"] == counts["sentences"] + counts["blank_lines"] + sum(lines.values())
    assert results[0] == results[1]
