# SPDX-License-Identifier: Apache-2.0
"""TensorBoard's event files, written without a thread: what the disk refuses is known at once, and tried again."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_bert.training.appended_file import AppendedFile
from parallel.hosts import host_name

_NUMBERS = itertools.count()


class EventFile:
    """Scalars for TensorBoard, each row in the file as soon as it is added.

    When the file was removed, a new one goes on.

    Args:
        directory: of the files; made when there is something to write.
        first_step: TensorBoard forgets what earlier files hold of this step and later ones.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        self.directory = directory
        self._file: AppendedFile | None = None
        self.begin(first_step)

    def begin(self, first_step: int) -> None:
        """Go on in a new file, which makes TensorBoard forget this step and later ones."""
        self.close()
        start = SessionLog(status=SessionLog.START)
        self._start = Event(step=first_step, wall_time=time.time(), session_log=start).SerializeToString()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step, by tag.

        Raises:
            OSError: the file system refuses.
        """
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        event = Event(step=step, wall_time=time.time(), summary=Summary(value=scalars))
        if self._file is None or not self._file.in_place:
            self._open()
        assert self._file is not None
        self._file.add(_records(event.SerializeToString()))

    def _open(self) -> None:
        self.close()
        name = f"events.out.tfevents.{time.time():.0f}.{host_name()}.{os.getpid()}.{next(_NUMBERS):04d}"
        file = AppendedFile(self.directory / name)
        version = Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString()
        try:
            file.add(_records(version, self._start))
        except OSError:
            file.close()
            file.path.unlink(missing_ok=True)
            raise
        self._file, self._start = file, b""  # what this run has written by then must stay

    def close(self) -> None:
        """Close the file; another call of :meth:`add` opens a new one."""
        if self._file is not None:
            self._file.close()
        self._file = None


def _records(*events: bytes) -> bytes:
    content = BytesIO()
    for event in filter(None, events):
        RecordWriter(content).write(event)
    return content.getvalue()
