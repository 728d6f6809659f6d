# SPDX-License-Identifier: Apache-2.0
"""Exact match and F1 of answers, with the meaning of SQuAD's official scripts, in per cent as they report them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Judged(NamedTuple):
    """A question as the metrics need it.

    Attributes:
        golds: the right answers; () where there is none.
        answer: the answer given; "" for none.
        best_answer: the best answer that is not "no answer".
        null_odds: score of no answer less that of `best_answer`.
    """

    golds: tuple[str, ...]
    answer: str
    best_answer: str
    null_odds: float


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and articles, white space as single spaces."""
    without = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", without).split())


def exact_match(gold: str, answer: str) -> float:
    """1 where the normalized answers are equal."""
    return float(normalize_answer(gold) == normalize_answer(answer))


def token_f1(gold: str, answer: str, *, no_answer: bool) -> float:
    """F1 of the words two answers share.

    Without a word on one side it is 0 in the script of version 1.1, and whether both have none in that of 2.0.
    """
    left, right = normalize_answer(gold).split(), normalize_answer(answer).split()
    if no_answer and not (left and right):
        return float(left == right)
    same = (Counter(left) & Counter(right)).total()
    if not same:
        return 0.0
    precision, recall = same / len(right), same / len(left)
    return 2 * precision * recall / (precision + recall)


def best_scores(golds: Sequence[str], answer: str, *, no_answer: bool) -> tuple[float, float]:
    """Exact match and F1 against the right answer that suits best."""
    if no_answer:
        golds = [gold for gold in golds if normalize_answer(gold)] or [""]
    exact = max(exact_match(gold, answer) for gold in golds)
    return exact, max(token_f1(gold, answer, no_answer=no_answer) for gold in golds)


def expected_f1(answers: Sequence[str], chances: np.ndarray) -> np.ndarray:
    """The F1 to expect of each answer when one of them is right: minimum Bayes risk (Goel and Byrne, 2000).

    Args:
        answers: n possible answers.
        chances: [n], how likely each is the right one; what is left of 1 is for an answer that shares no word.

    Returns:
        float64 [n], 0 to 1. An answer without words has 0, as in version 1.1.
    """
    words = [Counter(normalize_answer(answer).split()) for answer in answers]
    places = {word: place for place, word in enumerate(sorted(set().union(*words)))}
    counts = np.zeros((len(answers), len(places)))
    for row, found in enumerate(words):
        counts[row, [places[word] for word in found]] = list(found.values())
    lengths = counts.sum(axis=1)
    expected = np.zeros(len(answers))
    # One answer against all others at a time: all pairs at once are [n, n, words].
    for row, (own, length) in enumerate(zip(counts, lengths, strict=True)):
        shared = np.minimum(counts, own).sum(axis=1)
        expected[row] = np.dot(2.0 * shared / np.maximum(lengths + length, 1.0), chances)
    return expected


def squad_metrics(judged: Sequence[Judged], *, no_answer: bool) -> dict[str, float]:
    """f1 and exact_match, 0 to 100.

    With `no_answer` as in version 2.0: also HasAns_ and NoAns_ of the questions with and without answer (where there
    are any), and best_f1 and best_exact at the thresholds that suit these very questions best.
    """
    scores = [best_scores(item.golds, item.answer, no_answer=no_answer) for item in judged]
    found = _means("", scores, "exact_match")
    if no_answer:
        for prefix, wanted in (("HasAns_", True), ("NoAns_", False)):
            part = [score for item, score in zip(judged, scores, strict=True) if bool(item.golds) == wanted]
            if part:
                found |= _means(prefix, part, "exact")
        found |= {"best_f1": best_threshold(judged, "f1")[0], "best_exact": best_threshold(judged, "exact")[0]}
    return found


def best_threshold(judged: Sequence[Judged], measure: str) -> tuple[float, float]:
    """The best "f1" or "exact" that any threshold on `null_odds` gives, and that threshold.

    A question has no answer when its odds exceed the threshold. As in the official script questions get their answers
    one after the other, those with the least odds first; the threshold is the odds of the last of them, or less than
    all odds where it is best to answer none (the script says 0 there).
    """
    place = ("exact", "f1").index(measure)
    current = best = float(sum(not item.golds for item in judged))
    threshold = min((item.null_odds for item in judged), default=0.0) - 1.0
    for item in sorted(judged, key=lambda item: item.null_odds):
        if item.golds:
            current += best_scores(item.golds, item.best_answer, no_answer=True)[place]
        elif item.best_answer:
            current -= 1.0
        if current > best:
            best, threshold = current, item.null_odds
    return 100.0 * best / max(1, len(judged)), threshold


def _means(prefix: str, scores: Sequence[tuple[float, float]], exact_name: str) -> dict[str, float]:
    exact, f1 = (100.0 * sum(column) / len(scores) for column in zip(*scores, strict=True))
    return {f"{prefix}f1": f1, f"{prefix}{exact_name}": exact}
