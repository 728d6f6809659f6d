# SPDX-License-Identifier: Apache-2.0
"""Who is missing when ranks wait in vain: each leaves signs of life in the store where the ranks have met.

A rank says what it is at with :func:`sign`. When a collective fails on one, it raises an alarm in the store; a thread
of every rank answers it, prints the stacks of its process, and says whether its main thread waits for others, too. Who
does not answer, has failed, or is busy elsewhere, is the one that is missing.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from parallel.errors import NamesArgumentsError, UserError, brief
from parallel.hosts import host_name, process_runs

if TYPE_CHECKING:
    import torch.distributed as dist

#: Seconds between two looks for an alarm, and for which answers to it are waited for.
POLL_SECONDS, ANSWER_SECONDS = 1.0, 5.0
#: What torch says on a rank whose partner is gone: that is where the failure arrived, not where it began.
_LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|closed by peer|broken pipe|socket|timed? ?out|nccl|gloo|"
    r"remote process|store|heartbeat",
    re.IGNORECASE,
)
#: What is a rank's own trouble, although torch raises it as one of the network.
_OWN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
_TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)
_NETWORK_ERRORS = {"DistBackendError", "DistNetworkError", "DistStoreError"}
_STDERR = 2


class LostRankError(NamesArgumentsError, RuntimeError):
    """Other ranks of the run are missing.

    Attributes:
        ranks: which.
    """

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message, ranks)
        self.ranks = ranks


def comes_from_others(kind: str, message: str) -> bool:
    """Whether an error, by the name of its type and its words, says that another rank is missing."""
    if _OWN.search(message):
        return False
    return kind in _NETWORK_ERRORS or (kind == "RuntimeError" and _LOST.search(message) is not None)


def root_cause(error: BaseException) -> BaseException:
    """The first error that an error came from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


_current: Presence | None = None


def sign(what: str | None = None) -> None:
    """This rank works, at what is named, or still at what it said before; nothing where no world is watched."""
    if _current is not None:
        _current.sign(what)


