"""clue_ds.pretrain in Python: twice in one process, beside a shell command, an error, and a stop.

One child process does it all, because starting torch and DeepSpeed takes most of the time.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from ranks import make_corpus, tiny_config
from zygote import HERE

from clue_ds import config as run_config
from clue_ds.config import RunConfig

CODE = """
import json, os, signal, subprocess, sys
import clue_ds
from clue_ds.errors import UserError
from clue_ds.job import alone, watchdog
from clue_ds.settings.sections import HealthSection
values, folder = json.loads(sys.argv[1]), sys.argv[2]
handler = signal.getsignal(signal.SIGINT)
seen = []

def run(name, on_log=None, **train):
    config = {**values, "run_dir": f"{folder}/{name}", "train": {**values["train"], **train}}
    return clue_ds.pretrain(config, on_log=on_log)

one = run("one", on_log=lambda line: seen.append(line["step"]))
two = run("two")
first = {"steps": [one.step, two.step], "loss": [one.loss, two.loss], "seen": list(seen)}
first["held_out"], first["lines"] = two.held_out_loss, [line["step"] for line in two.lines]
try:
    run("one", steps=12)
except UserError as error:
    first["refused"] = str(error)
values["extend"] = True
longer = run("one", steps=12)
first["longer"] = [longer.step, longer.checkpoint.name, [line["step"] for line in longer.lines]]
def interrupt(line):
    os.kill(os.getpid(), signal.SIGINT)
stopped = run("three", on_log=interrupt, steps=100000)
last = stopped.lines[-1]["step"]
first["stopped"] = [stopped.stopped, stopped.step < 100000, stopped.step == last]
def fail(line):
    raise KeyError("mine")
try:
    run("four", on_log=fail)
except KeyError:
    first["failed"] = True
first["again"] = run("four").step
# What a shell command of the same notebook inherits is no rank's environment.
first["variables"] = [name for name in ("RANK", "WORLD_SIZE", "MASTER_PORT") if name in os.environ]
command = [sys.executable, "-m", "clue_ds.cli", "pretrain", "--config", sys.argv[3]]
shell = subprocess.run([*command, f"--run_dir={folder}/five"], capture_output=True, text=True)
first["shell"] = shell.stderr[-2000:] if shell.returncode else "ok"
first["same handler"] = signal.getsignal(signal.SIGINT) is handler
# Fine-tuning in a process that has pretrained is asked to stop itself, not the run before it.
with alone.Alone(HealthSection(), "clue-ds finetune") as own:
    first["hears"] = watchdog.current() is own
print("RESULT" + json.dumps(first))
"""


def test_several_runs_in_one_process(tmp_path: Path, sample_text: str) -> None:
    config: RunConfig = tiny_config(make_corpus(tmp_path, sample_text), tmp_path / "run")
    file = tmp_path / "run.yaml"
    run_config.save(config, file)
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(config.model_dump()), str(tmp_path), str(file)],
        capture_output=True,
        text=True,
        cwd=HERE,
        # A shell that starts the tests in the background has them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert "RESULT" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.partition("RESULT")[2])
    assert found["steps"] == [6, 6] and found["loss"][0] == found["loss"][1]
    assert found["seen"] == found["lines"] and found["seen"][0] == 1 and found["seen"][-1] == 6
    assert "train.steps was 6, is now 12" in found["refused"] and "--extend" in found["refused"]
    assert found["longer"][:2] == [12, "step-00000012"] and found["longer"][2][-1] == 12
    assert "train.steps was 6, is now 12: the learning rate goes from" in done.stdout
    assert found["stopped"] == [True] * 3
    assert found["shell"] == "ok" and found["variables"] == []
    assert found["failed"] and found["again"] == 6 and found["same handler"] and found["hears"]
