# SPDX-License-Identifier: Apache-2.0
"""TensorBoard's event files, written without a thread: what the disk refuses is known at once, and tried again."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from parallel.hosts import host_name

_NUMBERS = itertools.count()


class EventFile:
    """Scalars for TensorBoard, each row in the file as soon as it is added.

    A row that the disk takes only in part is taken back; when the file was removed, a new one goes on.

    Args:
        directory: of the files; made when there is something to write.
        first_step: TensorBoard forgets what earlier files hold of this step and later ones.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        self.directory = directory
        self._path = directory
        self._file: BinaryIO | None = None
        self._size = 0
        self._start = Event(
            step=first_step, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START)
        ).SerializeToString()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step, by tag.

        Raises:
            OSError: the file system refuses.
        """
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        event = Event(step=step, wall_time=time.time(), summary=Summary(value=scalars))
        if self._file is None or not self._path.exists():
            self._open()
        self._write(event.SerializeToString())

    def _open(self) -> None:
        self.close()
        self.directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{host_name()}.{os.getpid()}.{next(_NUMBERS):04d}"
        self._path = self.directory / name
        self._file, self._size = self._path.open("xb", buffering=0), 0
        try:
            self._write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString(), self._start)
        except OSError:
            self.close()
            self._path.unlink(missing_ok=True)
            raise
        self._start = b""  # what this run has written by then must stay

    def _write(self, *events: bytes) -> None:
        assert self._file is not None
        records = BytesIO()
        for event in filter(None, events):
            RecordWriter(records).write(event)
        rest = records.getvalue()
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(self._size)
            self._file.seek(self._size)
            raise
        self._size = self._file.tell()

    def close(self) -> None:
        """Close the file; another call of :meth:`add` opens a new one."""
        if self._file is not None:
            self._file.close()
        self._file = None
