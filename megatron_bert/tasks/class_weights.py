# SPDX-License-Identifier: Apache-2.0
"""How much each class counts in the loss of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_bert.tasks.settings import ClassWeights
from parallel.errors import UserError


def given_weights(given: ClassWeights, labels: Sequence[str]) -> np.ndarray | None:
    """The weights that the settings name, float32 [labels]; None where they name none.

    Raises:
        UserError: they are not those of the labels.
    """
    if isinstance(given, str):
        return None
    if isinstance(given, Mapping):
        missing, unknown = (
            [name for name in labels if name not in given],
            [name for name in given if name not in labels],
        )
        if missing or unknown:
            what = f"has no weight for {missing[0]!r}" if missing else f"names {unknown[0]!r}, which is not a label"
            raise UserError(f"task.class_weights {what}: give a weight for each of {', '.join(labels[:12])}")
        given = [given[name] for name in labels]
    if len(given) != len(labels):
        raise UserError(
            f"task.class_weights has {len(given)} weights, but there are {len(labels)} labels: give a weight for each "
            f"of {', '.join(labels[:12])}"
        )
    return np.array(given, dtype=np.float32)


def balanced_weights(labels: Sequence[np.ndarray], classes: int) -> np.ndarray:
    """Weights by which each class has the same part in the loss of instances with these labels, float32 [classes].

    Of labels that exclude each other n / (k * n_c): n labels, k classes among them, n_c of class c, as scikit-learn
    has it. Where a text may have several, the ratio of texts without a label to those with it, by which the latter
    count. What does not occur (or is everywhere) weighs 1.
    """
    joined = np.concatenate(labels)
    if np.issubdtype(joined.dtype, np.floating):
        table = joined.reshape(-1, classes)
        table = table[~np.isnan(table).any(axis=1)]
        with_label = table.sum(axis=0)
        without = len(table) - with_label
        return _ratio(without, np.where(without > 0, with_label, 0.0))
    counts = np.bincount(joined[joined >= 0], minlength=classes)
    return _ratio(np.full(classes, counts.sum()), counts * np.count_nonzero(counts))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Quotients; 1 where there is nothing to divide by."""
    return np.where(below > 0, above / np.maximum(below, 1), 1.0).astype(np.float32)
