"""What runs a plan, behind one interface.

Every backend gives the same bits: those of the specification.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from torch import Tensor

from megatron_bert.ibert.engine.plan import Plan
from parallel.errors import UserError

HeadName = Literal["pooler", "classifier", "pair", "masked"]


class Executable(Protocol):
    """A plan made ready by a backend."""

    def encode(self, tokens: Tensor, positions: Tensor, types: Tensor, starts: Tensor) -> Tensor:
        """Run the encoder on sequences that stand end to end.

        Args:
            tokens, positions, types: int32 ``[T]``, within their tables.
            starts: int32 ``[B + 1]``, where each sequence begins, and T.

        Returns:
            int16 ``[T, H]``, the final stream.
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
    """

    name: str

    def prepare(self, plan: Plan, threads: int | None = None) -> Executable:
        """Make a plan ready.

        Args:
            plan: checked.
            threads: to use; None leaves it to the backend.

        Raises:
            UserError: this machine cannot run it.
        """
        ...


def _reference() -> Backend:
    from megatron_bert.ibert.engine.reference import ReferenceBackend

    return ReferenceBackend()


def _cpu() -> Backend:
    from megatron_bert.ibert.engine.cpu import CpuBackend

    return CpuBackend()


#: Backends by name, each made when it is asked for, which fails with a UserError where it cannot run.
BACKENDS: dict[str, Callable[[], Backend]] = {"cpu": _cpu, "reference": _reference}
#: In which order ``auto`` tries.
_PREFERRED = ("cpu", "reference")


def backend_by_name(name: str, warn: Callable[[str], None] | None = None) -> Backend:
    """A backend.

    Args:
        name: of one, or ``auto`` for the fastest that runs here.
        warn: told why a faster one does not.

    Raises:
        UserError: there is none of that name, or it does not run here.
    """
    if name != "auto":
        if name not in BACKENDS:
            raise UserError(f"backend is {name!r}: choose one of auto, {', '.join(BACKENDS)}")
        return BACKENDS[name]()
    reasons = []
    for each in (each for each in _PREFERRED if each in BACKENDS):
        try:
            found = BACKENDS[each]()
        except UserError as error:
            reasons.append(str(error))
            continue
        if reasons and warn is not None:
            warn(f"{'; '.join(reasons)}: the {each} backend runs instead, with the same results")
        return found
    raise UserError(f"no backend runs here: {'; '.join(reasons)}")
