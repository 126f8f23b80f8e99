"""Weights & Biases, SwanLab and MLflow hold what a run sends, and go on in the same run.

`make test-clients` runs it with TRACKERS_PACKAGES, packages of an environment that has all three.
It is apart from ours, because SwanLab wants an older protobuf.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import make_corpus, read_log, tiny_config

PACKAGES = os.environ.get("TRACKERS_PACKAGES", "")
pytestmark = pytest.mark.skipif(
    not PACKAGES, reason="needs TRACKERS_PACKAGES; `make test-clients` sets it"
)

# Two starts of a run: three lines, then two after a resume from step 2.
LOSSES = [[step, 4.0 / step] for step in (1, 2, 3, 3, 4)]
SEND = """
import sys
from pathlib import Path
from clue_ds.metrics import trackers
run, names = Path(sys.argv[1]), sys.argv[2].split()
trackers.check_installed(names)
for steps in (range(1, 4), range(3, 5)):
    settings = {"seed": 42, "train.lr": 1e-3, "data.pairs": []}
    opened = [trackers.Tracker(name, run, settings, print) for name in names]
    for tracker in opened:
        tracker.attach(run / "config.yaml")
        for step in steps:
            line = {"step": step, "loss": 4.0 / step, "mfu": None, "samples_of/\u4e2d\u6587": 8}
            tracker.write(line)
    trackers.close(opened, failed=False, mark=lambda: None)
"""

# W&B has no reader of its files; SwanLab has one.
READ_WANDB = """
import json, sys
from swanlab.converter.wb.wbdatastore import WBDataStoreReader
from wandb.proto import wandb_internal_pb2
losses, config, saved = [], [], []
for path in sys.argv[1:]:
    with WBDataStoreReader() as store:
        store.open(path)
        while (data := store.scan()) is not None:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            config += [item.key for item in record.config.update]
            saved += [item.path for item in record.files.files]
            items = record.history.item
            items = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in items}
            if "loss" in items:
                losses.append([items["step"], items["loss"]])
print(json.dumps({"losses": losses, "config": config, "saved": saved}))
"""

READ_SWANLAB = """
import json, sys
from swanlab.proto.swanlab.record.v1.record_pb2 import Record
from swanlab.sdk.internal.core_python.store import DataStoreReader
losses = []
for path in sys.argv[1:]:
    store = DataStoreReader()
    store.open(path)
    for data in store:
        record = Record()
        record.ParseFromString(data)
        if record.HasField("scalar") and record.scalar.key == "loss":
            losses.append([record.scalar.step, record.scalar.value.number])
