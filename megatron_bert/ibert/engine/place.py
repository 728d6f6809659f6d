# SPDX-License-Identifier: Apache-2.0
"""Where plans are."""

from __future__ import annotations

from pathlib import Path

from megatron_bert.convert.integer_plans import PLAN_NAME
from parallel.errors import UserError

__all__ = ["PLAN_NAME", "plan_path"]


def plan_path(path: Path) -> Path:
    """The plan's file: itself, in a model's directory, or in that of a run.

    Raises:
        UserError: there is none.
    """
    for place in (path, path / PLAN_NAME, path / "model" / PLAN_NAME):
        if place.is_file():
            return place
    raise UserError(
        f"{path} holds no {PLAN_NAME}: give a model that `megatron-bert quantize` has made, or one that was quantized "
        "before and `IntegerModel.from_model(model).save(path)` has written"
    )
