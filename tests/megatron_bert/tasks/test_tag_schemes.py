# SPDX-License-Identifier: Apache-2.0
"""Tags: which entities they mark, and which sequences follow a scheme."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_bert.tasks.rows import RowError
from megatron_bert.tasks.tag_schemes import (
    PREFIXES,
    Scheme,
    WordSpan,
    all_tags,
    best_tags,
    check_tags,
    entities,
    entity_type,
    tags_of,
)

SPANS = [WordSpan(0, 1, "a"), WordSpan(1, 4, "a"), WordSpan(4, 6, "b"), WordSpan(7, 8, "b")]
WRITTEN = {
    "BIO": "B-a B-a I-a I-a B-b I-b O B-b",
    "BILOU": "U-a B-a I-a L-a B-b L-b O U-b",
    "IOBES": "S-a B-a I-a E-a B-b E-b O S-b",
    "IOB1": "I-a B-a I-a I-a I-b I-b O I-b",
}


@pytest.mark.parametrize("scheme", WRITTEN)
def test_entities_there_and_back(scheme: Scheme) -> None:
    tags = WRITTEN[scheme].split()
    assert tags_of(SPANS, 8, scheme) == tags
    assert entities(tags, scheme) == SPANS
    check_tags(tags, scheme)


def test_io_joins_neighbors_of_one_type() -> None:
    tags = ["I-a", "I-a", "I-b", "O", "I-b"]
    assert entities(tags, "IO") == [WordSpan(0, 2, "a"), WordSpan(2, 3, "b"), WordSpan(4, 5, "b")]
    check_tags(tags, "IO")


@pytest.mark.parametrize("scheme", PREFIXES)
def test_random_entities_come_back(scheme: Scheme) -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        spans, place = [], 0
        while place < 12:
            length = int(rng.integers(1, 4))
            # IO cannot tell neighbors of one type apart.
            name = str(rng.choice(["a", "b-c"]))
            if rng.random() < 0.6 and not (scheme == "IO" and spans and spans[-1].end == place):
                spans.append(WordSpan(place, min(place + length, 12), name))
            place += length
        tags = tags_of(spans, 12, scheme)
        assert entities(tags, scheme) == spans
        check_tags(tags, scheme)


@pytest.mark.parametrize("scheme", ["BIO", "BILOU", "IOBES"])
def test_all_sequences_of_three_tags(scheme: Scheme) -> None:
    """A sequence follows a scheme if and only if each tag may follow the one before, and the last may end."""
    opens, continues = {"BIO": ("", "I"), "BILOU": ("BI", "IL"), "IOBES": ("BI", "IE")}[scheme]
    for tags in itertools.product(all_tags({"a", "b"}, scheme), repeat=3):
        right = True
        for before, tag in itertools.pairwise(["O", *tags, "O"]):
            inside = before[0] in "BI" and before[1:] == tag[1:]
            if tag[0] in continues and not inside:
                right = False
            if before[0] in opens and not (inside and tag[0] in continues):
                right = False
        if right:
            check_tags(tags, scheme)
        else:
            with pytest.raises(RowError, match="does not follow"):
                check_tags(tags, scheme)


@pytest.mark.parametrize("scheme", PREFIXES)
def test_the_best_sequence_of_all_that_follow_the_scheme(scheme: Scheme) -> None:
    tags = all_tags({"a", "b"}, scheme)
    rng = np.random.default_rng(5)
    sequences = []
    for numbers in itertools.product(range(len(tags)), repeat=3):
        try:
            check_tags([tags[number] for number in numbers], scheme)
        except RowError:
            continue
        sequences.append(numbers)
    assert 1 < len(sequences) <= len(tags) ** 3
    differs = 0
    for _ in range(40):
        scores = rng.normal(size=(3, len(tags)))
        best = max(sequences, key=lambda numbers: sum(scores[place, number] for place, number in enumerate(numbers)))
        assert tuple(best_tags(scores, tags, scheme)) == best
        differs += best != tuple(scores.argmax(axis=1))
    assert (differs == 0) == (scheme == "IO")
    assert best_tags(np.zeros((0, len(tags))), tags, scheme) == []


def test_what_does_not_follow_the_scheme_marks_nothing() -> None:
    assert entities(["O", "I-a", "B-b", "I-a"], "BIO") == [WordSpan(2, 3, "b")]
    assert entities(["B-a", "O", "U-b"], "BILOU") == [WordSpan(2, 3, "b")]
    assert entities([], "BIO") == []


@pytest.mark.parametrize("tag", ["X-a", "L", "B-", "B-a-" * 0 + "BX", "", "o", "L-a", "BI-a", "-a"])
def test_unknown_tags(tag: str) -> None:
    with pytest.raises(RowError, match="none of BIO: expected O, B-TYPE, I-TYPE"):
        entity_type(tag, "BIO")
    assert entity_type("B-creative-work", "BIO") == "creative-work"


def test_the_first_wrong_tag_is_named() -> None:
    with pytest.raises(RowError, match='tag "I-a" of word 3 after O does not follow BIO'):
        check_tags(["B-a", "O", "I-a", "I-a"], "BIO")


def test_order_of_tags() -> None:
    assert all_tags({"b", "a"}, "BIO") == ("O", "B-a", "I-a", "B-b", "I-b")
    assert all_tags({"a"}, "BILOU") == ("O", "B-a", "I-a", "L-a", "U-a")
    assert all_tags({"a"}, "IO") == ("O", "I-a")
