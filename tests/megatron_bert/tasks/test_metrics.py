# SPDX-License-Identifier: Apache-2.0
"""Metrics against their formulas and against fixed values, and where they are undefined."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_bert.tasks import metrics


def test_classes() -> None:
    true, given = [0, 0, 1, 1, 1, 0, 1, 0], [0, 1, 1, 1, 0, 0, 1, 1]
    tp, fp, fn, tn = 3, 2, 1, 2
    assert metrics.accuracy(true, given) == 5 / 8
    assert metrics.binary_f1(true, given) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert metrics.matthews(true, given) == pytest.approx(expected)
    other = 2 * tn / (2 * tn + fn + fp)
    assert metrics.macro_f1(true, given) == pytest.approx((2 * tp / (2 * tp + fp + fn) + other) / 2)
    assert metrics.confusion_matrix(true, given, 3).tolist() == [[2, 2, 0], [1, 3, 0], [0, 0, 0]]


@pytest.mark.filterwarnings("error")
def test_constant_predictions_of_classes() -> None:
    assert metrics.matthews([0, 1, 1], [1, 1, 1]) == 0.0
    assert metrics.matthews([1, 1], [1, 1]) == 0.0
    assert metrics.binary_f1([0, 1, 1], [0, 0, 0]) == 0.0
    assert metrics.binary_f1([0, 0], [0, 0]) == 0.0
    assert metrics.macro_f1([0, 0], [1, 1]) == 0.0


def test_multi_label() -> None:
    true = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 0]])
    given = np.array([[1, 0, 0], [0, 0, 0], [1, 0, 1]])
    found = metrics.multi_label_metrics(true, given)
    assert found == {
        "f1_micro": pytest.approx(2 * 2 / (2 * 2 + 1 + 2)),
        "f1_macro": pytest.approx((1.0 + 0.0 + 0.0) / 3),
        "accuracy": pytest.approx(1 / 3),
    }


def test_regression() -> None:
    true, given = [0.0, 1.0, 2.0, 5.0, 4.0], [0.5, 0.4, 2.5, 9.0, 3.0]
    found = metrics.regression_metrics(true, given)
    x, y = np.array(true) - np.mean(true), np.array(given) - np.mean(given)
    assert found["pearson"] == pytest.approx(float((x @ y) / np.sqrt((x @ x) * (y @ y))))
    # Ranks differ by one in two places: 1 - 6 * sum(d^2) / (n (n^2 - 1)).
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / (5 * 24))
    assert found["pearson_spearman"] == pytest.approx((found["pearson"] + found["spearman"]) / 2)
    assert found["squared_error_loss"] == pytest.approx((0.25 + 0.36 + 0.25 + 16 + 1) / 5)


@pytest.mark.parametrize(
    ("true", "given"),
    [
        ([1.0, 2.0, 3.0], [4.0, 4.0, 4.0]),
        ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]),
        ([1.0], [1.0]),
        ([1.0, 2.0, 3.0], [1.0, math.nan, 3.0]),
        ([1.0, 2.0, 3.0], [1.0, math.inf, 3.0]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_undefined_correlations_are_zero(true: list[float], given: list[float]) -> None:
    found = metrics.regression_metrics(true, given)
    assert (found["pearson"], found["spearman"], found["pearson_spearman"]) == (0.0, 0.0, 0.0)
    assert not math.isnan(found["squared_error_loss"])


@pytest.mark.filterwarnings("error")
def test_probabilities_of_large_scores() -> None:
    assert metrics.softmax(np.array([1e4, 0.0, -1e4], dtype=np.float32)).tolist() == [1.0, 0.0, 0.0]
    assert metrics.softmax(np.array([[0.0, math.log(3)]])) == pytest.approx(np.array([[0.25, 0.75]]))
    assert metrics.sigmoid(np.array([-1e4, 0.0, math.log(3), 1e4])) == pytest.approx(np.array([0, 0.5, 0.75, 1]))
