"""Log files that no resume spoils, and that never end a run, damaged or on a full disk."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
from limits import files_of_at_most
from test_metrics import line_at

from clue_ds.pretrain.writers import Writers, truncate_log


def test_log_has_each_step_once_after_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Writers(tmp_path, total_steps=9, start_step=0, tensorboard=True)
    for step in range(1, 8):
        first.write(line_at(step))
    first.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # the run died while it wrote
    second = Writers(tmp_path, total_steps=9, start_step=4, tensorboard=True)
    for step in range(5, 10):
        second.write(line_at(step))
    second.close()
    lines = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    elapsed = [line["elapsed_s"] for line in lines]
    assert elapsed == sorted(elapsed)
    console = capsys.readouterr().out.splitlines()
    assert len(console) == 14, "one line a step, not folded where there is no terminal"
    # What the first step of each start lets expect.
    assert [line.split(";")[0] for line in console if not line.startswith("step")] == [
        "the first step took 2 seconds"
    ] * 2
    assert "step 9/9  loss 4.1000  acc 25.00%  lr 1.00e-04" in console[-1]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 10))


def test_a_first_step_that_compiles_says_nothing_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writers = Writers(tmp_path, total_steps=9, start_step=0, tensorboard=False, compiles=True)
    writers.write(line_at(1))
    writers.close()
    assert "took 2 seconds, most of it to compile" in capsys.readouterr().out


def test_log_of_a_new_run_in_an_old_directory_starts_empty(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 3}\n')
    assert truncate_log(path, 0) == []
    assert path.read_text() == ""


DAMAGED = {
    "not UTF-8": b"\xff\xfe\x00\n",
    "no object": b"[1, 2]\n",
    "no step": b'{"loss": 1.0}\n',
    "a step of another type": b'{"step": "one"}\n',
    "deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_lines_are_removed_with_one_warning_and_the_others_stay(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [json.dumps(line_at(step)).encode() + b"\n" for step in (1, 2, 3)]
    path = tmp_path / "log.jsonl"
    path.write_bytes(good[0] + DAMAGED[kind] + good[1] + good[2])
    writers = Writers(tmp_path, total_steps=9, start_step=2, tensorboard=False)
    writers.write(line_at(3))
    writers.close()
    steps = [json.loads(text)["step"] for text in path.read_text("utf-8").splitlines()]
    assert steps == [1, 2, 3]
    assert capsys.readouterr().out.count("1 damaged lines of") == 1


def test_a_full_disk_is_one_warning_for_each_file_and_leaves_whole_lines(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    writers = Writers(tmp_path, total_steps=9, start_step=0, tensorboard=True)
    writers.write(line_at(2))
    # In the middle of the second line.
    with files_of_at_most((tmp_path / "log.jsonl").stat().st_size + 40):
        for step in (3, 4):
            writers.write(line_at(step))
    writers.write(line_at(5))
    writers.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(text)["step"] for text in lines] == [2, 5]
    captured = capfd.readouterr()
    assert captured.out.count("log.jsonl: [Errno 27]") == 1
    assert captured.out.count("events.out.tfevents") == 1
    assert captured.out.count("step 3/9") == 1
    assert "Traceback" not in captured.err

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 5]


def test_logs_that_cannot_be_opened_end_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.jsonl").mkdir()
    (tmp_path / "tensorboard").write_text("a file")
    writers = Writers(tmp_path, total_steps=9, start_step=4, tensorboard=True)
    writers.write(line_at(5))
    writers.close()
    output = capsys.readouterr().out
    assert "step 5/9" in output
    assert output.count("warning: can't write") == 2


def test_later_lines_are_cut_off_even_on_a_files_of_at_most(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line_at(step)) + "\n" for step in range(1, 6)))
    with files_of_at_most(0):
        assert [line["step"] for line in truncate_log(path, 3)] == [1, 2, 3]
    assert len(path.read_text().splitlines()) == 3


def test_output_into_a_pipe_that_nobody_reads_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as broken:
        monkeypatch.setattr("sys.stdout", broken)
        monkeypatch.setattr("clue_ds.pretrain.writers.SECONDS_FOR_THE_WATCHDOG", 0.0)
        writers = Writers(tmp_path, total_steps=9, start_step=0, tensorboard=False)
        writers.write(line_at(1))
        writers.close()
        with contextlib.suppress(BrokenPipeError):
            broken.close()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1
