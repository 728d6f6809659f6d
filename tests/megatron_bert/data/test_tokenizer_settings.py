# SPDX-License-Identifier: Apache-2.0
"""A vocab.txt with transformers' tokenizer_config.json beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.family.tokenizer import save_tokenizer
from parallel.errors import UserError

from .support import SPECIAL, small_vocabulary

#: Every setting changes how TEXT is divided into these.
PIECES = ["hello", "Hello", "héllo", "world", "中", "文", "中文"]
TEXT = "Hello world héllo Héllo 中文"
SETTINGS = [
    {"do_lower_case": True},
    {"do_lower_case": False},
    {"do_lower_case": True, "strip_accents": False},
    {"do_lower_case": False, "strip_accents": True},
    {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": False},
    {"do_lower_case": False, "strip_accents": False, "tokenize_chinese_chars": True},
]


def write(folder: Path, settings: Any, pieces: list[str] = PIECES) -> Path:
    folder.mkdir(exist_ok=True)
    small_vocabulary(folder, pieces)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_ids_are_those_of_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path / "given", settings | {"tokenizer_class": "BertTokenizer"})
    expected = transformers.BertTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    vocabulary = load_tokenizer(folder)
    for path in (folder, folder / "vocab.txt"):
        assert load_tokenizer(path).encode(TEXT) == expected[1:-1]

    place = tmp_path / "saved"
    save_tokenizer(vocabulary, place)
    written = json.loads((place / "tokenizer_config.json").read_text(encoding="utf-8"))
    given = {"strip_accents": None, "tokenize_chinese_chars": True} | settings
    assert {name: written[name] for name in given} == given
    assert transformers.AutoTokenizer.from_pretrained(place)(TEXT)["input_ids"] == expected
    for path in (place, place / "vocab.txt"):
        assert load_tokenizer(path).fingerprint == vocabulary.fingerprint


def test_settings_divide_the_text_differently(tmp_path: Path) -> None:
    ids = [load_tokenizer(write(tmp_path, settings)).encode(TEXT) for settings in SETTINGS]
    assert len({tuple(found) for found in ids}) == len(SETTINGS) - 1, "the last says what is usual without lower case"
    assert ids[-1] == ids[1]


def test_without_the_setting_the_vocabulary_shows_it(tmp_path: Path) -> None:
    hello = len(SPECIAL)
    assert load_tokenizer(write(tmp_path, {"model_max_length": 512})).encode("Hello") == [hello + 1]
    assert load_tokenizer(write(tmp_path, {}, ["hello"])).encode("Hello") == [hello]


def test_what_is_asked_for_counts_before_the_file(tmp_path: Path) -> None:
    folder = write(tmp_path, {"do_lower_case": False, "strip_accents": False})
    assert load_tokenizer(folder, lowercase=True).encode("Hello Héllo") == [len(SPECIAL), len(SPECIAL) + 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "tokenizer_config.json is not JSON"),
        (b"\xff", "tokenizer_config.json is not JSON"),
        (b"[" * 100_000, "tokenizer_config.json is not JSON"),
        (b"[1]", "tokenizer_config.json holds a JSON list instead of an object"),
        (b'{"do_lower_case": "no"}', "do_lower_case is 'no': write true or false"),
        (b'{"do_lower_case": null}', "do_lower_case is None: write true or false"),
        (b'{"tokenize_chinese_chars": 1}', "tokenize_chinese_chars is 1: write true or false"),
    ],
)
def test_damaged_settings(content: bytes, message: str, tmp_path: Path) -> None:
    (write(tmp_path, {}) / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
