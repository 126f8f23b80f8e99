"""Files that a run adds to while it trains, TensorBoard's among them.

Guarantees: a file that can't be written is one warning, and never ends or blocks the run.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


class Appender:
    """Appends whole records to a file. When it can't, it warns once; later records may succeed."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path, self._warn, self._warned = path, warn, False
        self._file: io.FileIO | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = io.FileIO(path, "ab")
        except OSError as error:
            self._failed(error)

    def append(self, record: bytes) -> None:
        if self._file is None:
            return
        size = None
        try:
            size = os.fstat(self._file.fileno()).st_size
            while record:
                record = record[self._file.write(record) :]
        except OSError as error:
            with suppress(OSError):
                if size is not None:
                    self._file.truncate(size)  # or the next record would follow half a record
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            self._warn(
                f"warning: can't write {self._path}: {error}; the run goes on, and what belongs "
                "there is lost until it can be written again"
            )

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()


class EventFile:
    """A TensorBoard file in RUN/tensorboard, written by this thread.

    Rejected: SummaryWriter, which writes in a thread of its own; on a full disk that thread prints
    a traceback, and a later call raises its error.
    """

    def __init__(self, run_dir: str | Path, start_step: int, warn: Callable[[str], None]) -> None:
        from tensorboard.compat.proto import event_pb2

        self._event = event_pb2.Event
        name = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        path = Path(run_dir) / "tensorboard" / f"events.out.tfevents.{name}"
        self._file = Appender(path, warn)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        # TensorBoard then drops what earlier files say about this step and later ones.
        self._append(step=start_step + 1, file_version="brain.Event:2")
        self._append(step=start_step + 1, session_log=start)

    def _append(self, **fields: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._file.append(record.getvalue())

    def write(self, line: dict[str, Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=key, simple_value=value)
            for key, value in line.items()
            if key != "step" and value is not None
        ]
        self._append(step=line["step"], summary=Summary(value=values))

    def close(self) -> None:
        self._file.close()
