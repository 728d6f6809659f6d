# SPDX-License-Identifier: Apache-2.0
"""What runs a plan, behind one interface.

Every backend gives the same bits: those of the specification.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from megatron_bert.ibert.engine.plan import Plan

HeadName = Literal["pooler", "classifier", "pair", "masked"]


class Executable(Protocol):
    """A plan made ready by a backend."""

    def encode(self, tokens: Tensor, positions: Tensor, types: Tensor, starts: Tensor) -> Tensor:
        """Run the encoder on sequences that stand end to end.

        Args:
            tokens, positions, types: int32 ``[T]``, within their tables.
            starts: int32 ``[B + 1]``, where each sequence begins, and T.

        Returns:
            int16 ``[T, H]``, the final stream, on the backend's device.
        """
        ...

    def head(self, name: HeadName, rows: Tensor) -> Tensor:
        """Run a head of the plan.

        Args:
            name: of it.
            rows: int16 ``[R, H]``, of the final stream, or for a classifier after a pooler of its result.

        Returns:
            int32 ``[R, outputs]`` logits of scale 2^-12; of the pooler int16 ``[R, H]`` of scale 2^-15.
        """
        ...


class Backend(Protocol):
    """A way to run plans.

    Attributes:
        name: of it.
        prepare_file: the same from a plan's file; None where a backend needs its tensors.
    """

    name: str

    @property
    def prepare_file(self) -> Callable[[Path, int | None], Executable] | None:
        """See the attributes."""
        ...

    def prepare(self, plan: Plan, threads: int | None = None) -> Executable:
        """Make a plan ready.

        Args:
            plan: checked.
            threads: to use; None leaves it to the backend.

        Raises:
            UserError: this machine cannot run it.
        """
        ...
