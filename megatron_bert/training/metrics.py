"""What a run reports: a console line and a bar, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from megatron_bert.config import LoggingSettings
from parallel.whole_files import reason_of, reporting, write_text

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, leaving out a last line that was cut off."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


class Report:
    """Reports of rank 0; on other ranks every method does nothing.

    Args:
        run_dir: directory of the run.
        settings: what to report.
        active: whether this is rank 0.
        start: steps done before this process started.
        steps: steps of the whole run.
    """

    def __init__(self, run_dir: Path, settings: LoggingSettings, *, active: bool, start: int, steps: int) -> None:
        self.active, self.start, self.steps = active, start, steps
        self.began = time.monotonic()
        if not active:
            return
        self._forget_after(run_dir / METRICS_FILE, start)
        # Unbuffered, so that what a full disk refuses is known, and waits for the next try.
        self.file = (run_dir / METRICS_FILE).open("ab", buffering=0)
        self._unwritten = bytearray()
        self._warned = False
        self.board: Any = None
        if settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            if start == 0:  # events of an earlier run, which this one begins in place of
                for path in (run_dir / "tensorboard").glob("events.out.tfevents.*"):
                    path.unlink()
            self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1)
        show = sys.stderr.isatty() if settings.progress is None else settings.progress
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=not show, dynamic_ncols=True)

    @staticmethod
    def _forget_after(path: Path, step: int) -> None:
        """Drop rows that a resumed run will write again."""
        if path.exists():
            kept = [row for row in read_metrics(path) if row["step"] <= step]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self.bar.close()
            if self.board is not None:
                with suppress(OSError):  # reported at the row that could not be written, or of the last of them alone
                    self.board.close()
            with self.file:
                if kind is None:
                    self._write_last_rows()

    def _write_last_rows(self) -> None:
        with reporting("written", self.file.name, "its last rows are lost; make room before the next run"):
            self._write_rows()

    def say(self, text: str) -> None:
        """A line on the console."""
        if self.active:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def advance(self) -> None:
        """One more step is done."""
        if self.active:
            self.bar.update()

    def step(self, row: dict[str, float | int | None]) -> None:
        """A logged step: a row with ``step`` and its metrics; None is left out, and so is what is not finite."""
        if not self.active:
            return
        row = {name: value for name, value in row.items() if value is not None}
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

    def _write(self, row: dict[str, Any], prefix: str) -> None:
        # JSON has no NaN and no infinity: a float16 step that was skipped has no gradient norm.
        row = {name: value for name, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
        self._unwritten += (json.dumps(row, allow_nan=False) + "\n").encode()
        try:
            self._write_rows()
            self._warned = False
        except OSError as error:
            if not self._warned:
                self.say(f"warning: {METRICS_FILE} cannot be written ({reason_of(error)}): its rows wait for room")
            self._warned = True
        if self.board is not None:
            try:
                self._write_scalars(row, prefix)
            except OSError as error:
                self.board = None
                self.say(f"warning: TensorBoard's events end here ({reason_of(error)}); {METRICS_FILE} has all of them")

    def _write_rows(self) -> None:
        while self._unwritten:
            del self._unwritten[: self.file.write(self._unwritten)]

    def _write_scalars(self, row: dict[str, Any], prefix: str) -> None:
        if self.board is not None:
            for name, value in row.items():
                if name != "step":
                    self.board.add_scalar(f"{prefix}/{name.removeprefix('valid_')}", value, row["step"])
