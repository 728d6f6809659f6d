# SPDX-License-Identifier: Apache-2.0
"""Metrics of classes and numbers, by scikit-learn and scipy, defined where those are not.

A correlation of constant or non-finite numbers, or of fewer than two, is undefined: here it is 0, for a model that
always says the same has learned nothing. An F1 without any true or predicted positive is 0 too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import scipy.special
import sklearn.metrics
from scipy import stats


def accuracy(true: Sequence[int], predicted: Sequence[int]) -> float:
    """Share of equal class numbers."""
    return float(sklearn.metrics.accuracy_score(true, predicted))


def binary_f1(true: Sequence[int], predicted: Sequence[int]) -> float:
    """F1 of class 1, as GLUE reports it for MRPC and QQP."""
    return float(sklearn.metrics.f1_score(true, predicted, pos_label=1, average="binary", zero_division=0.0))


def macro_f1(true: Sequence[int], predicted: Sequence[int]) -> float:
    """Mean of the F1 of every class that is true or predicted somewhere."""
    return float(sklearn.metrics.f1_score(true, predicted, average="macro", zero_division=0.0))


def matthews(true: Sequence[int], predicted: Sequence[int]) -> float:
    """Matthews' correlation; 0 where one side is constant."""
    if len(set(true)) < 2 or len(set(predicted)) < 2:
        return 0.0
    return float(sklearn.metrics.matthews_corrcoef(true, predicted))


def multi_label_metrics(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Metrics of int matrices [examples, labels] of 0 and 1.

    Returns:
        f1_micro, f1_macro (mean over all labels) and accuracy (share of examples with exactly the right labels).
    """
    score = sklearn.metrics.f1_score
    return {
        "f1_micro": float(score(true, predicted, average="micro", zero_division=0.0)),
        "f1_macro": float(score(true, predicted, average="macro", zero_division=0.0)),
        "accuracy": float(np.mean((true == predicted).all(axis=1))),
    }


def regression_metrics(true: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlation, their mean, and the mean squared error (inf where not finite)."""
    pearson = _correlation(stats.pearsonr, true, predicted)
    spearman = _correlation(stats.spearmanr, true, predicted)
    error = float(np.mean(np.square(np.asarray(true, dtype=np.float64) - np.asarray(predicted, dtype=np.float64))))
    return {
        "pearson": pearson,
        "spearman": spearman,
        "pearson_spearman": (pearson + spearman) / 2,
        "squared_error_loss": error if np.isfinite(error) else float("inf"),
    }


def confusion_matrix(true: Sequence[int], predicted: Sequence[int], classes: int) -> np.ndarray:
    """Counts, int64 [classes, classes]: rows true, columns predicted."""
    return sklearn.metrics.confusion_matrix(true, predicted, labels=range(classes)).astype(np.int64)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis, float64."""
    return scipy.special.softmax(logits.astype(np.float64), axis=-1)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probability of each logit by itself, float64."""
    return 0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))


def _correlation(measure: Callable, true: Sequence[float], predicted: Sequence[float]) -> float:
    both = np.array([true, predicted], dtype=np.float64)
    if both.shape[1] < 2 or not np.isfinite(both).all() or (both == both[:, :1]).all(axis=1).any():
        return 0.0
    value = float(measure(both[0], both[1]).statistic)
    return value if np.isfinite(value) else 0.0
