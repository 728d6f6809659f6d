"""The learning rate at the corners of its shapes, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_bert.config import LearningRateSettings
from megatron_bert.training.learning_rate import learning_rate_at

PEAK, LOW = 1.0, 0.2


def rates(steps: list[int], total: int = 100, **settings: Any) -> list[float]:
    rate = LearningRateSettings(peak=PEAK, minimum=LOW, **settings)
    return [learning_rate_at(step, rate, total) for step in steps]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "wsd"])
def test_warm_up_from_zero(schedule: str) -> None:
    found = rates([1, 5, 10], schedule=schedule, warmup_steps=10)
    assert found == pytest.approx([0.1, 0.5, PEAK], abs=1e-12)


def test_linear() -> None:
    assert rates([10, 55, 100, 101], schedule="linear", warmup_steps=10) == pytest.approx([1.0, 0.6, LOW, LOW])


def test_no_warm_up_starts_one_step_down() -> None:
    assert rates([1, 100], schedule="linear") == pytest.approx([1.0 - 0.8 / 100, LOW])


def test_cosine() -> None:
    quarter = LOW + 0.8 * 0.5 * (1 + math.cos(math.pi / 4))
    found = rates([20, 40, 60, 100, 500], schedule="cosine", warmup_steps=20)
    assert found == pytest.approx([1.0, quarter, 0.6, LOW, LOW])


def test_constant() -> None:
    assert rates([1, 50, 100, 1000], schedule="constant") == [PEAK] * 4


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.6), ("cosine", 0.6), ("sqrt", LOW + 0.8 * (1 - 0.5**0.5))])
def test_warm_up_stable_decay(shape: str, half: float) -> None:
    found = rates([10, 50, 80, 90, 100], schedule="wsd", warmup_steps=10, wsd_decay_steps=20, wsd_decay_shape=shape)
    assert found == pytest.approx([1.0, 1.0, 1.0, half, LOW])


def test_final_decay_is_a_tenth_by_default() -> None:
    assert rates([91, 96, 100], schedule="wsd", warmup_steps=0, wsd_decay_shape="linear") == pytest.approx(
        [0.92, 0.52, LOW]
    )
    # A run of a few steps has a last one to decay in all the same.
    assert rates([3, 4], total=4, schedule="wsd") == pytest.approx([1.0, LOW])


def test_decay_may_end_before_the_run() -> None:
    assert rates([25, 50, 51, 100], schedule="linear", decay_steps=50) == pytest.approx([0.6, LOW, LOW, LOW])


def test_decay_may_end_after_the_run() -> None:
    assert rates([100], schedule="linear", decay_steps=200) == pytest.approx([0.6])
