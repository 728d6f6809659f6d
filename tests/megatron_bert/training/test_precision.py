# SPDX-License-Identifier: Apache-2.0
"""The loss scale of float16."""

from __future__ import annotations

import pytest

from megatron_bert.config_sections import PrecisionSettings
from megatron_bert.training.precision import LossScale


def scale(start: float = 8.0, interval: int = 3) -> LossScale:
    return LossScale(
        PrecisionSettings(compute="float16", initial_loss_scale=start, loss_scale_growth_interval=interval)
    )


def values(loss_scale: LossScale, overflows: list[bool]) -> list[float]:
    found = []
    for overflow in overflows:
        loss_scale.update(overflow)
        found.append(loss_scale.value)
    return found


def test_doubles_after_clean_steps() -> None:
    assert values(scale(), [False] * 7) == [8, 8, 16, 16, 16, 32, 32]


def test_halves_at_an_overflow_and_counts_anew() -> None:
    assert values(scale(), [False, False, True, False, False, False]) == [8, 8, 4, 4, 4, 8]


def test_not_below_one() -> None:
    assert values(scale(start=3.0), [True, True, True]) == [1.5, 1.0, 1.0]


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_other_formats_need_none(compute: str) -> None:
    fixed = LossScale(PrecisionSettings(compute=compute))
    assert not fixed.dynamic
    assert values(fixed, [True, *[False] * 2000]) == [1.0] * 2001
    fixed.load_state({"value": 64.0, "clean_steps": 5})  # of a checkpoint that was trained in float16
    assert fixed.value == 1.0


def test_goes_on_from_its_state() -> None:
    first, second = scale(), scale(start=512.0)
    values(first, [False, True, False, False])
    second.load_state(first.state())
    assert values(second, [False, False]) == values(first, [False, False]) == [8, 8]
