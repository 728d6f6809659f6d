# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random
from pathlib import Path

import punkt
import pytest

from benchmarks.sentence_splitting import labeled_documents, score
from megatron_bert.data.sentences import PUNKT_MODELS, PunktSplitter, check_splitter, sentence_splitter
from parallel.errors import UserError

#: What decides about ends of sentences, and what surrounds it.
TEXT = """
the he The He said Mr. Sgt. U.S. U.S Sino-U.S. Inc. Inc p. 5.) 3.5 $3. 10 No. no. J. K. A. e.g. i.e., etc.) "Go!" end."
it.' “Yes.” “No,” ” ') ! ?! ... . . wait... Wow!!! -- — - end.--Then AMAZON.COM word.Next U.S.). said.[1] #. vs. .NET »
...but Jan. 5, was!? co.'s re.-- x.”-- z.”) a.m. p.m. St. (See
"""
PARTS = TEXT.split()


@pytest.mark.parametrize("name", ["punkt", "sentencex"])
def test_abbreviations_and_names_do_not_end_sentences(name: str) -> None:
    split = sentence_splitter(name, "en")  # type: ignore[arg-type]
    assert split("Sino-U.S. trade grew. AMAZON.COM rose.") == ["Sino-U.S. trade grew.", "AMAZON.COM rose."]
    assert split("Mr. Smith of Acme Inc. left. He met U.S. officials.") == [
        "Mr. Smith of Acme Inc. left.",
        "He met U.S. officials.",
    ]
    assert split("A title\n\n  It cost 3.5 percent. \nThe end") == ["A title", "It cost 3.5 percent.", "The end"]
    assert split(" \n") == []


@pytest.mark.parametrize("name", ["punkt", "sentencex"])
def test_no_text_is_lost_or_cut_inside_a_word(name: str) -> None:
    rng, split = random.Random(1), sentence_splitter(name, "en")  # type: ignore[arg-type]
    for _ in range(500):
        text = " ".join(rng.choices(PARTS, k=rng.randint(1, 10)))
        assert "".join("".join(split(text)).split()) == "".join(text.split())


def test_a_missing_space_is_seen_through() -> None:
    assert sentence_splitter("sentencex", "en")("He left.Then it rained.") == ["He left.", "Then it rained."]


@pytest.mark.parametrize("model", ["english", "german"])
def test_remembered_decisions_are_the_librarys(model: str) -> None:
    library, mine = punkt.PunktSentenceTokenizer(punkt.load_model(model)), PunktSplitter(model)
    rng = random.Random(2)
    spaces = [" "] * 20 + ["  ", "\t", "\u00a0", ""]
    for _ in range(1500):
        text = "".join(rng.choice(PARTS) + rng.choice(spaces) for _ in range(rng.randint(1, 9)))
        assert mine(text) == library.tokenize(text.strip()), text


def test_the_default_is_the_closer_to_the_labels() -> None:
    sections = labeled_documents(Path(__file__).parents[3] / "benchmarks" / "sentence_splitting.txt")
    assert sum(len(document) for documents in sections.values() for document in documents) == 160
    for documents in sections.values():
        ours, theirs = (score(sentence_splitter(name, "en"), documents) for name in ("sentencex", "punkt"))
        assert ours["f1"] > max(0.9, theirs["f1"])
        assert theirs["documents_as_nltk"] == 1


def test_every_model_is_there() -> None:
    for language in PUNKT_MODELS:
        check_splitter("punkt", language)
    assert set(PUNKT_MODELS.values()) == {name for name in punkt.available_languages() if "_" not in name}


@pytest.mark.parametrize(
    ("name", "language", "message"),
    [
        ("moses", "en", 'Sentence splitter "moses" is unknown: choose sentencex or punkt'),
        ("punkt", "ja", "no model of"),
        ("sentencex", "english", "not an ISO 639 code"),
    ],
)
def test_mistakes_are_explained(name: str, language: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_splitter(name, language)
