# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from transformers import BertTokenizerFast

from megatron_bert.data.tokenizers import Tokenizer, character_spans, load_tokenizer
from megatron_bert.data.train_tokenizer import train_tokenizer
from parallel.errors import UserError

from .support import SPECIAL, WORDS, small_vocabulary

LETTERS = [chr(code) for code in range(33, 127) if chr(code) not in "[]"]
UNICODE = [
    "Héllo wörld — naïve café",
    "中文字 and 日本 ﬁne",
    "zero\u200bwidth\x00 nul\ufffd \u00a0space\u3000wide\ttab\r\nline",
    "İstanbul ÅNGSTRÖM ǅ Straße",
    "👩‍👩‍👧 emoji 𝔘nicode e\u0301 cafe\u0301",
    "don't stop-it (now) [SEP] x_y $5.00",
    "a" * 101 + " " + "b" * 100,
    "",
    "   ",
]


def unicode_vocabulary(folder: Path, cased: bool) -> Path:
    characters = sorted({c for text in UNICODE for c in (text + text.lower()) if c.strip() and c.isprintable()})
    alphabet = list(dict.fromkeys([*LETTERS, "[", "]", *characters]))
    if not cased:
        alphabet = [c for c in alphabet if c == c.lower()]
    return small_vocabulary(folder, alphabet + [f"##{c}" for c in alphabet] + ["world", "##llo", "cafe"])


@pytest.mark.parametrize("cased", [True, False])
def test_wordpiece_agrees_with_transformers(tmp_path: Path, cased: bool) -> None:
    path = unicode_vocabulary(tmp_path, cased)
    ours = load_tokenizer(path)
    peer = BertTokenizerFast(vocab=str(path), do_lower_case=not cased)
    texts = [text for text in UNICODE if "[SEP]" not in text]
    expected = [peer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert ours.encode_batch(texts) == expected
    assert [ours.encode(text) for text in texts] == expected
    assert ours.vocab_size == len(peer)
    assert max(map(len, expected)) > 20


def test_special_tokens_in_text_are_text(tmp_path: Path) -> None:
    for tokenizer in (load_tokenizer(unicode_vocabulary(tmp_path, True)), load_tokenizer(tmp_path)):
        assert not set(tokenizer.encode("a [SEP] b [MASK]")) & set(tokenizer.special_ids)


def test_attributes(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(small_vocabulary(tmp_path))
    assert tokenizer.vocab_size == len(tokenizer) == len(SPECIAL + WORDS)
    roles = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
    assert roles == tokenizer.special_ids == (0, 1, 2, 3, 4)
    assert [tokenizer.id_to_token(i) for i in range(tokenizer.vocab_size)] == SPECIAL + WORDS
    assert tokenizer.word_starts.tolist() == [not piece.startswith("##") for piece in SPECIAL + WORDS]
    assert tokenizer.decode([2, *tokenizer.encode("The cats sat."), 3]) == "the cats sat."
    assert tokenizer.encode("The zebra") == [5, 1]
    with pytest.raises(IndexError):
        tokenizer.id_to_token(tokenizer.vocab_size)
    assert pickle.loads(pickle.dumps(tokenizer)).encode("the cats") == tokenizer.encode("the cats")


def test_lowercasing_follows_the_vocabulary_unless_told(tmp_path: Path) -> None:
    lower = load_tokenizer(small_vocabulary(tmp_path, ["the", "[unused1]", "[Unused2]"]))
    assert lower.encode("THE") == [5]
    forced = load_tokenizer(tmp_path / "vocab.txt", lowercase=False)
    assert forced.encode("THE") == [1]
    assert forced.fingerprint != lower.fingerprint
    cased = load_tokenizer(small_vocabulary(tmp_path, ["the", "The"]))
    assert cased.encode("The the THE") == [6, 5, 1]
    assert load_tokenizer(tmp_path / "vocab.txt", lowercase=True).encode("The the THE") == [5, 5, 5]


def test_saved_tokenizers_load_equal(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(small_vocabulary(tmp_path), lowercase=False)
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode("The cat") == tokenizer.encode("The cat") == [1, 6]
    assert (tmp_path / "saved" / "vocab.txt").read_bytes() == (tmp_path / "vocab.txt").read_bytes()
    with pytest.raises(UserError, match="lowercase=True contradicts"):
        load_tokenizer(tmp_path / "saved", lowercase=True)
    assert load_tokenizer(tmp_path / "saved", lowercase=False).fingerprint == tokenizer.fingerprint


def test_fingerprint_is_of_the_vocabulary(tmp_path: Path) -> None:
    first = load_tokenizer(small_vocabulary(tmp_path)).fingerprint
    assert len(first) == 64
    (tmp_path / "vocab.txt").write_bytes("\r\n".join(SPECIAL + WORDS).encode("utf-8-sig"))
    assert load_tokenizer(tmp_path).fingerprint == first, "line ends and a byte order mark are not vocabulary"
    assert load_tokenizer(small_vocabulary(tmp_path, WORDS[::-1])).fingerprint != first


def byte_level(path: Path, special: list[str]) -> Path:
    backend = tokenizers.Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=True)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    backend.train_from_iterator(["the cat sat on the mat"] * 5, trainer)
    backend.save(str(path))
    return path


def test_byte_level_bpe(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path / "tokenizer.json", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]))
    assert (tokenizer.cls_id, tokenizer.pad_id, tokenizer.sep_id, tokenizer.mask_id) == (0, 1, 2, 4)
    pieces = [tokenizer.id_to_token(i) for i in tokenizer.encode("the cats <mask>")]
    assert "".join(pieces).startswith("\u0120the\u0120cat")
    starts = [bool(tokenizer.word_starts[i]) for i in tokenizer.encode("the cats")]
    assert starts == [piece.startswith("\u0120") for piece in pieces[: len(starts)]]
    assert not all(starts)
    assert tokenizer.word_starts[list(tokenizer.special_ids)].all()
    assert tokenizer.mask_id not in tokenizer.encode("the <mask>")


