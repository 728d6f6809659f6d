# SPDX-License-Identifier: Apache-2.0
"""Windows over a text that is longer than a sequence, and answers found in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_bert.data.tokenizers import SpannedTokens
from megatron_bert.tasks.task import Instance
from parallel.errors import UserError


@dataclass(frozen=True)
class WindowInstance(Instance):
    """A window of the text of a question.

    Attributes:
        offset: position in the sequence of the window's first token of the text.
        spans: int32 [m, 2], begin and end in the text of each of its tokens of the text, in characters.
        widest: bool [m], whether no other window has more context around the token.
    """

    offset: int
    spans: np.ndarray
    widest: np.ndarray


class Candidate(NamedTuple):
    """A possible answer: its characters in the text and its scores."""

    begin: int
    end: int
    start_logit: float
    end_logit: float

    @property
    def score(self) -> float:
        """What candidates are ranked by."""
        return self.start_logit + self.end_logit


def check_stride(stride: int, room: int, where: str) -> None:
    """Refuse windows that would leave out text between them.

    Args:
        stride: tokens by which a window moves on.
        room: tokens of the text in a window.
        where: what gives it this room, for the message.

    Raises:
        UserError: the stride is more than the room.
    """
    if stride > room:
        raise UserError(
            f"task.doc_stride {stride} would leave out text, for a window has room for {room} tokens of it with "
            f"{where}: set it to {room} or less"
        )


def windows(tokens: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Begin and end of windows over some tokens, of at most `room` each, that move on by `stride`; at least one."""
    found = []
    begin = 0
    while True:
        end = min(begin + room, tokens)
        found.append((begin, end))
        if end == tokens:
            return found
        begin += min(room, stride)


def widest_context(places: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """For each window whether its tokens have the widest context in it, bool arrays of the windows' lengths.

    As in BERT: the context of a token is the lesser of the numbers of tokens at its left and right, with the window's
    length to decide between equals, and the first window after that.
    """
    if not places:
        return []
    tokens = places[-1][1]
    best = np.full(tokens, -1.0)
    chosen = np.zeros(tokens, dtype=np.int64)
    for number, (begin, end) in enumerate(places):
        position = np.arange(end - begin)
        score = np.minimum(position, position[::-1]) + 0.01 * (end - begin)
        better = score > best[begin:end]
        best[begin:end][better] = score[better]
        chosen[begin:end][better] = number
    return [chosen[begin:end] == number for number, (begin, end) in enumerate(places)]


def answer_tokens(found: SpannedTokens, begin: int, end: int) -> tuple[int, int] | None:
    """First and last token that share a character with text[begin:end]; None where normalization removed them all."""
    inside = [place for place, (b, e) in enumerate(found.spans) if b < e and e > begin and b < end]
    return (inside[0], inside[-1]) if inside else None


def candidates(instance: WindowInstance, logits: np.ndarray, longest: int, count: int) -> list[Candidate]:
    """The best answers in a window, best first.

    An answer has at most `longest` tokens, begins at a token with its widest context in this window, and begins and
    ends at tokens with characters. All such pairs are compared, unlike in BERT, which pairs the best starts and ends.

    Args:
        logits: finite, [n, 2], start and end scores of the sequence's tokens.
        longest: tokens of the longest answer.
        count: how many to return at most.
    """
    size = len(instance.spans)
    scores = logits[instance.offset : instance.offset + size]
    has_text = instance.spans[:, 0] < instance.spans[:, 1]
    starts = np.where(has_text & instance.widest, scores[:, 0], -np.inf)
    ends = np.where(has_text, scores[:, 1], -np.inf)
    longest = min(longest, size)
    if not size:
        return []
    padded = np.concatenate([ends, np.full(longest - 1, -np.inf)])
    sums = starts[:, None] + np.lib.stride_tricks.sliding_window_view(padded, longest)  # [start, length - 1]
    flat = sums.ravel()
    order = np.argpartition(-flat, min(count, flat.size - 1))[:count] if flat.size > count else np.arange(flat.size)
    order = order[np.isfinite(flat[order])]
    order = order[np.lexsort((order, -flat[order]))]
    first, length = np.divmod(order, longest)
    last = first + length
    return [
        Candidate(int(instance.spans[i, 0]), int(instance.spans[j, 1]), float(scores[i, 0]), float(scores[j, 1]))
        for i, j in zip(first, last, strict=True)
    ]
