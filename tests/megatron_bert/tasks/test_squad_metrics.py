# SPDX-License-Identifier: Apache-2.0
"""Exact match and F1 with the official scripts' meaning, on cases worked out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_bert.tasks.squad_metrics import (
    Judged,
    best_scores,
    best_threshold,
    exact_match,
    expected_f1,
    normalize_answer,
    squad_metrics,
    token_f1,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat,\n sat!", "cat sat"),
        ("a an the", ""),
        ("another theme, Anthem", "another theme anthem"),
        ("the-end", "theend"),  # punctuation goes before articles are looked for
        ("U.S.A.", "usa"),
        ("\u201cquoted\u201d \u2014 dash", "\u201cquoted\u201d \u2014 dash"),  # only ASCII punctuation goes
        ("\u00a0x\u3000y\u2009", "x y"),
        ("$3.5 million", "35 million"),
        ("'a' \"b\" (the) c", "b c"),
        ("\u0130stanbul", "i\u0307stanbul"),
        ("", ""),
    ],
)
def test_normalization(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


def test_exact_match() -> None:
    assert exact_match("The Cat", "cat.") == 1.0
    assert exact_match("the cat", "cats") == 0.0
    assert exact_match("the", "") == 1.0


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("the cat sat", "cat sat down", 2 * (2 / 3) * (2 / 2) / (2 / 3 + 2 / 2)),
        ("new york city", "york", 2 * 1 * (1 / 3) / (1 + 1 / 3)),
        ("x x y", "x x x", 2 * (2 / 3) * (2 / 3) / (4 / 3)),
        ("x", "y", 0.0),
        ("x y", "y x", 1.0),
    ],
)
@pytest.mark.parametrize("no_answer", [True, False])
def test_f1_of_words(gold: str, answer: str, expected: float, no_answer: bool) -> None:
    assert token_f1(gold, answer, no_answer=no_answer) == pytest.approx(expected)


def test_expected_f1_is_the_mean_over_the_right_answers() -> None:
    """Against F1 of each pair, with repeated words, the same answer in two spellings, and none without words."""
    random = np.random.default_rng(3)
    text = ["The", "cat", "sat", "on", "the", "mat,", "the", "mat", "sat", "on", "a", "cat.", "The"]
    spans = [sorted(random.integers(0, len(text) + 1, 2)) for _ in range(12)]
    answers = [" ".join(text[begin:end]) for begin, end in spans] + ["the", "", "cat", "Cat."]
    chances = random.dirichlet(np.ones(len(answers)))
    mean = [
        sum(chance * token_f1(gold, answer, no_answer=False) for gold, chance in zip(answers, chances, strict=True))
        for answer in answers
    ]
    np.testing.assert_allclose(expected_f1(answers, chances), mean, rtol=1e-12, atol=0)
    assert expected_f1(["", "the"], np.array([0.5, 0.5])).tolist() == [0.0, 0.0]


def test_f1_without_words_differs_between_the_versions() -> None:
    assert token_f1("the", "a", no_answer=False) == 0.0
    assert token_f1("the", "a", no_answer=True) == 1.0
    assert token_f1("", "", no_answer=True) == 1.0
    assert token_f1("", "x", no_answer=True) == token_f1("x", "", no_answer=True) == 0.0


def test_the_best_right_answer_counts_for_each_score() -> None:
    assert best_scores(["cat", "the black cat sat"], "cat", no_answer=False) == (1.0, 1.0)
    exact, f1 = best_scores(["the black cat sat", "dog ran"], "black cat", no_answer=False)
    assert (exact, f1) == (0.0, pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3)))
    # Version 2.0 leaves out right answers of which nothing remains.
    assert best_scores(["the", "cat"], "", no_answer=True) == (0.0, 0.0)
    assert best_scores(["the"], "", no_answer=True) == (1.0, 1.0)
    assert best_scores([], "cat", no_answer=True) == (0.0, 0.0)


def test_version_1() -> None:
    judged = [
        Judged(("cat",), "the cat", "", 0.0),
        Judged(("dog", "black dog"), "black", "", 0.0),
        Judged(("x",), "y", "", 0.0),
    ]
    assert squad_metrics(judged, no_answer=False) == {
        "f1": pytest.approx(100 * (1 + 2 / 3 + 0) / 3),
        "exact_match": pytest.approx(100 / 3),
    }


def test_version_2() -> None:
    judged = [
        Judged(("cat",), "cat", "cat", -3.0),
        Judged(("black dog",), "", "dog", 1.0),
        Judged((), "", "mat", 2.0),
        Judged((), "mat", "mat", -1.0),
    ]
    assert squad_metrics(judged, no_answer=True) == {
        "f1": 50.0,
        "exact_match": 50.0,
        "HasAns_f1": 50.0,
        "HasAns_exact": 50.0,
        "NoAns_f1": 50.0,
        "NoAns_exact": 50.0,
        # Answers in the order of their odds add 1, -1, 2/3, -1 to the 2 questions that are right without any.
        "best_f1": 75.0,
        "best_exact": 75.0,
    }
    assert best_threshold(judged, "f1") == (75.0, -3.0)
    only = squad_metrics(judged[:2], no_answer=True)
    assert [name for name in only if name.startswith("NoAns")] == []


def test_the_threshold_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        judged = []
        for odds in rng.normal(size=12):
            golds = ("cat sat",) if rng.random() < 0.6 else ()
            judged.append(Judged(golds, "", str(rng.choice(["cat", "cat sat", "dog"])), float(odds)))
        score, threshold = best_threshold(judged, "f1")
        tried = [min(item.null_odds for item in judged) - 1, *(item.null_odds for item in judged)]
        totals = {}
        for limit in tried:
            given = [item._replace(answer="" if item.null_odds > limit else item.best_answer) for item in judged]
            totals[limit] = squad_metrics(given, no_answer=True)["f1"]
        assert score == pytest.approx(max(totals.values()))
        assert totals[threshold] == pytest.approx(score)


def test_nothing_helps() -> None:
    judged = [Judged((), "", answer, odds) for answer, odds in itertools.product(["x"], [1.0, 2.0])]
    assert best_threshold(judged, "f1") == (100.0, 0.0)