def sentencepiece_model(path: Path, **options: object) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "the dog ran on a mat"] * 20),
        model_prefix=str(path.with_suffix("")),
        vocab_size=45,
        hard_vocab_limit=False,
        minloglevel=3,
        **options,
    )
    return path


def test_sentencepiece(tmp_path: Path) -> None:
    path = sentencepiece_model(tmp_path / "any.model", control_symbols=["[CLS]", "[SEP]", "[MASK]"], pad_id=3)
    tokenizer = load_tokenizer(path)
    assert tokenizer.id_to_token(tokenizer.cls_id) == "[CLS]"
    assert tokenizer.id_to_token(tokenizer.pad_id) == "<pad>"
    ids = tokenizer.encode("the cats sat")
    pieces = [tokenizer.id_to_token(i) for i in ids]
    assert [bool(tokenizer.word_starts[i]) for i in ids] == [piece.startswith("\u2581") for piece in pieces]
    assert pieces[0].startswith("\u2581")
    assert tokenizer.decode([tokenizer.cls_id, *ids, tokenizer.sep_id]) == "the cats sat"
    assert tokenizer.encode_batch(["the cats sat", ""]) == [ids, []]
    assert tokenizer.mask_id not in tokenizer.encode("the [MASK] sat")
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint
    assert pickle.loads(pickle.dumps(tokenizer)).encode("the cats sat") == ids
    with pytest.raises(UserError, match="lowercase=False contradicts"):
        load_tokenizer(path, lowercase=False)


def test_vocabularies_without_bert_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"plain\.model has no \[MASK\] piece"):
        load_tokenizer(sentencepiece_model(tmp_path / "plain.model", pad_id=3))
    with pytest.raises(UserError, match=r"has no \[CLS\] piece"):
        load_tokenizer(byte_level(tmp_path / "tokenizer.json", ["<|endoftext|>"]))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    with pytest.raises(UserError, match=r"vocab\.txt has no \[MASK\] piece"):
        load_tokenizer(tmp_path / "vocab.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.txt", b"", r"vocab\.txt is empty"),
        ("vocab.txt", b"\n\n", r"vocab\.txt is empty"),
        ("vocab.txt", b"[PAD]\na\nb\na\n", r"vocab\.txt line 4 repeats the entry 'a' of line 2"),
        ("vocab.txt", b"[PAD]\n\xff\n", r"vocab\.txt byte 6 is not UTF-8"),
        ("tokenizer.json", b"{", r"tokenizer\.json is not a tokenizer"),
        ("tokenizer.json", b"{}", r"tokenizer\.json is not a tokenizer"),
        ("x.model", b"garbage", r"x\.model is not a SentencePiece model"),
        ("words.bin", b"", r"words\.bin is not a known kind"),
    ],
)
def test_unusable_files_are_explained(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / name)