class Presence:
    """Watches over a world of ranks while the block lasts; an error that comes from others is explained at its end.

    Args:
        store: that all ranks know, and no other world uses.
        timeout_seconds: how long collectives wait. A rank that gives no sign for longer prints its stacks.

    Raises:
        LostRankError: in place of an error that says only that others are missing.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout_seconds: float) -> None:
        # Connections of their own: one that waits must not hold up the others, nor those of torch.
        self._signs, self._answers, self._questions = (_connection(store) for _ in range(3))
        self.rank, self.size, self.timeout = rank, size, timeout_seconds
        self._what, self._count = "the start", 0
        self._main = threading.main_thread().ident
        self._over = threading.Event()
        self._answering = threading.Thread(target=self._answer, name="presence", daemon=True)

    def __enter__(self) -> Self:
        global _current
        self.sign()
        self._answering.start()
        _current = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        _current = None
        faulthandler.cancel_dump_traceback_later()
        try:
            if error is not None:
                self._explain(error)
        finally:
            self._over.set()
            self._answering.join(POLL_SECONDS)

    def sign(self, what: str | None = None) -> None:
        """This rank works."""
        self._what, self._count = what or self._what, self._count + 1
        faulthandler.dump_traceback_later(self.timeout, file=_STDERR)
        with suppress(RuntimeError):  # a store that is gone is found out where it matters
            self._post(self._signs, "sign", {"what": self._what, "count": self._count})

    def _post(self, store: dist.Store, key: str, values: dict[str, Any]) -> None:
        mine = {"host": host_name(), "pid": os.getpid(), "time": time.time()}
        store.set(f"{key}/{self.rank}", json.dumps(mine | values))

    def _answer(self) -> None:
        """Wait for an alarm, and answer it once."""
        with suppress(RuntimeError):
            while not self._over.wait(POLL_SECONDS):
                if self._answers.check(["alarm"]):
                    frame = sys._current_frames().get(self._main or 0)
                    self._post(self._answers, "answer", {"busy": None if frame is None else _busy(frame)})
                    faulthandler.dump_traceback(file=_STDERR)
                    return

    def _explain(self, error: BaseException) -> None:
        """Say how this rank ends, and who is missing if the error comes from others.

        Raises:
            LostRankError: they are.
        """
        cause = root_cause(error)
        others = isinstance(error, Exception) and comes_from_others(type(cause).__name__, str(cause))
        late = others and _TIMED_OUT.search(str(cause)) is not None
        words = f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error)
        end = {
            "words": brief((words.strip() or type(error).__name__).splitlines()[0], 200),
            "others": others,
            "late": late,
        }
        found: list[LostRankError] = []

        def ask() -> None:
            with suppress(RuntimeError):
                self._post(self._questions, "end", end)
                if others:
                    found.extend(self._verdict())

        # In a thread, since a store whose process stands still does not answer.
        asking = threading.Thread(target=ask, name="missing ranks", daemon=True)
        asking.start()
        asking.join(2 * ANSWER_SECONDS if others else POLL_SECONDS)
        if others and (asking.is_alive() or not found) and self.rank != 0 and not self._store_answers(asking):
            found.append(LostRankError(f"rank 0 does not answer any more{_remedy([0], self.timeout)}", [0]))
        if found and found[0].ranks:
            raise found[0] from error

    def _store_answers(self, asking: threading.Thread) -> bool:
        """Whether the store, which rank 0 keeps where no launcher does, is there."""
        if asking.is_alive():
            return False
        try:
            return self._questions.check([f"end/{self.rank}"])
        except RuntimeError:
            return False

    def _verdict(self) -> list[LostRankError]:
        """Raise the alarm and wait for answers; what the first rank to have them makes of them, on all that ask."""
        store = self._questions
        store.set("alarm", "")
        until = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < until and not store.check(["verdict"]):
            heard, signs = self._read("end") | self._read("answer"), self._read("sign")
            if len(signs) == self.size and all(rank in heard or _gone(one) for rank, one in signs.items()):
                break
            time.sleep(0.1)
        mine = self._judge(self._read("end"), self._read("answer"), self._read("sign"))
        ranks, text = json.loads(store.compare_set("verdict", "", json.dumps(mine)))
        if self.rank == 0:
            time.sleep(POLL_SECONDS)  # others ask the store yet, which may be this process's
        return [LostRankError(text, ranks)]

    def _read(self, key: str) -> dict[int, dict[str, Any]]:
        names = {rank: f"{key}/{rank}" for rank in range(self.size)}
        store = self._questions
        return {rank: json.loads(store.get(name)) for rank, name in names.items() if store.check([name])}

    def _judge(
        self, ends: dict[int, dict[str, Any]], answers: dict[int, dict[str, Any]], signs: dict[int, dict[str, Any]]
    ) -> tuple[list[int], str]:
        """Ranks that are missing, and a sentence."""
        where = {rank: f"{one['host']} (process {one['pid']})" for rank, one in signs.items()}
        waited = any(end["late"] for end in ends.values())
        failed = [rank for rank, end in ends.items() if not end["others"]]
        silent = [rank for rank in range(self.size) if rank not in ends and rank not in answers]
        gone = [rank for rank in silent if rank in signs and _gone(signs[rank])]
        busy = [rank for rank, answer in answers.items() if rank not in ends and answer["busy"] is not None]
        # A thread that waits for a GPU, which waits for others, looks busy as well, but is as far as any.
        behind = min((signs[rank]["count"] for rank in busy), default=0)
        busy = [rank for rank in busy if signs[rank]["count"] == behind]
        late = [rank for rank, end in ends.items() if waited and not end["late"]]
        for ranks, says in (
            (failed, lambda rank: f"failed ({ends[rank]['words']})"),
            (gone, lambda rank: f"has died, and gave its last sign {_ago(signs[rank])}"),
            (silent, lambda rank: f"does not answer, and gave its last sign {_ago(signs[rank])}"),
            (busy, lambda rank: f"is busy at {answers[rank]['busy']} and gave its last sign {_ago(signs[rank])}"),
            (late, lambda rank: f"came too late, and gave its last sign {_ago(signs[rank])}"),
        ):
            if ranks:
                described = [f"rank {rank} on {where[rank]} {says(rank)}" for rank in ranks[:3] if rank in signs]
                more = [f"{len(ranks) - 3} more do the same"] if len(ranks) > 3 else []
                return ranks, "; ".join([*described, *more]) + _remedy(ranks, self.timeout if waited else None)
        return [], ""


def _remedy(ranks: list[int], waited: float | None) -> str:
    whose = f"its log (rank {ranks[0]})" if len(ranks) == 1 else "their logs"
    after = f", while others waited {waited:g} s ($timeout_seconds)" if waited is not None else ""
    return f"{after}: see {whose} and host; the same command goes on from the newest checkpoint"


def _gone(one: dict[str, Any]) -> bool:
    """Whether the process that gave a sign is on this host and has ended, if only as a zombie."""
    return one["host"] == host_name() and not process_runs(one["pid"])


def _ago(one: dict[str, Any]) -> str:
    return f"{max(0.0, time.time() - one['time']):.0f} s ago, at {one['what']}"


def _busy(frame: FrameType) -> str | None:
    """Where a thread is; None where it waits for other ranks."""
    name = frame.f_code.co_filename.replace(os.sep, "/")
    collective = "/torch/distributed/" in name and "/torch/distributed/tensor/" not in name
    if collective or (frame.f_code.co_filename, frame.f_code.co_name) in _WAITS:
        return None
    return f"{'/'.join(name.split('/')[-2:])}:{frame.f_lineno} in {frame.f_code.co_name}"


#: Functions of ours that wait for other ranks, by file and name.
_WAITS: set[tuple[str, str]] = set()


def waits_for_others(function: Any) -> Any:
    """Mark a function as one in which a rank waits for others."""
    _WAITS.add((function.__code__.co_filename, function.__code__.co_name))
    return function


def _connection(store: dist.Store) -> dist.Store:
    """A part of the store for signs, with a connection of its own."""
    from torch.distributed import PrefixStore  # the command line reads this module before it knows of a world

    own = PrefixStore("presence", store.clone())  # type: ignore[attr-defined]
    own.set_timeout(timedelta(seconds=ANSWER_SECONDS))
    return own
