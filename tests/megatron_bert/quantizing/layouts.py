# SPDX-License-Identifier: Apache-2.0
"""Quantization at other layouts, step by step beside a run of one process.

Where weights and ranges are the same, so are the integers, whatever the layout or the processor; only float gradients
are summed in another order. Ranges come from a float model, though, and weights from such gradients: each layout has
its own in the last bit, and one of them may round an integer the other way, which moves the loss by far more than
rounding does. How often depends on the processor. So every step begins with the weights and ranges of the run of one
process, after its own have been compared with them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bert.quantizing.quantize import BASELINE_FILE, quantize
from megatron_bert.quantizing.settings import QuantizeSettings
from megatron_bert.training.trainer import Trainer
from tests.megatron_bert.training.runs import rows, tensors

#: Every step is kept.
KEPT = {"checkpoint__every": 1, "checkpoint__keep": 0}


def _checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def _scores_before(run_dir: Path) -> dict[str, dict[str, float]]:
    return json.loads((run_dir / BASELINE_FILE).read_text(encoding="utf-8"))


def quantize_by_steps(settings: QuantizeSettings, reference: Path | None = None) -> None:
    """A run that also saves what it calibrated.

    Args:
        settings: of the run, with ``KEPT``.
        reference: directory of such a run, whose weights and ranges each step begins with.
    """
    original = Trainer.train_step

    def train_step(self: Trainer, *args: Any) -> Any:
        if self.step == 0:
            self.save()
        if reference is not None:
            self.load_weights(_checkpoint(reference, self.step))
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "train_step", train_step)
        quantize(settings)


def assert_same_steps(run_dirs: list[Path], reference: Path) -> None:
    """Calibration, and every step from the same weights and ranges.

    Args:
        run_dirs, reference: of :func:`quantize_by_steps`, the ones beside the other.
    """
    steps = range(rows(reference)[-1]["step"] + 1)
    expected = [tensors(_checkpoint(reference, step)) for step in steps]
    for run_dir in run_dirs:
        _assert_same_run(run_dir, reference, expected)


def _assert_same_run(run_dir: Path, reference: Path, expected: list[dict[str, torch.Tensor]]) -> None:
    name = run_dir.name
    before = _scores_before(run_dir)
    for split, scores in _scores_before(reference).items():
        assert before[split] == pytest.approx(scores, rel=1e-3, abs=1e-3), (name, split)
    expected_rows = rows(reference)
    for mine, theirs in zip(rows(run_dir), expected_rows, strict=True):
        # Weights after a step are its own, so held-out scores may differ by some integers.
        for key, close in {"loss": 1e-6, "grad_norm": 1e-5, "valid_loss": 1e-3}.items():
            if key in theirs:
                assert mine[key] == pytest.approx(theirs[key], rel=close), (name, mine["step"], key)
    rate = max(row["learning_rate"] for row in expected_rows if "loss" in row)
    for step, values in enumerate(expected):
        actual = tensors(_checkpoint(run_dir, step))
        assert actual.keys() == values.keys()
        for key, value in values.items():
            _assert_same(actual[key], value, (name, step, key), rate)


def _assert_same(found: torch.Tensor, value: torch.Tensor, where: tuple[str, int, str], rate: float) -> None:
    _, step, key = where
    if key.endswith(".range"):  # calibrated: maxima of float tensors; followed: of integers
        close = 1e-5 * float(value) if step == 0 else 0.0
    elif key.startswith("model."):
        close = 0.0 if step == 0 else 0.01 * rate
    else:  # moments of the optimizer, so the gradients
        close = 1e-5 * float(value.abs().max())
    error = float((found - value).abs().max())
    assert error <= close, (*where, error, close)
