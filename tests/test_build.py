"""`clue-ds shard`: the same bytes for any number of workers, resume, accounts, and bad input."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import opencc
import psutil
import pytest

from clue_ds.cli import main
from clue_ds.data import Corpus, Tokenizer
from clue_ds.data.build.command import shard
from clue_ds.data.build.options import Cleaning
from clue_ds.data.text.vocab import learn
from clue_ds.errors import UserError

SHARD_MEGABYTES = 0.004


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    """A directory with a vocabulary and some 40 KB of text in three formats."""
    directory = tmp_path_factory.mktemp("inputs")
    lines = [line for line in sample_text.split("\n") if line]
    rng = random.Random(1)

    def text(num: int) -> str:
        picked = [f"{rng.choice(lines)}{i}" for i in range(num)]
        return "".join(f"{line}\n" + ("\n" if rng.random() < 0.3 else "") for line in picked)

    (directory / "a.txt").write_text(text(200))
    (directory / "b.txt.gz").write_bytes(gzip.compress(text(200).encode()))
    records = [json.dumps({"text": text(4), "id": i}, ensure_ascii=False) for i in range(40)]
    (directory / "c.jsonl").write_text("\n".join(records))
    learn((str(directory / "a.txt"),), output=directory / "vocab.txt", size=500)
    return directory


def build(inputs: Path, output: Path, *names: str, **options: Any) -> Path:
    names = names or ("a.txt", "b.txt.gz", "c.jsonl")
    arguments = {"workers": 1, "shard_megabytes": SHARD_MEGABYTES, "vocab": inputs / "vocab.txt"}
    shard(tuple(str(inputs / n) for n in names), output=output, **(arguments | options))
    return output


def digest(corpus: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(corpus.iterdir())}


def manifest(corpus: Path) -> dict[str, Any]:
    return json.loads((corpus / "corpus.json").read_text())


def test_bytes_do_not_depend_on_workers(inputs: Path, tmp_path: Path) -> None:
    one = digest(build(inputs, tmp_path / "one"))
    three = digest(build(inputs, tmp_path / "three", workers=3))
    assert len(one) > 8
    assert one == three


def test_content_equals_tokenizing_line_by_line(inputs: Path, tmp_path: Path) -> None:
    corpus = Corpus(build(inputs, tmp_path / "c", "a.txt"))
    tokenizer = Tokenizer(inputs / "vocab.txt")
    documents = (inputs / "a.txt").read_text().split("\n\n")
    expected = [
        [tokenizer.encode(line).tolist() for line in document.split("\n") if line]
        for document in documents
        if document.strip()
    ]
    got = []
    for one in corpus.shards:
        sentences = np.split(one.tokens & 0x7FFF, one.sentence_ends[:-1])
        for begin, end in zip([0, *one.document_ends[:-1]], one.document_ends, strict=True):
            got.append([sentence.tolist() for sentence in sentences[begin:end]])
    assert got == expected
    assert corpus.num_documents == len(expected)


def test_account_adds_up(inputs: Path, tmp_path: Path) -> None:
    text = "好\n\n".encode() + b"ab\xff\n" + " \t\n\x00\x01\n\u3000\n好的".encode()
    (tmp_path / "a.txt").write_bytes(text)
    records = ['{"text": "好\\n\\n好"}', '{"text": ""}', '{"body": 1}', "{", '{"text": "\\u0001"}']
    (tmp_path / "b.jsonl").write_text("\n".join(records))
    names = (str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"))
    output = tmp_path / "c"
    shard(names, output=output, vocab=inputs / "vocab.txt", on_error="skip", words="none")
    account = manifest(output)
    counts = account["counts"]
    # a.txt: 好, "", bad, blank, control characters, ideographic space, 好的; b.jsonl: 3 + 1 lines.
    assert counts["lines"] == 7 + 3 + 1
    assert counts["sentences"] == 4 == account["num_sentences"]
    assert counts["blank_lines"] == 3 + 1
    assert counts["lines_not_utf8"] == 1
    assert counts["lines_without_tokens"] == 2
    assert counts["records"] == 5
    assert counts["records_accepted"] == 2
    assert counts["records_without_text"] == 2
    assert counts["records_not_json"] == 1
    assert account["num_documents"] == 2 + 1
    assert len(account["rejected_examples"]) == 3
    assert any("a.txt: byte 7 is not UTF-8" in example for example in account["rejected_examples"])


def test_t2s_words_and_case(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("漁船慢慢劃向對岸GPU\n")
    vocab = tmp_path / "vocab.txt"
    learn((str(inputs / "a.txt"),), output=vocab, size=500, lower_case=False, min_frequency=1)
    tokenizer = Tokenizer(vocab, lower_case=False)
    output = tmp_path / "c"
    names = (str(tmp_path / "t.txt"),)
    shard(names, output=output, vocab=vocab, t2s=True, lower_case=False, words="none")
    corpus = Corpus(output)
    simplified = opencc.OpenCC("t2s").convert("漁船慢慢劃向對岸GPU")
    tokens = corpus.shards[0].tokens
    assert (tokens & 0x7FFF).tolist() == tokenizer.encode(simplified).tolist()
    pieces = [tokenizer.tokens[t & 0x7FFF].startswith("##") for t in tokens]
    assert (tokens >> 15).astype(bool).tolist() == pieces
    assert corpus.lower_case is False
    assert manifest(output)["options"]["t2s"] is True


def test_long_document_is_split_and_counted(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("没有空行的文本。\n" * 2000)
    output = tmp_path / "c"
    names = (str(tmp_path / "long.txt"),)
    shard(names, output=output, vocab=inputs / "vocab.txt", shard_megabytes=SHARD_MEGABYTES)
    account = manifest(output)
    assert account["num_sentences"] == 2000
    assert account["counts"]["documents_split"] == account["num_documents"] - 1 > 1


def run_cli(*arguments: str, **options: Any) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "clue_ds.cli", "shard", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_standard_input(inputs: Path, tmp_path: Path) -> None:
    arguments = ("-", "--vocab", str(inputs / "vocab.txt"), "--output", str(tmp_path / "in"))
    with open(inputs / "a.txt", "rb") as file:
        result = run_cli(*arguments, "--workers", "1", stdin=file)
    assert result.returncode == 0, result.stderr
    assert (
        Corpus(tmp_path / "in").num_tokens
        == Corpus(build(inputs, tmp_path / "file", "a.txt")).num_tokens
    )


def test_interrupted_run_goes_on(inputs: Path, tmp_path: Path) -> None:
    """After a SIGKILL in the middle, the same command keeps the finished shards."""
    expected = digest(build(inputs, tmp_path / "whole"))
    output = tmp_path / "c"
    code = (
        "import sys; from clue_ds.data.build import command as build\n"
        "import time; put = build.Staging.put\n"
        "def slow(self, index, record):\n"
        "    put(self, index, record); print(index, flush=True); time.sleep(0.2)\n"
        "build.Staging.put = slow\n"
        "build.shard(tuple(sys.argv[3:]), output=build.Path(sys.argv[1]),"
        " vocab=build.Path(sys.argv[2]), workers=1,"
        f" shard_megabytes={SHARD_MEGABYTES})\n"
    )
    names = [str(inputs / name) for name in ("a.txt", "b.txt.gz", "c.jsonl")]
    command = [sys.executable, "-c", code, str(output), str(inputs / "vocab.txt"), *names]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGKILL)
    assert lines == ["0\n", "1\n", "2\n"]
    with pytest.raises(UserError, match="not finished"):
        Corpus(output)
    finished = {p: p.stat().st_mtime_ns for p in output.glob("shard-00000[012].bin")}
    assert len(finished) == 3
    time.sleep(0.01)
    build(inputs, output)
    assert digest(output) == expected
    assert {p: p.stat().st_mtime_ns for p in finished} == finished


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ended_by_hand_it_leaves_no_worker_and_the_rerun_gives_the_same_bytes(
    inputs: Path, tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "text.txt").write_bytes(300 * (inputs / "a.txt").read_bytes())
    options = {"vocab": inputs / "vocab.txt", "shard_megabytes": 0.05}
    expected = digest(build(tmp_path, tmp_path / "expected", "text.txt", **options))
    output = tmp_path / "c"
    command = [sys.executable, "-m", "clue_ds.cli", "shard", str(tmp_path / "text.txt")]
    command += ["--output", str(output), "--vocab", str(options["vocab"]), "--workers", "2"]
    with subprocess.Popen(
        [*command, "--shard-megabytes", "0.05"],
        stderr=subprocess.PIPE,
        start_new_session=True,
        # Tests that a shell started in the background inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while process.poll() is None and not list(output.glob(".building/converted-*.json")):
            time.sleep(0.01)
        workers = psutil.Process(process.pid).children(recursive=True)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.kill()  # and nobody else
        assert process.stderr is not None
        errors = process.stderr.read().decode()
    assert len(workers) >= 2
    assert not psutil.wait_procs(workers, timeout=60)[1]
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert errors.strip().splitlines()[-1] == "clue-ds shard: interrupted"
        assert "Traceback" not in errors and "leaked" not in errors
    assert digest(build(tmp_path, output, "text.txt", **options)) == expected


def half_finished(inputs: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run that stopped at bad bytes after some finished shards; (text, output)."""
    text = tmp_path / "text.txt"
    text.write_bytes((inputs / "a.txt").read_bytes() + b"\xff\n")
    with pytest.raises(UserError, match="is not UTF-8"):
        build(tmp_path, tmp_path / "c", "text.txt", vocab=inputs / "vocab.txt")
    return text, tmp_path / "c"


