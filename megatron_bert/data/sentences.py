# SPDX-License-Identifier: Apache-2.0
"""Splitting text into sentences."""

import re
from collections.abc import Callable
from functools import cache, lru_cache, partial
from itertools import pairwise
from typing import Literal, get_args

import punkt
import sentencex

from parallel.errors import UserError

SplitterName = Literal["sentencex", "punkt"]
"""sentencex is closer to the labels of `benchmarks/sentence_splitting.py`, Punkt to the corpora NVIDIA's tool makes."""

Splitter = Callable[[str], list[str]]

PUNKT_MODELS = {
    "cs": "czech",
    "da": "danish",
    "de": "german",
    "el": "greek",
    "en": "english",
    "es": "spanish",
    "et": "estonian",
    "fi": "finnish",
    "fr": "french",
    "it": "italian",
    "ml": "malayalam",
    "nl": "dutch",
    "no": "norwegian",
    "pl": "polish",
    "pt": "portuguese",
    "ru": "russian",
    "sl": "slovene",
    "sv": "swedish",
    "tr": "turkish",
}
"""Punkt's models by ISO 639 code: the ones of NLTK, which NVIDIA's preprocessing uses."""

_INSIDE_WORD = re.compile(r"[A-Z0-9]\.[A-Za-z0-9]|[a-z]\.[a-z0-9]")
"""A full stop in a word of the Latin script; "end.Then" rather lacks a space."""

CACHED = 1 << 17
"""Decisions remembered; a word and its neighbor take about 200 bytes."""


def check_splitter(name: str, language: str) -> None:
    """Refuse a splitter that cannot be used for a language.

    Raises:
        UserError: an unknown name, what is not a language's code, or Punkt for a language it has no model of.
    """
    if not re.fullmatch("[a-z]{2,3}", language):
        raise UserError(f'Language "{language}" is not an ISO 639 code of two or three letters, such as en.')
    if name not in get_args(SplitterName):
        raise UserError(f'Sentence splitter "{name}" is unknown: choose {" or ".join(get_args(SplitterName))}.')
    if name == "punkt" and language not in PUNKT_MODELS:
        raise UserError(
            f'Sentence splitter punkt has no model of language "{language}": it knows {", ".join(PUNKT_MODELS)}; '
            f"use sentencex."
        )


@cache
def sentence_splitter(name: SplitterName, language: str) -> Splitter:
    """A function from a text to its sentences, without the space around them.

    A line end ends a sentence whatever the splitter thinks: titles and list items carry no full stop.

    Args:
        language: ISO 639 code; sentencex treats codes it does not know by general rules.
    """
    if name == "punkt":
        return _by_line(PunktSplitter(PUNKT_MODELS[language]))
    return _by_line(partial(_by_sentencex, language))


def _by_line(split: Splitter) -> Splitter:
    return lambda text: [sentence for line in text.split("\n") if line.strip() for sentence in split(line)]


def _by_sentencex(language: str, line: str) -> list[str]:
    """The library's sentences, without the ends it sees inside words such as "Sino-U.S." and "AMAZON.COM"."""
    sentences: list[list[str]] = []
    for part in sentencex.segment(language, line):
        if sentences and _INSIDE_WORD.fullmatch(sentences[-1][-1][-2:] + part[:1]):
            sentences[-1].append(part)
        else:
            sentences.append([part])
    return ["".join(parts).strip() for parts in sentences]


class PunktSplitter:
    """Punkt (Kiss and Strunk 2006) with the library's own decisions, remembered.

    Whether a sentence ends in a word depends on that word and the next one, mostly on the word alone. The library is
    asked once for each, which gives the same sentences several times as fast.
    """

    #: From the first mark in a word that could end a sentence to the word after it.
    _MARK = re.compile(r"([.?!]\S*+)(?:\s+(?=(\S+))|\s*$)")
    #: A word of letters with a single mark after it, and one that it does not depend on.
    _PLAIN = re.compile(r"[^\w.?!]*([^\W\d_]{2,})[.?!][^\w.?!]*")
    _ORDINARY = re.compile(r"[\"'“‘(\[]{0,2}\w")
    #: Words are distinguished by the space character alone.
    _OTHER_SPACE = re.compile(r"[^\S ]")
    #: Binds what stands around it together. Dashes and signs do not.
    _PUNCTUATION_ONLY = re.compile(r"[^\w\s\-–—*#&/+=<>%$£€@~^|]+")

    def __init__(self, model: str) -> None:
        parameters = punkt.load_model(model)
        self._library = punkt.PunktSentenceTokenizer(parameters)
        # What follows matters after abbreviations, initials, numbers, ellipses and these.
        firsts = {first for first, _ in parameters.collocations}
        self._dependent = parameters.abbrev_types | parameters.numeric_abbrev_types | firsts
        self._after_word = lru_cache(CACHED)(self._decide_by_word)
        self._after_pair = lru_cache(CACHED)(self._decide)

    def __call__(self, text: str) -> list[str]:
        """The sentences of a text, without the space around them."""
        text = text.strip()
        if self._OTHER_SPACE.search(text):
            return self._library.tokenize(text)
        sentences, begin = [], 0
        for match in self._MARK.finditer(text):
            word_start = text.rfind(" ", 0, match.start()) + 1
            word, following = text[word_start : match.end(1)], match[2] or ""
            cuts = self._after_word(word) if self._ORDINARY.match(following) else None
            cuts = self._after_pair(word, following) if cuts is None else cuts
            if cuts is None:
                return self._library.tokenize(text)
            for end, start in cuts:
                sentences.append(text[begin : word_start + end])
                begin = match.end() if start > len(word) else word_start + start
        if begin < len(text):
            sentences.append(text[begin:])
        return sentences

    def _decide_by_word(self, word: str) -> tuple[tuple[int, int], ...] | None:
        """As `_decide` before any ordinary word; None if it depends on that word."""
        plain = self._PLAIN.fullmatch(word)
        if plain is None or plain[1].lower() in self._dependent:
            return None
        return self._decide(word, "Next")

    def _decide(self, word: str, following: str) -> tuple[tuple[int, int], ...] | None:
        """Where sentences end, and the next ones start, in a word and the space after it; None if more is needed."""
        pair = f"{word} {following}"
        if any(self._PUNCTUATION_ONLY.fullmatch(part) for part in pair.split()):
            return None
        spans = list(self._library.span_tokenize(pair))
        cuts = ((before[1], after[0]) for before, after in pairwise(spans))
        return tuple(cut for cut in cuts if cut[0] <= len(word))
