"""Experiment trackers beside the run's own files: Weights & Biases, SwanLab and MLflow.

Guarantees: a tracker never ends or holds the run: each has a thread of its own that opens it and
sends what the run hands over; whatever goes wrong there is one warning, and the end of the run
waits a limited time for all of them together. None asks for a login. A run that is continued goes
on under the same id, which is in RUN/trackers.json. The libraries' own variables (WANDB_MODE,
SWANLAB_API_KEY, MLFLOW_TRACKING_URI, ...) hold; what they keep on this machine goes to RUN/wandb,
RUN/swanlab, RUN/mlflow.db and RUN/mlflow.

Steps after the checkpoint that a run resumes from are trained and sent again. Nothing is deleted
from a tracker, so MLflow then has two points at such a step.

Rejected: accelerate.tracking, which opens trackers in the main thread, where a service that does
not answer stops the run, and which has no way to continue a run of MLflow.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clue_ds import files
from clue_ds.errors import UserError, first_line

IDS = "trackers.json"
PROJECT = "clue_ds"
# How long the end of a run waits for all trackers together. After an error it waits less, because
# the other ranks and the launcher hear of the error only afterwards.
SECONDS_TO_CLOSE, SECONDS_AFTER_AN_ERROR = 30.0, 5.0
# How long W&B may take to open its run, in its own thread.
SECONDS_TO_OPEN = 60.0
# MLflow refuses more parameters in one request, and longer values.
MLFLOW_PARAMS, MLFLOW_CHARACTERS = 100, 6000

Settings = Mapping[str, Any]


class _Wandb:
    needs = ("wandb",)

    def open(self, run_dir: Path, run_id: str | None, settings: Settings) -> tuple[str, str]:
        import wandb

        # Without this, W&B asks for a key on the terminal where the run was started.
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError(
                "not logged in; run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline"
            )
        # finish_timeout also limits how long W&B's own hook holds the end of the process.
        quiet = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            init_timeout=SECONDS_TO_OPEN,
            finish_timeout=SECONDS_TO_CLOSE,
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run_dir.name),
            id=run_id,
            resume="allow",
            dir=run_dir,
            settings=quiet,
        )
        self._run.config.update(dict(settings), allow_val_change=True)
        # W&B drops a point whose own step is not above the last one, as after a resume.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if self._run.settings.mode == "online":
            return self._run.id, str(self._run.url)
        return self._run.id, f"offline; send it with: wandb sync {Path(self._run.dir).parent}"

    def log(self, line: dict[str, Any]) -> None:
        self._run.log(line)

    def attach(self, path: Path) -> None:
        # A copy: W&B would make a link, and writes a config.yaml of its own beside its files.
        copy = Path(self._run.dir) / f"run_{path.name}"
        shutil.copyfile(path, copy)
        self._run.save(str(copy), base_path=self._run.dir, policy="now")

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _SwanLab:
    needs = ("swanlab",)

    def open(self, run_dir: Path, run_id: str | None, settings: Settings) -> tuple[str, str]:
        import swanlab

        self._step = 0
        folder = run_dir / "swanlab"
        # A job has nobody who could answer a question, and SwanLab would copy all of our output.
        quiet = swanlab.Settings(interactive=False, terminal={"proxy_type": "none"})
        self._run = swanlab.init(
            project=os.environ.get("SWANLAB_PROJECT", PROJECT),
            name=run_dir.name,
            id=run_id,
            resume="allow",
            log_dir=str(folder),
            config=dict(settings),
            settings=quiet,
        )
        is_online = self._run.mode == "online"
        return self._run.id, str(self._run.url if is_online else folder)

    def log(self, line: dict[str, Any]) -> None:
        self._step = line["step"]
        self._run.log({k: v for k, v in line.items() if k != "step"}, step=self._step)

    def attach(self, path: Path) -> None:
        import swanlab

        text = swanlab.Text(path.read_text(encoding="utf-8"))
        self._run.log({path.name: text}, step=self._step)

    def finish(self, failed: bool) -> None:
        if failed:
            self._run.finish("crashed", "the run ended in an error")
        else:
            self._run.finish()


class _Mlflow:
    needs = ("mlflow", "sqlalchemy", "alembic")

    def open(self, run_dir: Path, run_id: str | None, settings: Settings) -> tuple[str, str]:
        import mlflow

        here = f"sqlite:///{(run_dir / 'mlflow.db').absolute()}"
        is_local = "MLFLOW_TRACKING_URI" not in os.environ
        uri = here if is_local else os.environ["MLFLOW_TRACKING_URI"]
        self._client = mlflow.MlflowClient(uri)
        if run_id is None:
            artifacts = (run_dir / "mlflow").absolute().as_uri() if is_local else None
            found = self._client.create_run(self._experiment(artifacts), run_name=run_dir.name)
            self._id = found.info.run_id
            self._describe(settings)
        else:
            self._id = run_id
            self._client.update_run(run_id, status="RUNNING")
        where = f"look at it with: mlflow ui --backend-store-uri {uri}" if is_local else uri
        return self._id, where

    def _experiment(self, artifacts: str | None) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        return str(self._client.create_experiment(name, artifact_location=artifacts))

    def _describe(self, settings: Settings) -> None:
        from mlflow.entities import Param

        params = [Param(k, str(v)[:MLFLOW_CHARACTERS]) for k, v in settings.items()]
        for begin in range(0, len(params), MLFLOW_PARAMS):
            self._client.log_batch(self._id, params=params[begin : begin + MLFLOW_PARAMS])

    def log(self, line: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [
            Metric(re.sub(r"[^\w\-. :/]", "_", key), float(value), now, line["step"])
            for key, value in line.items()
            if key != "step"
        ]
        self._client.log_batch(self._id, metrics=metrics)

    def attach(self, path: Path) -> None:
        self._client.log_artifact(self._id, str(path))

    def finish(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


LIBRARIES: dict[str, type[_Wandb] | type[_SwanLab] | type[_Mlflow]] = {
    "wandb": _Wandb,
    "swanlab": _SwanLab,
    "mlflow": _Mlflow,
}


def check_installed(names: Sequence[str]) -> None:
    """UserError when the library of one of these trackers is missing."""
    for name in names:
        missing = [m for m in LIBRARIES[name].needs if importlib.util.find_spec(m) is None]
        if missing:
            raise UserError(
                f"log.trackers has {name}, which needs {' and '.join(missing)}; install with: pip "
                f"install 'clue_ds[{name}]', or remove it from log.trackers"
            )


class Tracker:
    """One tracker and its thread. `say` prints a sentence; only `is_busy` waits."""

    def __init__(
        self, name: str, run_dir: Path, settings: Settings, say: Callable[[str], None]
    ) -> None:
        self.name, self._run_dir, self._settings, self._say = name, run_dir, settings, say
        self._library = LIBRARIES[name]()
        self._waiting: queue.SimpleQueue[dict[str, Any] | Path | bool] = queue.SimpleQueue()
        self._has_failed = False
        self._thread = threading.Thread(target=self._work, name=f"clue-ds-{name}", daemon=True)
        self._thread.start()

    def write(self, line: Mapping[str, Any]) -> None:
        """Send the figures of a log line; those without a value are left out."""
        self._put({k: v for k, v in line.items() if isinstance(v, int | float)})

    def attach(self, path: Path) -> None:
        """Send a text file, which must stay where it is until the tracker has ended."""
        self._put(path)

    def end(self, failed: bool) -> None:
        """End the tracker's run once everything that waits is sent; `failed`: as a failed one."""
        self._put(failed)

    def _put(self, item: dict[str, Any] | Path | bool) -> None:
        if self._thread.is_alive():
            self._waiting.put(item)

    def is_busy(self, seconds: float) -> bool:
        """Whether the tracker's run has not ended after a wait of at most so long."""
        self._thread.join(seconds)
        return self._thread.is_alive()

    def leave(self) -> None:
        """Warn if the tracker's run has not ended; no one waits for it any longer."""
        if self._thread.is_alive():
            self._warn("it has not taken everything in time")

    def _work(self) -> None:
        # Whatever a tracker's library raises, SystemExit included, is not worth a run.
        try:
            run_id, where = self._library.open(self._run_dir, self._known_id(), self._settings)
            self._keep_id(run_id)
            self._say(f"{self.name}: {where}")
        except BaseException as error:
            self._warn(f"{type(error).__name__}: {first_line(error)}")
            return
        while not isinstance(item := self._waiting.get(), bool):
            try:
                if isinstance(item, Path):
                    self._library.attach(item)
                else:
                    self._library.log(item)
            # The next item may get through again.
            except BaseException as error:
                self._warn(f"{type(error).__name__}: {first_line(error)}")
        try:
            self._library.finish(failed=item)
        except BaseException as error:
            self._warn(f"{type(error).__name__}: {first_line(error)}")

    def _warn(self, what: str) -> None:
        """Say it, if it is the first thing that goes wrong with this tracker."""
        if not self._has_failed:
            self._has_failed = True
            self._say(
                f"warning: {self.name} does not have everything: {what}; the run does not depend "
                f"on it, and all figures are in {self._run_dir}"
            )

    def _known_id(self) -> str | None:
        return _read_ids(self._run_dir).get(self.name)

    def _keep_id(self, run_id: str) -> None:
        with _IDS_LOCK:
            ids = _read_ids(self._run_dir)
            if ids.get(self.name) != run_id:
                files.write_json(self._run_dir / IDS, ids | {self.name: run_id})


def close(trackers: Sequence[Tracker], failed: bool, mark: Callable[[], None]) -> None:
    """End the runs of all trackers; waits for all of them together, for a limited time.

    `mark` is called every second, so that no watchdog takes the wait for a hang.
    """
    for tracker in trackers:
        tracker.end(failed)
    deadline = time.monotonic() + (SECONDS_AFTER_AN_ERROR if failed else SECONDS_TO_CLOSE)
    while time.monotonic() < deadline and any(tracker.is_busy(1.0) for tracker in trackers):
        mark()
    for tracker in trackers:
        tracker.leave()


_IDS_LOCK = threading.Lock()  # of the threads of one run; only rank 0 has trackers


def _read_ids(run_dir: Path) -> dict[str, str]:
    """Tracker -> id of its run, as far as a run directory says; a damaged file says nothing."""
    try:
        ids = json.loads((run_dir / IDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(ids, dict):
        return {}
    return {name: run_id for name, run_id in ids.items() if isinstance(run_id, str)}
