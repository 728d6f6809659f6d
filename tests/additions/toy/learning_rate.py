# SPDX-License-Identifier: Apache-2.0
"""A shape of a decaying learning rate."""


def quadratic(progress: float) -> float:
    """Steep first, then flat."""
    return (1.0 - progress) ** 2
