# SPDX-License-Identifier: Apache-2.0
"""The learning rate at the corners of its shapes, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_bert.config_sections import LearningRateSettings
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
    assert rates([10, 11, 56, 101, 102], schedule="linear", warmup_steps=10) == pytest.approx([1.0, 1.0, 0.6, LOW, LOW])


def test_without_warm_up_the_first_step_has_the_peak_and_the_last_learns_still() -> None:
    assert rates([1, 100], schedule="linear") == pytest.approx([1.0, LOW + 0.8 / 100])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_every_step_of_a_decay_to_nothing_has_a_rate(schedule: Any) -> None:
    rate = LearningRateSettings(peak=PEAK, schedule=schedule, warmup_steps=3)
    found = [learning_rate_at(step, rate, 20) for step in range(1, 22)]
    assert min(found[:20]) > 0
    assert found[20] == pytest.approx(0.0)


def test_megatrons_decay() -> None:
    """OptimizerParamScheduler sets the rate of step k from the k - 1 steps before it."""
    rate = LearningRateSettings(peak=1e-4, minimum=1e-5, schedule="cosine", warmup_steps=10)
    for step in range(12, 101):
        ratio = (step - 1 - 10) / (100 - 10)
        expected = 1e-5 + 0.5 * (math.cos(math.pi * ratio) + 1.0) * (1e-4 - 1e-5)
        assert learning_rate_at(step, rate, 100) == pytest.approx(expected, rel=1e-12)


def test_cosine() -> None:
    quarter = LOW + 0.8 * 0.5 * (1 + math.cos(math.pi / 4))
    found = rates([20, 41, 61, 101, 500], schedule="cosine", warmup_steps=20)
    assert found == pytest.approx([1.0, quarter, 0.6, LOW, LOW])


def test_constant() -> None:
    assert rates([1, 50, 100, 1000], schedule="constant") == [PEAK] * 4


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.6), ("cosine", 0.6), ("sqrt", LOW + 0.8 * (1 - 0.5**0.5))])
def test_warm_up_stable_decay(shape: str, half: float) -> None:
    found = rates([10, 50, 81, 91, 101], schedule="wsd", warmup_steps=10, wsd_decay_steps=20, wsd_decay_shape=shape)
    assert found == pytest.approx([1.0, 1.0, 1.0, half, LOW])


def test_final_decay_is_a_tenth_by_default() -> None:
    assert rates([91, 92, 97, 101], schedule="wsd", warmup_steps=0, wsd_decay_shape="linear") == pytest.approx(
        [1.0, 0.92, 0.52, LOW]
    )
    # A tenth of a run of a few steps is one, and the decay shows after it.
    assert rates([4, 5], total=4, schedule="wsd") == pytest.approx([1.0, LOW])


def test_decay_may_end_before_the_run() -> None:
    assert rates([26, 51, 52, 100], schedule="linear", decay_steps=50) == pytest.approx([0.6, LOW, LOW, LOW])


def test_decay_may_end_after_the_run() -> None:
    assert rates([101], schedule="linear", decay_steps=200) == pytest.approx([0.6])
