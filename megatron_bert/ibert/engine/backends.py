# SPDX-License-Identifier: Apache-2.0
"""The backends by name; adding one is a factory and a line in the table."""

from __future__ import annotations

from collections.abc import Callable

from megatron_bert.ibert.engine.backend import Backend
from parallel.errors import UserError


def _cpu() -> Backend:
    from megatron_bert.ibert.engine.cpu import CpuBackend

    return CpuBackend()


def _reference() -> Backend:
    from megatron_bert.ibert.engine.reference import ReferenceBackend

    return ReferenceBackend()


def _cuda() -> Backend:
    from megatron_bert.ibert.engine.cuda import CudaBackend

    return CudaBackend()


#: Backends by name, each made when it is asked for, which fails with a UserError where it cannot run.
BACKENDS: dict[str, Callable[[], Backend]] = {"cpu": _cpu, "reference": _reference, "cuda": _cuda}
#: In which order ``auto`` tries. One that is not among them has not run on its hardware yet, and must be named.
PREFERRED = ("cpu", "reference")


def backend_by_name(name: str, warn: Callable[[str], None] | None = None) -> Backend:
    """A backend.

    Args:
        name: of one, or ``auto`` for the fastest that runs here.
        warn: called with the reason why a faster one does not.

    Raises:
        UserError: there is none of that name, or it does not run here.
    """
    if name != "auto":
        if not isinstance(name, str) or name not in BACKENDS:
            raise UserError(f"backend is {name!r}: choose one of auto, {', '.join(BACKENDS)}")
        return BACKENDS[name]()
    reasons = []
    for each in (each for each in PREFERRED if each in BACKENDS):
        try:
            found = BACKENDS[each]()
        except UserError as error:
            reasons.append(str(error))
            continue
        if reasons and warn is not None:
            warn(f"{'; '.join(reasons)}: the {each} backend runs instead, with the same results")
        return found
    raise UserError(f"no backend runs here: {'; '.join(reasons)}")
