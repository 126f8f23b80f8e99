"""The first measurements on a GPU machine: no stage stops another, and the page says what it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from clue_ds.benchmarks import gpu, gpu_probe, gpu_steps
from clue_ds.cli import main
from clue_ds.vocab_file import vocab_lines

CPU = torch.device("cpu")
PATIENCE_S = 20

# Starts a process that would outlive it, says its number, and hangs.
HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
STOPS = """
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
print("ready", flush=True)
time.sleep(600)
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def is_running(pid: int) -> bool:
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return found.stdout.strip() not in ("", "Z")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of four stages, of which two go wrong."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "logs").mkdir()
    stages = [
        gpu.Stage("fails", 1, python("print('about to fail'); raise SystemExit(3)")),
        gpu.Stage("hangs", 1, python(HANGS)),
        gpu.Stage("stops", 1, python(STOPS), asks_to_stop=True),
        gpu.Stage("works", 1, python(f"print('no case starts after {gpu.SECONDS} s')")),
    ]
    gpu.run_all(stages, 12.0, folder, small=True, console=Console(quiet=True))
    return folder


def test_a_stage_that_fails_or_hangs_stops_no_other(folder: Path) -> None:
    result = json.loads((folder / gpu.RESULTS).read_text("utf-8"))
    found = {stage["name"]: stage["result"] for stage in result["stages"]}
    assert found == {
        "fails": "failed with status 3",
        "hangs": "out of time",
        "stops": "ok: saved and stopped on request",
        "works": "ok",
    }
    assert "about to fail" in (folder / "logs" / "fails.log").read_text("utf-8")
    last = result["stages"][-1]
    limit = f"no case starts after {0.85 * last['limit']:.0f} s"
    assert limit in (folder / "logs" / "works.log").read_text("utf-8")


def test_nothing_of_a_stage_outlives_it(folder: Path) -> None:
    child = int((folder / "logs" / "hangs.log").read_text("utf-8"))
    deadline = time.monotonic() + PATIENCE_S
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(child)


def test_the_page_says_that_it_is_a_rehearsal_and_what_went_wrong(folder: Path) -> None:
    page = (folder / gpu.PAGE).read_text("utf-8")
    assert "This is a rehearsal" in page and "| hangs | out of time |" in page
    assert "It left no log line" in page


def test_a_page_of_measured_steps_and_failed_ones(folder: Path) -> None:
    line = {
        "preset": gpu.TINY, "rows": 4, "length": 32, "ms": 2.0, "host_ms": 1.0, "warmup_s": 3.0,
        "mfu": 0.25, "hfu": 0.2,
    }  # fmt: skip
    steps = [
        {**line, "name": "the peer", "loop": "peer", "tokens_per_second": 100},
        {**line, "name": "ours", "loop": "engine", "tokens_per_second": 150},
        {"name": "bad", "loop": "graph", "preset": gpu.TINY, "length": 32, "error": "a | b\nc"},
    ]
    text = "".join(json.dumps(step) + "\n" for step in steps) + '{"name": "cut o'
    (folder / "steps.jsonl").write_text(text, encoding="utf-8")
    result = gpu.gpu_page.collect(folder, [], is_small=False)
    page = gpu.gpu_page.page(result, {"gpu": "G", "cpu": "C", "versions": {}, "date": "today"})
    assert "| ours | 4 x 32 | 2.00 | 1.00 |" in page and "25.0%" in page
    assert "ours makes 1.50 times the tokens/s of the peer" in page
    assert "a / b c" in page and "rehearsal" not in page


def test_a_step_is_measured_and_executes_fewer_flops_than_the_peers() -> None:
    bench = gpu_steps.Bench(gpu.TINY, CPU, is_small=True)
    line = gpu_steps.measure(bench, gpu_steps.Case("eager", "autocast"))
    assert line["ms_synced"] == sorted(line["ms_synced"]) and line["tokens_per_second"] > 0
    ours, peer = (
        gpu_steps.flops_of_a_row(bench, gpu_steps.Case("", loop), 32) for loop in ("bf16", "peer")
    )
    assert 0 < ours < 0.5 * peer


def test_every_case_of_the_steps_has_a_name_of_its_own() -> None:
    keys = [(case.name, case.is_long) for case in gpu_steps.CASES]
    assert len(set(keys)) == len(keys)


def test_kernels_agree_with_torch_in_the_interpreter(kernel_device: torch.device) -> None:
    found = list(gpu_probe.kernel_errors(small=True))
    assert [line["op"] for line in found] == list(gpu_probe.verify.CASES)
    assert all(line["agrees"] for line in found), found


def test_the_text_of_the_short_pretraining_is_in_its_vocabulary(tmp_path: Path) -> None:
    gpu.write_vocab(tmp_path / "vocab.txt")
    gpu.write_text(tmp_path / "text.txt", 2_000)
    tokens = vocab_lines(tmp_path / "vocab.txt")
    assert len(tokens) == len(set(tokens)) == gpu.NUM_TOKENS
    lines = (tmp_path / "text.txt").read_text("utf-8").splitlines()
    assert set("".join(lines)) <= set(tokens) and "" in lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gpu", "--output", str(tmp_path / "new")]) == 2
    assert "`--small` rehearses every stage" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    for more, message in (
        (["--output", str(tmp_path / "mine")], "was not written by this benchmark"),
        (["--output", str(tmp_path / "new"), "--only", "nothing"], "there is no stage 'nothing'"),
    ):
        assert main(["bench", "gpu", "--small", *more]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert os.listdir(tmp_path / "mine") == []
