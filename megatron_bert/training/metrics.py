# SPDX-License-Identifier: Apache-2.0
"""What a run reports: a console line and a bar, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from megatron_bert.config_sections import LoggingSettings
from megatron_bert.training.heartbeat import Heartbeat
from megatron_bert.training.metrics_file import METRICS_FILE, MetricsFile
from megatron_bert.training.trackers import open_trackers
from parallel.checkpoint_save import SavedCheckpoint
from parallel.errors import UserError
from parallel.whole_files import reason_of, reporting


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


class Report:
    """Reports of rank 0; on other ranks every method does nothing.

    What the file system refuses is a warning, once until it is over, and never the end of the run.

    Args:
        active: whether this is rank 0.
        start: steps done before this process started.
        steps: steps of the whole run.

    Attributes:
        stopped: whether the run ends before its last step, as asked; the heartbeat says so.

    Raises:
        UserError: the directory cannot be written to.
    """

    def __init__(self, run_dir: Path, settings: LoggingSettings, *, active: bool, start: int, steps: int) -> None:
        self.active, self.start, self.steps, self.done = active, start, steps, start
        self.began = time.monotonic()
        self.stopped = False
        if not active:
            return
        self._refused: set[str] = set()
        if (run_dir / METRICS_FILE).is_dir():
            raise UserError(
                f"{run_dir / METRICS_FILE} is a directory, but it is the name of a file that the run writes: move it "
                "away, or set another training.run_dir"
            )
        with reporting("written", run_dir / METRICS_FILE, "make room, or give access to it"):
            self.file = MetricsFile(run_dir / METRICS_FILE, start)
        self.board: Any = None
        if settings.tensorboard:
            from megatron_bert.training.event_file import EventFile

            if start == 0:  # events of an earlier run, which this one begins in place of
                for path in (run_dir / "tensorboard").glob("events.out.tfevents.*"):
                    with suppress(OSError):
                        path.unlink()
            self.board = EventFile(run_dir / "tensorboard", start + 1)
        self.trackers = open_trackers(list(settings.trackers), run_dir, settings.project)
        show = sys.stderr.isatty() if settings.progress is None else settings.progress
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=not show, dynamic_ncols=True)
        self.heartbeat = Heartbeat(run_dir, steps)
        self.heartbeat.beat("training", start)
        if self.file.broken:
            self.say(f"warning: {self.file.broken} lines of {METRICS_FILE} could not be read, and are left out")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.active:
            return
        self.bar.close()
        self.heartbeat.beat("failed" if kind is not None else "stopped" if self.stopped else "done")
        with suppress(OSError):
            self.file.flush()
        if kind is None and (lost := self.file.lost + self.file.waiting):
            self.say(f"warning: the last {lost} rows of {METRICS_FILE} could not be written, and are lost")
        for file in (self.file, self.board):
            if file is not None:
                with suppress(OSError):
                    file.close()
        for name, tracker in self.trackers.items():
            self._track(name, partial(tracker.close, kind is not None))

    def say(self, text: str) -> None:
        """A line on the console."""
        if self.active:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def went_back(self, step: int, row: dict[str, float | int]) -> None:
        """The run has returned to an earlier step: its later rows go, and one says why."""
        if not self.active:
            return
        self.attempt(METRICS_FILE, "it keeps the steps that are made again", lambda: self.file.forget_after(step))
        if self.board is not None:
            with suppress(OSError):
                self.board.begin(step + 1)
        self._write({"step": step, **row}, prefix="train")
        self.start, self.done = min(self.start, step), step
        self.bar.n = step
        self.bar.refresh()

    def advance(self) -> None:
        """One more step is done."""
        if self.active:
            self.bar.update()
            self.done += 1
            self.heartbeat.beat("training", self.done)

    def doing(self, state: str) -> None:
        """What the run does between two steps, for the heartbeat."""
        if self.active:
            self.heartbeat.beat(state)

    def attempt(self, what: str, meanwhile: str, work: Callable[[], object]) -> None:
        """Write what the run can do without: what the file system refuses is a warning, once until it is over.

        Args:
            what: is written.
            meanwhile: what becomes of it.
            work: writes it.
        """
        if not self.active:
            return
        try:
            work()
        except OSError as error:
            if what not in self._refused:
                self.say(f"warning: {what} cannot be written ({reason_of(error)}): {meanwhile}")
            self._refused.add(what)
        else:
            if what in self._refused:
                self.say(f"{what} can be written again")
            self._refused.discard(what)

    def step(self, row: dict[str, Any]) -> None:
        """A logged step: a row with ``step`` and its metrics; None is left out, and so is what is not finite."""
        if not self.active:
            return
        row = {name: value for name, value in row.items() if value is not None}
        self.heartbeat.loss = row["loss"]
        self._write(row, prefix="train")
        step = int(row["step"] or 0)
        elapsed = time.monotonic() - self.began
        left = elapsed / max(1, step - self.start) * (self.steps - step)
        parts = [f"step {step}/{self.steps}", f"loss {row['loss']:.4f}"]
        parts += [f"{name.removesuffix('_loss')} {row[name]:.4f}" for name in row if name.endswith("_loss")]
        parts += [
            f"lr {row['learning_rate']:.2e}",
            f"grad norm {row['grad_norm']:.3f}",
            f"{row['tokens_per_second']:,.0f} tokens/s",
        ]
        if "mfu" in row:
            parts.append(f"MFU {row['mfu']:.1%}")
        self.say(" | ".join([*parts, f"left {_duration(left)}"]))

    def evaluation(self, step: int, scores: dict[str, float]) -> None:
        """Held-out scores after a step."""
        if not self.active:
            return
        self._write({"step": step, **{f"valid_{name}": value for name, value in scores.items()}}, prefix="valid")
        text = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        self.say(f"step {step}/{self.steps} | held out: {text}")

    def checkpoint(self, saved: SavedCheckpoint) -> None:
        """A checkpoint that has been written, and what it cost."""
        if self.active:
            costs = {"stall_seconds": saved.stall_seconds, "seconds": saved.seconds, "bytes": saved.bytes}
            row = {"step": saved.step, **{f"checkpoint_{name}": value for name, value in costs.items()}}
            self._write(row, prefix="checkpoint")

    def _write(self, row: dict[str, Any], prefix: str) -> None:
        self.file.add(row)
        self.attempt(METRICS_FILE, "its rows wait until it can be", self._write_rows)
        values = {
            f"{prefix}/{name.removeprefix(f'{prefix}_')}": value
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        for name, tracker in self.trackers.items():
            self._track(name, partial(tracker.add, int(row["step"]), values))
        if self.board is not None:
            self.attempt(
                "TensorBoard's events",
                f"there are none of the steps until it can be; {METRICS_FILE} has all of them",
                lambda: self.board.add(row["step"], values),
            )

    def _track(self, name: str, work: Callable[[], object]) -> None:
        """Hand something to a tracker; what it raises is a warning, once until it is over."""

        def reported() -> None:
            try:
                work()
            except OSError:
                raise
            except Exception as error:  # of a library, which may raise anything
                raise OSError(0, " ".join(str(error).split()) or type(error).__name__) from error

        self.attempt(f"what {name} is to get", f"{METRICS_FILE} has all of it", reported)

    def _write_rows(self) -> None:
        if self.file.flush():
            self.say(f"warning: {self.file.path} was removed or replaced: it begins again, without the rows before")
