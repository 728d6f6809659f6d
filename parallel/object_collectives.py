# SPDX-License-Identifier: Apache-2.0
"""Python objects between ranks: work that rank 0 does for all, and what each of them gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from parallel.errors import UserError

T = TypeVar("T")


def on_first_rank(work: Callable[[], T]) -> T:
    """Run a function on rank 0 and give its result to every rank; every rank calls.

    What goes wrong on rank 0 is raised on all of them, so that none waits for the others.

    Args:
        work: returns what can be pickled.

    Raises:
        UserError: the work raised one, or a file could not be read or written.
    """
    answer: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            answer = [work(), None]
        except UserError as error:
            answer = [None, error]
        except OSError as error:
            answer = [None, UserError(f"cannot use {error.filename or 'a file'}: {error.strerror or error}")]
        except Exception as error:
            failure = error
            answer = [None, UserError(f"rank 0 failed: {type(error).__name__}: {error}")]
    dist.broadcast_object_list(answer)
    if failure is not None:
        raise failure
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def gather_objects(mine: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """What each rank of a group, of the run for None, gives, in the order of ranks; every rank of it calls."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def gather_on_first(mine: T) -> list[T]:
    """What each rank of the run gives, in the order of ranks, on rank 0; nothing on others. Every rank calls."""
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyone)
    return everyone or []