def test_paths_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds none of them"):
        load_tokenizer(tmp_path)
    for name in ("a.model", "b.model"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="holds 2"):
        load_tokenizer(tmp_path)


def test_tokenizers_that_hide_word_starts_are_refused(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(BPE({token: number for number, token in enumerate(SPECIAL)}, []))
    backend.pre_tokenizer = Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="does not show where words start"):
        load_tokenizer(tmp_path)


def test_padding_and_truncation_of_a_file_do_not_touch_a_corpus(tmp_path: Path) -> None:
    load_tokenizer(small_vocabulary(tmp_path)).save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert len(load_tokenizer(tmp_path).encode("the cat sat on the mat")) == 6


SPANNED = [
    *UNICODE,
    "\u0130stanbul is \U0001d4b3 \U0001f600na\u00efve \ufb01ne",
    "a\u0301b\u200dc\ufe0f e\u0301 \u0301",
    "  x \u3000 y\u3000\u4e2d\u56fd\n  z",
    "\ufdfa \u00bd \u338f \u0130x \u338f\u338f",
]


def spanning_tokenizers(folder: Path) -> dict[str, Tokenizer]:
    """One of each kind, small, that normalize: lower-casing, NFC, NFKC."""
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(["the cat sat on a mat", "naïve café Straße ½ kg İx fine", *SPANNED]) + "\n")
    made = {"cased": load_tokenizer(unicode_vocabulary(folder, True))}
    made["wordpiece"] = load_tokenizer(unicode_vocabulary(folder, False))
    for kind, size in (("bpe", 290), ("sentencepiece", 100)):
        made[kind] = train_tokenizer([corpus], kind, size, folder / kind, progress=False)
    return made


def test_spans_of_every_kind(tmp_path: Path) -> None:
    for kind, tokenizer in spanning_tokenizers(tmp_path).items():
        encoded = tokenizer.encode_batch_with_spans(SPANNED)
        assert [found.ids for found in encoded] == tokenizer.encode_batch(SPANNED), kind
        for text, (ids, spans) in zip(SPANNED, encoded, strict=True):
            assert len(ids) == len(spans)
            assert [begin for begin, _ in spans] == sorted(begin for begin, _ in spans)
            covered = {place for begin, end in spans for place in range(begin, end)}
            assert all(text[begin:end] == text[begin:end].strip() for begin, end in spans)
            # What no token comes from is white space, or was removed by normalization.
            missing = {text[place] for place in range(len(text)) if place not in covered}
            assert {c for c in missing if not c.isspace()} <= {"\0", "\ufffd", "\u200b", "\u200d", "\u0301"}, kind


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "sentencepiece"])
def test_spans_survive_normalization(tmp_path: Path, kind: str) -> None:
    text = "x \u0130stanbul cafe\u0301 \U0001f600 \ufb01ne \u00bd\u338f"
    words = text.split()
    begins = [text.index(word) for word in words]
    _, spans = spanning_tokenizers(tmp_path)[kind].encode_batch_with_spans([text])[0]
    for begin, word in zip(begins, words, strict=True):
        inside = [span for span in spans if span[0] < span[1] and begin <= span[0] < begin + len(word)]
        assert (inside[0][0], inside[-1][1]) == (begin, begin + len(word)), (word, spans)


def test_span_rules() -> None:
    # The space before a word goes, also where it is all that is left of the first of several pieces of a character.
    assert character_spans("a b", [(0, 1), (1, 3)], ["\u0120a", "\u0120b"]) == [(0, 1), (2, 3)]
    assert character_spans(" \u00bd", [(0, 1), (1, 1), (1, 2)], ["\u25811", "\u2044", "2"]) == [(1, 2)] * 3
    # The mark of a space alone has no characters, nor has any other white space.
    assert character_spans("x", [(0, 0), (0, 1)], ["\u2581", "x"]) == [(0, 0), (0, 1)]
    assert character_spans("\u3000x", [(0, 1), (0, 1), (1, 2)], ["a", "b", "x"]) == [(1, 1), (1, 1), (1, 2)]
    # Combining marks that normalization removed belong to the character before, unless they are tokens.
    assert character_spans("e\u0301\u0302 x", [(0, 1), (4, 5)], ["e", "x"]) == [(0, 3), (4, 5)]
    assert character_spans("e\u0301\u0302", [(0, 1), (2, 3)], ["e", "\u0302"]) == [(0, 2), (2, 3)]
    assert character_spans("", [], []) == []
