# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken

from megatron_bert.data import word_cache
from megatron_bert.data.vocabularies import Normalization, wordpiece
from megatron_bert.data.word_cache import WordCache, splits_at_spaces

from .support import SPECIAL, WORDS

#: Spaces of every kind, controls, marks, letters with two forms, signs, Chinese, halves of emoji sequences, [SEP].
CHARACTERS = [
    *"abABtheß çÅΣσς .,!-'\"$^`~@",
    *"\t\n\r\x0b\x0c\x1c\x1f\x7f\x85\xa0\u1680\u180e\u2003\u200b\u200d\u2028\u2029\u202f\u3000\ufeff\ufffd\x00\xad",
    *"́̈̂ेि",
    *"猫犬가각ーﬁİı\U0001f600\U0001f468\u200d\U0001f469𝐀",
    *("the", "cats", "[SEP]", "[UNK]", "##s", "running", "x" * 101),
]


def encoder(backend: tokenizers.Tokenizer):
    backend.encode_special_tokens = True
    return lambda texts: [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]


def described(backend: tokenizers.Tokenizer) -> Any:
    return json.loads(backend.to_str())


@pytest.mark.parametrize("lowercase", [True, False])
def test_ids_are_the_librarys(lowercase: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    letters = [character for character in CHARACTERS if len(character) == 1 and character.isprintable()]
    pieces = dict.fromkeys([*SPECIAL, *WORDS, *"çåσςßi猫犬", *letters, *(f"##{letter}" for letter in letters)])
    backend = wordpiece({piece: number for number, piece in enumerate(pieces)}, Normalization(lowercase))
    encode = encoder(backend)
    assert splits_at_spaces(described(backend))
    cached = WordCache(encode)
    monkeypatch.setattr(word_cache, "WORDS", 500)
    found = 0
    for _ in range(300):
        texts = ["".join(rng.choices([*CHARACTERS, " ", " "], k=rng.randint(0, 40))) for _ in range(rng.randint(0, 8))]
        ids = encode(texts)
        assert cached(texts) == ids
        found += sum(map(len, ids))
    assert found > 5000
    assert len(cached._known) <= 500 + 8 * 40


def test_only_where_words_stand_for_themselves(tmp_path: Path) -> None:
    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL, *WORDS])}
    backend = wordpiece(vocabulary, Normalization(True))
    backend.add_special_tokens(["[NEW]"])
    assert splits_at_spaces(described(backend))
    backend.add_tokens([AddedToken("the cat")])
    assert not splits_at_spaces(described(backend))
    backend = wordpiece(vocabulary, Normalization(True))
    backend.normalizer = tokenizers.normalizers.BertNormalizer(clean_text=False)
    assert not splits_at_spaces(described(backend))
    backend = wordpiece(vocabulary, Normalization(True))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    assert not splits_at_spaces(described(backend))
