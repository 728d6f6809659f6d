# SPDX-License-Identifier: Apache-2.0
"""The picture of a run's metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.training.curves import draw_curves
from megatron_bert.training.metrics_file import METRICS_FILE


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def training(step: int, **more: float) -> dict[str, Any]:
    return {"step": step, "loss": 3.0, "mlm_loss": 2.5, "learning_rate": 1e-3, "grad_norm": 0.5, **more}


@pytest.mark.parametrize(
    ("more", "held_out"), [({}, []), ({"sop_loss": 0.5}, [{"step": 2, "valid_mlm_loss": 2.0}])], ids=["plain", "all"]
)
def test_a_picture(tmp_path: Path, more: dict[str, float], held_out: list[dict[str, Any]]) -> None:
    write(tmp_path, [training(1, **more), training(2, **more), *held_out])
    path = draw_curves(tmp_path, unigram_entropy=2.2 if held_out else None)
    assert path == tmp_path / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_too_few_steps(tmp_path: Path) -> None:
    write(tmp_path, [training(1), {"step": 1, "valid_mlm_loss": 2.0}])
    assert draw_curves(tmp_path) is None
    assert not (tmp_path / "curves.png").exists()