print(json.dumps(losses))
"""

READ_MLFLOW = """
import json, sys
import mlflow
client = mlflow.MlflowClient(sys.argv[1])
run = client.get_run(sys.argv[2])
found = client.get_metric_history(run.info.run_id, "loss")
files = [file.path for file in client.list_artifacts(run.info.run_id)]
losses = [[metric.step, metric.value] for metric in found]
print(json.dumps([losses, run.data.params, files, run.info.status]))
"""


def _start(code: str, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run code with the trackers' packages before those of this environment."""
    variables = {"PYTHONPATH": PACKAGES, "WANDB_MODE": "offline", "SWANLAB_MODE": "offline"}
    command = [sys.executable, "-c", code, *map(str, words)]
    environment = {**os.environ, **variables, **more}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def _python(code: str, *words: object, **more: str) -> str:
    """What the code prints."""
    done = _start(code, *words, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory after two starts with all three trackers."""
    run = tmp_path_factory.mktemp("trackers") / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 42\n")
    said = _python(SEND, run, "wandb swanlab mlflow")
    assert "warning" not in said
    assert said.count("wandb: offline; send it with: wandb sync ") == 2
    return run


def _ids(run: Path) -> dict[str, str]:
    return dict(json.loads((run / "trackers.json").read_text()))


def test_wandb_has_every_line_of_both_starts_under_one_id(run: Path) -> None:
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.stem for file in files] == [f"run-{_ids(run)['wandb']}"] * 2
    read = json.loads(_python(READ_WANDB, *files))
    assert read["losses"] == LOSSES
    assert {"seed", "train.lr", "data.pairs"} <= set(read["config"])
    assert read["saved"].count("run_config.yaml") == 2


def test_mlflow_has_every_line_of_both_starts_in_one_run(run: Path) -> None:
    uri = f"sqlite:///{run / 'mlflow.db'}"
    losses, params, files, status = json.loads(_python(READ_MLFLOW, uri, _ids(run)["mlflow"]))
    assert losses == LOSSES
    assert params == {"seed": "42", "train.lr": "0.001", "data.pairs": "[]"}
    assert (files, status) == (["config.yaml"], "FINISHED")


def test_swanlab_has_every_line_of_both_starts_under_one_id(run: Path) -> None:
    files = sorted((run / "swanlab").glob("run-*/*.swanlab"))
    assert [file.stem for file in files] == [f"run-{_ids(run)['swanlab']}"] * 2
    assert json.loads(_python(READ_SWANLAB, *files)) == LOSSES


def test_a_tracker_that_fails_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 42\n")
    (tmp_path / "mlflow.db").write_text("this is no database")
    said = _python(SEND, tmp_path, "mlflow")
    assert said.count("warning: mlflow does not have everything: ") == 2  # once in each start
    assert not (tmp_path / "trackers.json").exists()


def test_wandb_asks_for_no_login_on_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 42\n")
    master, terminal = pty.openpty()
    command = [sys.executable, "-c", SEND, str(tmp_path), "wandb"]
    environment = {**os.environ, "PYTHONPATH": PACKAGES, "HOME": str(tmp_path)}
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        environment.pop(name, None)
    done = subprocess.run(
        command,
        env=environment,
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
        timeout=300,
    )
    os.close(terminal)
    os.close(master)
    assert done.returncode == 0
    assert done.stdout.count("warning: wandb does not have everything") == 2  # once in each start
    assert done.stdout.count("not logged in; run `wandb login`") == 2


def test_a_service_that_never_answers_holds_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 42\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        services = {
            "MLFLOW_TRACKING_URI": address,
            "WANDB_BASE_URL": address,
            "WANDB_API_KEY": 40 * "0",
            "WANDB_MODE": "online",
        }
        limit = "from clue_ds.metrics import trackers; trackers.SECONDS_TO_CLOSE = 1.0"
        said = _python(limit + SEND, tmp_path, "mlflow wandb", **services)
    for name in ("mlflow", "wandb"):
        assert said.count(f"warning: {name} does not have everything: it has not taken") == 2


PRETRAIN = """
import json, os, signal, sys, time
from pathlib import Path
import clue_ds
from clue_ds.metrics import trackers
trackers.SECONDS_TO_CLOSE = trackers.SECONDS_AFTER_AN_ERROR = 120.0
values, at = json.loads(sys.argv[1]), int(sys.argv[3])
ids = Path(values["run_dir"], "trackers.json")
def on_log(line):
    if line["step"] == at:
        while not ids.exists() or len(json.loads(ids.read_text())) < 3:
            time.sleep(0.1)
        if sys.argv[2] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyError("mine")
try:
    clue_ds.pretrain(values, on_log=on_log)
except KeyError:
    import mlflow
    uri = f"sqlite:///{values['run_dir']}/mlflow.db"
    run = json.loads(ids.read_text())["mlflow"]
    print("STATUS", mlflow.MlflowClient(uri).get_run(run).info.status)
    clue_ds.pretrain(values)
"""


def test_a_run_that_is_killed_and_one_that_fails_go_on_under_the_same_ids(
    tmp_path: Path, sample_text: str
) -> None:
    run = tmp_path / "run"
    log = {"trackers": ["wandb", "swanlab", "mlflow"]}
    config = tiny_config(make_corpus(tmp_path, sample_text), run, log=log)
    words = json.dumps(config.model_dump(mode="json"))
    # Step 3 is saved.
    killed = _start(PRETRAIN, words, "kill", 5)
    assert killed.returncode == -signal.SIGKILL
    ids = _ids(run)
    done = _start(PRETRAIN, words, "fail", 5)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout
    assert "STATUS FAILED" in done.stdout
    assert set(ids) == {"wandb", "swanlab", "mlflow"} and _ids(run) == ids
    history, params, files, status = json.loads(
        _python(READ_MLFLOW, f"sqlite:///{run / 'mlflow.db'}", ids["mlflow"])
    )
    # Bit for bit the same losses in every start, so a step that was sent twice has equal points.
    losses = {line["step"]: line["loss"] for line in read_log(run)}
    assert all(losses[step] == loss for step, loss in history)
    assert {4, 5, 6} <= {step for step, _ in history}
    assert [step for step, _ in history].count(4) >= 2  # the failed start and the last one
    assert params["train.steps"] == "6" and status == "FINISHED"
    assert files == ["config.yaml", "model_card.md"]
