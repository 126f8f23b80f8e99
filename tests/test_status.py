"""`clue-ds status` on a real run, and the checks of `clue-ds doctor`."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from pathlib import Path

import pytest
from ranks import make_corpus, pretrain_runs, run_ranks, tiny_config

from clue_ds import config as run_config
from clue_ds import doctor, status
from clue_ds.errors import UserError
from clue_ds.job import rendezvous, run_lock
from clue_ds.report.command import report
from clue_ds.settings.sections import CheckpointSection


def report_on(*runs: Path) -> str:
    report(runs)
    return (runs[0] / "report.html").read_text(encoding="utf-8")


def test_status_of_a_run_done_alive_and_dead(
    tmp_path: Path, sample_text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(make_corpus(tmp_path, sample_text), tmp_path / "run")
    assert run_ranks(1, pretrain_runs, [config.model_dump()]) == [[None]]
    run = tmp_path / "run"
    with (run / "log.jsonl").open("ab") as file:
        file.write(b'[1]\n{"step": 9}\n\xff\x00 damaged')
    status.status((run,))
    text = capsys.readouterr().out
    assert "step 6 of 6 (100.0%)" in text
    assert "time left   none: done" in text
    assert "checkpoint  step-00000006" in text
    status.status((run, run), watch=True)  # ends at once: the run is done
    table = capsys.readouterr().out
    assert table.count("6 (done)") == 2 and "alive" in table

    page = report_on(run)
    assert page.count("<svg ") >= 6 and "http" not in page
    assert "Saved 2 times" in page and "after step 3, 6" in page
    assert "1 rank on 1 host" in page and "torch 2." in page and "<td>start</td>" in page

    assert "no, it is done" in "\n".join(status.describe(run))
    sign = run / run_lock.FILE
    assert run_lock.claim(run, rendezvous.myself(), threading.Event()) is None
    assert "alive       yes; rank 0 is process" in "\n".join(status.describe(run))
    run_lock.withdraw(run)
    gone = rendezvous.myself()._replace(pid=2**22 + 1)  # above the kernel's limit
    sign.write_text(json.dumps(gone._asdict()))
    said = "no, its process was killed or interrupted, or has crashed"
    assert said in "\n".join(status.describe(run))
    sign.write_text(json.dumps(gone._replace(host="another")._asdict()))
    assert "alive       yes; rank 0 is process" in "\n".join(status.describe(run))
    old = time.time() - 3_700
    os.utime(sign, (old, old))
    assert "no, its run lock was last renewed 1:01:40 ago" in "\n".join(status.describe(run))
    sign.unlink()
    assert "no, it is done" in "\n".join(status.describe(run))
    with pytest.raises(UserError, match="is not a run"):
        status.describe(tmp_path)


def test_a_check_that_fails_ends_with_its_fix() -> None:
    line = doctor.Check("bad", "/dev/shm has 1 MiB free", "start it with --shm-size=1g").line()
    assert line == "bad   /dev/shm has 1 MiB free; start it with --shm-size=1g"


def given(path: Path, *options: str) -> list[str]:
    return ["--config", str(path), *options]


def test_doctor_checks_a_run(tmp_path: Path, sample_text: str) -> None:
    config = tiny_config(make_corpus(tmp_path, sample_text), tmp_path / "run")
    run_config.save(config, tmp_path / "run.yaml")
    read, fingerprint, checks = doctor._about_run(given(tmp_path / "run.yaml"))
    assert read == config and fingerprint
    assert [check.level for check in checks] == ["ok"] * 3
    wrong = doctor._about_run(given(tmp_path / "run.yaml", "--train.micro-batch-size", "5"))[2]
    assert wrong[0].level == "bad" and "not divisible" in wrong[0].what
    assert re.search(r"10 more checkpoints take \d+\.\d [KM]iB", checks[2].what)  # keep is 9

    (tmp_path / "run" / "checkpoints" / "step-00000003").mkdir(parents=True)
    many = config.model_copy(update={"checkpoint": CheckpointSection(keep=10**9)})
    run_config.save(many, tmp_path / "many.yaml")
    *_, room = doctor._about_run(given(tmp_path / "many.yaml"))[2]
    assert room.level == "bad" and "1000000000 more checkpoints" in room.what
    assert "lower checkpoint.keep" in room.fix

    gone = config.model_dump() | {"data": {"corpus": str(tmp_path / "nowhere")}}
    run_config.save(run_config.validate(gone, "test"), tmp_path / "gone.yaml")
    (wrong,) = doctor._about_run(given(tmp_path / "gone.yaml"))[2]
    assert wrong.level == "bad" and "nowhere" in wrong.what
    (tmp_path / "typo.yaml").write_text("run_dir: x\nmodle: {}\ndata: {corpus: c}\n")
    (wrong,) = doctor._about_run(given(tmp_path / "typo.yaml"))[2]
    assert "did you mean model?" in wrong.what
