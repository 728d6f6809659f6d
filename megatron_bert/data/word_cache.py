# SPDX-License-Identifier: Apache-2.0
"""WordPiece of whole texts out of the ids of their words, most of which a text has many times."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

WORDS = 1 << 17
"""Words remembered; one takes about 200 bytes."""

#: Python's split() takes these for spaces, BERT's normalization removes them, which joins the words around them.
_OTHERWISE_SPACES = re.compile("[\x0b\x0c\x1c-\x1f\x85]")


def splits_at_spaces(description: Mapping[str, Any]) -> bool:
    """Whether the ids of a text are those of its words at spaces, one after the other: BERT's WordPiece does that.

    Args:
        description: Of a tokenizer, as in its `tokenizer.json`.
    """
    normalizer, splitter = description["normalizer"] or {}, description["pre_tokenizer"] or {}
    return (
        description["model"].get("type") == "WordPiece"
        and normalizer.get("type") == "BertNormalizer"
        and normalizer.get("clean_text") is True
        and splitter.get("type") == "BertPreTokenizer"
        and all(token["special"] for token in description["added_tokens"])
    )


class WordCache:
    """Token ids of texts, each word of which is tokenized once.

    Args:
        encode: Gives token ids of several texts, for which `splits_at_spaces` holds.
    """

    def __init__(self, encode: Callable[[Sequence[str]], list[list[int]]]) -> None:
        self._encode = encode
        self._known: dict[str, list[int]] = {}

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts."""
        if any(map(_OTHERWISE_SPACES.search, texts)):
            return self._encode(texts)
        words_of = [text.split() for text in texts]
        new = list(set(chain.from_iterable(words_of)).difference(self._known))
        if len(self._known) + len(new) > WORDS:
            self._known.clear()
            new = list(set(chain.from_iterable(words_of)))
        self._known.update(zip(new, self._encode(new), strict=True))
        ids = self._known.__getitem__
        return [list(chain.from_iterable(map(ids, words))) for words in words_of]
