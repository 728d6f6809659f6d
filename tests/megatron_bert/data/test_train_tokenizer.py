# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.data.train_tokenizer import train_tokenizer
from parallel.errors import UserError

KINDS = ["wordpiece", "sentencepiece", "bpe"]
SIZES = {"wordpiece": 300, "sentencepiece": 120, "bpe": 360}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Random words of a small syllabary, some of them capitalized."""
    rng = np.random.default_rng(0)
    syllables = ["ka", "to", "mi", "sé", "lun", "bra", "der", "po", "xi", "wa", "gre", "fu", "hy", "vo", "jaz", "quin"]
    words = ["".join(rng.choice(syllables, size=rng.integers(1, 4))) for _ in range(200)]
    with (tmp_path / "text.jsonl").open("w") as file:
        for _ in range(200):
            line = " ".join(word.title() if rng.random() < 0.2 else word for word in rng.choice(words, size=20))
            file.write(json.dumps({"text": f"{line}.\n{line}, 1 2 3 4 5 6 7 8 9 0!"}) + "\n")
    return tmp_path / "text.jsonl"


def train(text: Path, kind: str, output: str, **options: Any) -> Any:
    size = options.pop("vocab_size", SIZES.get(kind, 300))
    return train_tokenizer([text], kind, size, text.parent / output, progress=False, **options)  # type: ignore[arg-type]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", KINDS)
def test_training_gives_a_usable_tokenizer_of_the_size_asked(text: Path, kind: str) -> None:
    tokenizer = train(text, kind, "out")
    assert tokenizer.vocab_size == SIZES[kind]
    assert load_tokenizer(text.parent / "out").fingerprint == tokenizer.fingerprint
    names = {
        "wordpiece": ["tokenizer.json", "vocab.txt"],
        "sentencepiece": ["tokenizer.model"],
        "bpe": ["tokenizer.json"],
    }
    assert list(content(text.parent / "out")) == names[kind]
    sample = json.loads(text.read_text().splitlines()[0])["text"].split("\n")[0].lower()
    ids = tokenizer.encode(sample)
    assert tokenizer.unk_id not in ids
    assert len(ids) < 0.6 * len(sample), "words are learned, not letters"
    if kind != "wordpiece":  # which strips accents
        assert tokenizer.decode(ids).strip() == sample
    words = "".join(" " * bool(tokenizer.word_starts[i]) + tokenizer.id_to_token(i).strip("#\u0120\u2581") for i in ids)
    assert len(words.split()) >= len(sample.split())


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_deterministic(text: Path, kind: str) -> None:
    train(text, kind, "one")
    train(text, kind, "two")
    assert content(text.parent / "one") == content(text.parent / "two")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cased", [True, False])
def test_case_is_kept_or_folded(text: Path, kind: str, cased: bool) -> None:
    tokenizer = train(text, kind, "out", cased=cased)
    pieces = [tokenizer.id_to_token(i) for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
    assert (tokenizer.encode("Kato") == tokenizer.encode("kato")) is not cased
    if kind != "bpe":  # whose alphabet of bytes holds all letters
        assert any(piece != piece.lower() for piece in pieces) is cased


def test_wordpiece_files_agree(text: Path) -> None:
    train(text, "wordpiece", "out")
    folder = text.parent / "out"
    assert load_tokenizer(folder / "vocab.txt").fingerprint == load_tokenizer(folder / "tokenizer.json").fingerprint
    lines = (folder / "vocab.txt").read_text().splitlines()
    assert lines[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert "##a" in lines
    assert "a" in lines
    assert not [line for line in lines if "\U0010fffd" in line]


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_do_not_fit_the_text(text: Path, kind: str) -> None:
    for size in (12, 100_000):
        with pytest.raises(UserError, match=f"vocab_size {size}"):
            train(text, kind, "out", vocab_size=size)
    with pytest.raises(UserError, match="vocab_size 5 is too small"):
        train(text, kind, "out", vocab_size=5)
    assert not (text.parent / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_at_most_a_size(text: Path, kind: str) -> None:
    tokenizer = train(text, kind, "out", vocab_size=100_000, at_most=True)
    assert SIZES[kind] < tokenizer.vocab_size < 2_000
    if kind != "sentencepiece":  # whose training removes pieces until there are few enough
        assert content(text.parent / "out") == content(train_again(text, kind, tokenizer.vocab_size))
    assert train(text, kind, "fits", at_most=True).vocab_size <= SIZES[kind]
    with pytest.raises(UserError, match="vocab_size 12"):
        train(text, kind, "small", vocab_size=12, at_most=True)
    assert not (text.parent / "small").exists()


def train_again(text: Path, kind: str, size: int) -> Path:
    train(text, kind, "again", vocab_size=size)
    return text.parent / "again"


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_cannot_be_used(text: Path, kind: str) -> None:
    with pytest.raises(UserError, match=r'text\.jsonl line 1 has no key "body"'):
        train(text, kind, "out", json_key="body")
    text.write_text("\n\n")
    with pytest.raises(UserError, match="No text was found"):
        train(text, kind, "out")
    with pytest.raises(UserError, match=r"gone\.txt does not exist"):
        train(text.parent / "gone.txt", kind, "out")


def test_mistaken_arguments(text: Path) -> None:
    with pytest.raises(UserError, match='type "unigram" is unknown'):
        train(text, "unigram", "out")
    with pytest.raises(UserError, match="is a file"):
        train(text, "bpe", "text.jsonl")
    with pytest.raises(UserError, match="nothing to train"):
        train_tokenizer([], "bpe", 300, text.parent / "out")


def test_very_long_lines_are_not_lost(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("kato mise luna braw " * 20_000)
    tokenizer = train_tokenizer([tmp_path / "x.txt"], "sentencepiece", 24, tmp_path / "out", progress=False)
    assert len(tokenizer.encode("kato mise luna braw")) <= 8
