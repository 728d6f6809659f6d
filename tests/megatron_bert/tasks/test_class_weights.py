# SPDX-License-Identifier: Apache-2.0
"""How much classes count in the loss of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from sklearn.utils.class_weight import compute_class_weight

from megatron_bert.tasks.class_weights import balanced_weights
from megatron_bert.tasks.settings import TaskSettings
from parallel.errors import UserError
from tests.megatron_bert.tasks.support import json_lines, letter_tokenizer, task_of


def test_balanced_is_that_of_scikit_learn() -> None:
    labels = np.array([0, 2, 2, 2, 1, 0, 2, -100, 2])
    found = balanced_weights([labels[:4], labels[4:]], 3)
    counted = labels[labels >= 0]
    expected = compute_class_weight("balanced", classes=np.unique(counted), y=counted)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # A class that does not occur, such as an I- tag, is none among those that share the loss.
    np.testing.assert_allclose(balanced_weights([labels], 4), [*expected, 1.0], rtol=1e-6)


def test_balanced_labels_of_which_a_text_may_have_several() -> None:
    rows = [[1, 0, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 1, 0], [np.nan] * 4]
    found = balanced_weights([np.array(row, dtype=np.float32) for row in rows], 4)
    np.testing.assert_allclose(found, [3 / 2, 1.0, 1.0, 4.0], rtol=1e-6)


GIVEN: dict[str, tuple[Any, list[float] | None]] = {
    "none": ("none", None),
    "balanced": ("balanced", [2.0, 2 / 3]),
    "list": ([1, 2.5], [1.0, 2.5]),
    "names": ({1: 3, 0: 0.5}, [0.5, 3.0]),
}


@pytest.mark.parametrize("case", GIVEN)
def test_settings(case: str, tmp_path: Path) -> None:
    given, expected = GIVEN[case]
    train = json_lines(tmp_path / "train.jsonl", [{"text": "a", "label": label} for label in (1, 0, 1, 1)])
    task = task_of(letter_tokenizer(tmp_path), {"name": "classification", "class_weights": given}, {"train": train})
    found = task.class_weights(task.instances(task.examples("train"), train=True))
    assert found is None if expected is None else found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"x": 1.0}, "has no weight for 'y'"),
        ({"x": 1.0, "y": 1.0, "z": 1.0}, "names 'z', which is not a label: give a weight for each of x, y"),
        ([1.0, 2.0, 3.0], "has 3 weights, but there are 2 labels"),
    ],
)
def test_weights_of_other_labels(given: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=expected):
        task_of(letter_tokenizer(tmp_path), {"name": "classification", "labels": ["x", "y"], "class_weights": given})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "stsb", "class_weights": "balanced"}, 'means nothing to the task "stsb"'),
        ({"name": "question_answering", "class_weights": [1.0, 2.0]}, "means nothing"),
        ({"name": "mrpc", "class_weights": [0, 0]}, "all 0"),
        ({"name": "mrpc", "class_weights": [1, -1]}, "holds -1: give a number of 0 or more"),
        ({"name": "mrpc", "class_weights": [1, float("inf")]}, "holds inf"),
        ({"name": "mrpc", "class_weights": "equal"}, "is 'equal': give none, balanced, or"),
        ({"name": "mrpc", "class_weights": {"0": 1, "1": "x"}}, "holds 'x'"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        TaskSettings.model_validate(settings)