def test_other_options_do_not_continue_a_run(inputs: Path, tmp_path: Path) -> None:
    _, output = half_finished(inputs, tmp_path)
    options = {"vocab": inputs / "vocab.txt", "on_error": "skip"}
    with pytest.raises(UserError, match="on_error: refuse then, skip now"):
        build(tmp_path, output, "text.txt", **options)
    build(tmp_path, output, "text.txt", **options, force=True)
    Corpus(output).verify()


def test_a_run_that_failed_at_once_leaves_nothing_in_the_way(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes("好\n\xff\n".encode("latin-1", "replace"))
    options = {"vocab": inputs / "vocab.txt"}
    with pytest.raises(UserError, match="is not UTF-8"):
        build(tmp_path, tmp_path / "c", "text.txt", **options)
    build(tmp_path, tmp_path / "c", "text.txt", **options, on_error="skip")
    assert manifest(tmp_path / "c")["counts"]["lines_not_utf8"] == 1


def test_changed_input_does_not_continue_a_run(inputs: Path, tmp_path: Path) -> None:
    text, output = half_finished(inputs, tmp_path)
    data = bytearray(text.read_bytes())
    data[0:3] = "早".encode()
    text.write_bytes(data)  # the same size
    with pytest.raises(UserError, match="the input changed since"):
        build(tmp_path, output, "text.txt", vocab=inputs / "vocab.txt")


def test_second_run_on_the_same_output_is_refused(inputs: Path, tmp_path: Path) -> None:
    import fcntl

    _, output = half_finished(inputs, tmp_path)
    with open(output / ".building" / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another `clue-ds shard` is writing"):
            build(tmp_path, output, "text.txt", vocab=inputs / "vocab.txt")


def test_a_disk_without_locks_will_do(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_lock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_lock)
    output = build(inputs, tmp_path / "corpus", "a.txt")
    assert Corpus(output).num_tokens


def test_finished_corpus_is_kept_unless_told(inputs: Path, tmp_path: Path) -> None:
    output = build(inputs, tmp_path / "c")
    before = digest(output)
    with pytest.raises(
        UserError, match=r"finished corpus of other inputs or options \(inputs.number: 3 then"
    ):
        build(inputs, output, "a.txt")
    for options, message in (
        ({"words": "none"}, "words: rjieba then, none now"),
        ({"shard_megabytes": 1}, "shard_bytes: 4194 then, 1048576 now"),
        ({"clean": Cleaning(html=True)}, "clean.html: False then, True now"),
        ({"vocab": inputs / "other.txt"}, "vocab_sha256"),
    ):
        (inputs / "other.txt").write_text((inputs / "vocab.txt").read_text() + "另\n")
        with pytest.raises(UserError, match=message):
            build(inputs, output, **options)
    assert digest(output) == before
    build(inputs, output, "a.txt", force=True)
    assert digest(output) == digest(build(inputs, tmp_path / "fresh", "a.txt"))


def test_finished_corpus_of_the_same_request_is_a_success(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A queued job whose corpus is already complete succeeds, even if the text was moved."""
    output = build(inputs, tmp_path / "c", "a.txt", held_out=0.1)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    (output / ".building").mkdir()  # as if it had been killed at the very end
    (tmp_path / "a.txt").write_bytes((inputs / "a.txt").read_bytes())
    capsys.readouterr()
    build(tmp_path, output, "a.txt", held_out=0.1, vocab=inputs / "vocab.txt", workers=2)
    said = capsys.readouterr().out
    assert said == (
        f"{output}: already complete, with the same options and inputs of the same names and "
        "sizes; nothing to do\n"
    )
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    build(inputs, output, "a.txt", held_out=0.1, verify=True)
    assert "all checksums agree" in capsys.readouterr().out
    shard_file = next((output / "held_out").glob("shard-*.bin"))
    shard_file.write_bytes(shard_file.read_bytes()[:-4])
    with pytest.raises(UserError, match="was cut off or changed"):
        build(inputs, output, "a.txt", held_out=0.1)


def test_finished_corpus_from_standard_input_is_compared_by_its_text(
    inputs: Path, tmp_path: Path
) -> None:
    arguments = ["-", "--vocab", str(inputs / "vocab.txt"), "--output", str(tmp_path / "c")]
    for name, status, message in (
        ("a.txt", 0, " documents, 1 shards"),
        ("a.txt", 0, "already complete, with the same options and inputs of the same text"),
        ("c.jsonl", 2, "(the text of the inputs)"),
    ):
        with open(inputs / name, "rb") as file:
            result = run_cli(*arguments, "--words", "none", "--workers", "1", stdin=file)
        assert result.returncode == status, result.stderr
        assert message in result.stdout + result.stderr


def test_output_that_is_not_ours(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("precious")
    with pytest.raises(UserError, match="is not empty and holds no corpus"):
        build(inputs, tmp_path, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.doc"]
    with pytest.raises(UserError, match="is a file"):
        build(inputs, tmp_path / "thesis.doc")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "1 input\\(s\\) are empty"), (b"\n \n\n", "no text in the input"), (b"\x01", "no text")],
)
def test_nothing_to_read(inputs: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        build(tmp_path, tmp_path / "c", "empty.txt", vocab=inputs / "vocab.txt")
    assert not (tmp_path / "c" / "corpus.json").exists()


def test_utf16_is_called_by_its_name(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("好的\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"byte 0 is not UTF-8 .* iconv -f UTF-16 -t UTF-8"):
        build(tmp_path, tmp_path / "c", "text.txt", vocab=inputs / "vocab.txt")


def test_files_that_may_not_be_used(inputs: Path, tmp_path: Path) -> None:
    """Root can read everything, so the test drops that right; nothing is converted."""
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("needs setpriv (Debian: util-linux)")
    (tmp_path / "good.txt").write_text("好\n")
    (tmp_path / "closed.txt").write_text("好\n")
    (tmp_path / "closed.txt").chmod(0)
    (tmp_path / "locked").mkdir(mode=0o555)
    code = "import sys; from clue_ds import cli; sys.exit(max(cli.main(['shard', *words, '--vocab',"
    code += f" {str(inputs / 'vocab.txt')!r}, '--workers', '1']) for words in WORDS))"
    good, closed = str(tmp_path / "good.txt"), str(tmp_path / "closed.txt")
    words = [
        [good, closed, "--output", str(tmp_path / "c")],
        [good, "--output", str(tmp_path / "locked" / "c")],
    ]
    rights = ["--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    command = [setpriv, *rights, sys.executable, "-c", f"WORDS = {words!r}; {code}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert f"this user has no permission to read 1 input(s): {closed};" in result.stderr
    assert f"this user may not read or write {tmp_path / 'locked' / 'c'};" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "c").exists()


def test_one_empty_file_among_others(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "text.txt").write_text("好\n")
    names, options = ("empty.txt", "text.txt"), {"vocab": inputs / "vocab.txt"}
    with pytest.raises(UserError, match="empty.txt; leave them out"):
        build(tmp_path, tmp_path / "c", *names, **options)
    assert Corpus(build(tmp_path, tmp_path / "c", *names, **options, on_error="skip")).num_tokens


def test_errors_of_workers_arrive(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"good\n\n" * 2000 + b"\xff\n")
    with pytest.raises(UserError, match=r"text\.txt: byte 12000 is not UTF-8"):
        build(tmp_path, tmp_path / "c", "text.txt", vocab=inputs / "vocab.txt", workers=2)


def test_disk_without_room_before_writing(inputs: Path, tmp_path: Path) -> None:
    """A sparse file of pebibytes needs more space than any disk has."""
    huge = tmp_path / "huge.txt"
    with open(huge, "wb") as file:
        try:
            file.truncate(8 << 50)
        except OSError:
            file.truncate(8 << 40)
    with pytest.raises(UserError, match="GiB are free there"):
        build(tmp_path, tmp_path / "c", "huge.txt", vocab=inputs / "vocab.txt")
    assert not (tmp_path / "c").exists()


def test_disk_without_room_while_writing(inputs: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: writes fail in the same way."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    (tmp_path / "text.txt").write_bytes((inputs / "a.txt").read_bytes() * 3)
    arguments = [str(tmp_path / "text.txt"), "--vocab", str(inputs / "vocab.txt")]
    arguments += ["--output", str(tmp_path / "c"), "--workers", "1"]
    result = run_cli(*arguments, preexec_fn=limit)
    assert result.returncode == 2, result.stderr
    assert "no room left for" in result.stderr
    assert "Traceback" not in result.stderr
    assert run_cli(*arguments).returncode == 0
    Corpus(tmp_path / "c").verify()


def test_command_line_errors_and_verify(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = build(inputs, tmp_path / "c", "a.txt")
    assert main(["shard", "--verify", "--output", str(output)]) == 0
    assert "all checksums agree" in capsys.readouterr().out
    text, vocab = str(inputs / "a.txt"), str(inputs / "vocab.txt")
    cases = [
        (["--output", str(tmp_path / "d"), "--vocab", vocab], "no input given"),
        ([text, "--output", str(tmp_path / "d")], "--vocab is missing"),
        ([text, "--output", str(tmp_path / "d"), "--vocab", text], "not a BERT vocabulary"),
        ([text, "--output", str(tmp_path / "d"), "--vocab", vocab, "--workers", "0"], "positive"),
        (["--verify", "--output", str(tmp_path / "d")], "does not exist"),
    ]
    for arguments, message in cases:
        assert main(["shard", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "d").exists()
