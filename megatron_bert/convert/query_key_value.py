# SPDX-License-Identifier: Apache-2.0
"""Row orders of the fused query, key and value matrix.

Megatron changed the order twice, and a wrong reading gives no error of shape, only a model that has unlearned. For A
heads of D dimensions (those of one tensor-parallel rank) the rows of the weight, and the elements of the bias, are

============  =============  ==========================================
version       order          note
============  =============  ==========================================
absent, 0     [3, A, D]      until September 2020, the NGC checkpoints
1.0           [A, D, 3]      September and October 2020
2.0, 3.0      [A, 3, D]      since; megatron-core's and this project's
============  =============  ==========================================
"""

from __future__ import annotations

from torch import Tensor

from parallel.errors import UserError, brief

#: Checkpoint versions that exist.
VERSIONS = (0.0, 1.0, 2.0, 3.0)


def check_version(version: float, where: str) -> float:
    """The version, if there is such a one.

    Raises:
        UserError: there is not; ``where`` names what has it.
    """
    if version not in VERSIONS:
        raise UserError(
            f"{where} has checkpoint version {brief(version)}, but only 0, 1.0, 2.0 and 3.0 are known: "
            "if you know the order of its rows, give it with --source-checkpoint-version"
        )
    return float(version)


def to_canonical(rows: Tensor, version: float, heads: int) -> Tensor:
    """Rows ``[3 A D, ..]`` of one rank in the order of a version, brought to ``[A, 3, D]``.

    Args:
        rows: weight or bias.
        version: of the checkpoint.
        heads: A, the heads of this rank.
    """
    if version == 0.0:
        return rows.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
    if version == 1.0:
        return rows.unflatten(0, (heads, -1, 3)).transpose(1, 2).flatten(0, 2)
    return rows


def from_canonical(rows: Tensor, version: float, heads: int) -> Tensor:
    """The inverse of :func:`to_canonical`."""
    if version == 0.0:
        return rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    if version == 1.0:
        return rows.unflatten(0, (heads, 3, -1)).transpose(1, 2).flatten(0, 2)
    return rows
