# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: one interface over WordPiece, byte-level BPE and SentencePiece vocabularies.

The work is done by the `tokenizers` and `sentencepiece` libraries; this module finds what pretraining needs to know
about a vocabulary (its special tokens, which pieces start a word) and refuses vocabularies that cannot serve.
"""

import hashlib
import json
import os
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import models, normalizers

from megatron_bert.data.vocabularies import (
    BPE_NAME,
    JSON_NAME,
    MODEL_NAME,
    ROLES,
    VOCAB_NAME,
    Normalization,
    byte_level_bpe,
    find_vocabulary,
    read_json,
    read_normalization,
    read_vocabulary,
    wordpiece,
)
from megatron_bert.data.word_cache import WordCache, splits_at_spaces
from parallel.errors import UserError
from parallel.whole_files import write_bytes

WORD_MARKS = ("\u2581", "\u0120")
"""What SentencePiece and byte-level BPE write for the space before a word."""


class SpannedTokens(NamedTuple):
    """Tokens of a text and where they come from.

    Attributes:
        ids: Token ids.
        spans: Begin and end of each token in the text, in characters (code points); `character_spans` says more.
    """

    ids: list[int]
    spans: list[tuple[int, int]]


class Tokenizer(ABC):
    """Turns text into token ids. Text never yields special tokens: "[SEP]" in a corpus is five ordinary characters.

    Attributes:
        vocab_size: Number of ids, all in [0, vocab_size).
        word_starts: bool [vocab_size]; False for pieces that continue the previous word. The first piece of a sentence
            starts a word whatever this says.
        cls_id: Id that opens a sample.
        sep_id: Id that ends a segment.
        pad_id: Id that fills a row.
        mask_id: Id that hides a token.
        mask_takes_space: Whether the mask token in a sentence stands for a word with the space before it.
        unk_id: Id of text outside the vocabulary.
        special_ids: All ids that are not text, ascending.
        fingerprint: SHA-256 of everything that decides the ids of a text, 64 hex digits.
    """

    mask_takes_space = True

    def __init__(
        self, source: Path, pieces: list[str], special: Iterable[int], mark: str, marks_starts: bool, fingerprint: str
    ) -> None:
        self._pieces = pieces
        self.vocab_size = len(pieces)
        self.fingerprint = fingerprint
        roles = {role: _role_id(source, pieces, role) for role in ROLES}
        self.cls_id, self.sep_id, self.pad_id = roles["cls"], roles["sep"], roles["pad"]
        self.mask_id, self.unk_id = roles["mask"], roles["unk"]
        self.special_ids = tuple(sorted({*roles.values(), *special}))
        self.word_starts = np.array([piece.startswith(mark) == marks_starts for piece in pieces], dtype=bool)
        self.word_starts[list(self.special_ids)] = True

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, fingerprint={self.fingerprint[:12]})"

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, without special tokens."""

    def encode_batch_with_spans(self, texts: Sequence[str]) -> list[SpannedTokens]:
        """Token ids of several texts, as `encode_batch` gives them, and where in the text each token comes from."""
        found = self._encode_batch_with_offsets(texts)
        return [
            SpannedTokens(ids, character_spans(text, offsets, [self._pieces[i] for i in ids]))
            for text, (ids, offsets) in zip(texts, found, strict=True)
        ]

    @abstractmethod
    def _encode_batch_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], Sequence[tuple[int, int]]]]:
        """Token ids, and begin and end of each in characters, as the library gives them."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Readable text of token ids; special tokens are left out."""

    def id_to_token(self, token_id: int) -> str:
        """The piece of an id in [0, vocab_size)."""
        if not 0 <= token_id < self.vocab_size:
            raise IndexError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return self._pieces[token_id]

    def pair_separators(self, *, roberta: bool) -> int:
        """Separators between the two texts of a pair, in a model that is a RoBERTa (or an I-BERT) or not.

        BERT has one and RoBERTa two, </s></s>. Some models like RoBERTa have BERT's vocabulary, whose [SEP] stands
        there once.
        """
        return 2 if roberta and self.id_to_token(self.sep_id) == "</s>" else 1

    def normalization(self) -> Normalization | None:
        """What a WordPiece vocabulary does to text before it looks it up; None of other tokenizers."""
        return None

    def transformers_settings(self) -> dict[str, Any]:
        """What transformers looks for in a tokenizer_config.json beside the files."""
        normalization = self.normalization()
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{role}_token": self.id_to_token(getattr(self, f"{role}_id")) for role in ROLES},
            **({} if normalization is None else normalization.settings()),
        }

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files into a directory, from which `load_tokenizer` gives an equal tokenizer."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, content in self._files().items():
            write_bytes(Path(directory) / name, content)

    @abstractmethod
    def _files(self) -> dict[str, bytes]:
        """The tokenizer's files by name."""


class JsonTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library: `tokenizer.json`, or WordPiece built from `vocab.txt`."""

    def __init__(self, source: Path, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        backend.encode_special_tokens = True  # the library's name for: special tokens in a text are text
        backend.no_padding()
        backend.no_truncation()
        description = json.loads(backend.to_str())
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"{source} has an empty vocabulary: train a tokenizer first.")
        pieces = [""] * (max(vocabulary.values()) + 1)
        for piece, token_id in vocabulary.items():
            pieces[token_id] = piece
        special = [token["id"] for token in description["added_tokens"] if token["special"]]
        # What decides the ids of plain text; the post-processor and the decoder do not, and files of one vocabulary
        # written by different tools differ in them.
        text_tokens = [token["content"] for token in description["added_tokens"] if not token["special"]]
        decisive = [description["normalizer"], description["pre_tokenizer"], description["model"], text_tokens]
        fingerprint = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
        super().__init__(source, pieces, special, *_word_mark(source, description), fingerprint)
        added = next((token for token in description["added_tokens"] if token["id"] == self.mask_id), None)
        self.mask_takes_space = added is None or added["lstrip"]
        self._words = WordCache(self._encode_whole) if splits_at_spaces(description) else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, without special tokens."""
        return self._encode_whole(texts) if self._words is None else self._words(texts)

    def _encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_batch_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], Sequence[tuple[int, int]]]]:
        found = self._backend.encode_batch(texts, add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        """Readable text of token ids; special tokens are left out."""
        return self._backend.decode([int(token_id) for token_id in ids], skip_special_tokens=True)

    def normalization(self) -> Normalization | None:
        """What a WordPiece vocabulary does to text before it looks it up; None of other tokenizers."""
        made = self._backend.normalizer
        if not isinstance(made, normalizers.BertNormalizer):
            return None
        return Normalization(made.lowercase, made.strip_accents, made.handle_chinese_chars)

    def _files(self) -> dict[str, bytes]:
        files = {JSON_NAME: self._backend.to_str(pretty=True).encode()}
        if isinstance(self._backend.model, models.WordPiece):
            files[VOCAB_NAME] = "".join(f"{piece}\n" for piece in self._pieces).encode()
        return files


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model."""

    def __init__(self, source: Path) -> None:
        self._content = source.read_bytes()
        try:
            self._backend = sentencepiece.SentencePieceProcessor(model_proto=self._content)
        except Exception as error:  # the library raises bare RuntimeError and TypeError
            raise UserError(f"{source} is not a SentencePiece model: {error}.") from None
        count = self._backend.get_piece_size()
        pieces = [self._backend.id_to_piece(token_id) for token_id in range(count)]
        special = [i for i in range(count) if self._backend.is_control(i) or self._backend.is_unknown(i)]
        super().__init__(source, pieces, special, WORD_MARKS[0], True, hashlib.sha256(self._content).hexdigest())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, without special tokens."""
        return self._backend.encode(list(texts), out_type=int, num_threads=1)

    def _encode_batch_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], Sequence[tuple[int, int]]]]:
        found = self._backend.encode(list(texts), return_type="offset_mapping", num_threads=1)
        return [(encoding["ids"], encoding["offsets"]) for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        """Readable text of token ids; special tokens are left out."""
        hidden = set(self.special_ids)
        return self._backend.decode([int(token_id) for token_id in ids if int(token_id) not in hidden])

    def _files(self) -> dict[str, bytes]:
        return {MODEL_NAME: self._content}


def character_spans(text: str, offsets: Sequence[tuple[int, int]], pieces: Sequence[str]) -> list[tuple[int, int]]:
    """Where tokens come from, alike for all kinds of tokenizers.

    Args:
        text: The text.
        offsets: Begin and end of each token as a library gives them: with the space before a word or without, empty for
            pieces of a character that normalization made several of, without combining marks that it removed.
        pieces: The tokens.

    Returns:
        For each token begin and end, begins ascending: without white space at either end, with combining marks that
        follow. Tokens of one character all have its span; tokens that stand for white space have an empty one.
    """
    spans = []
    for (begin, end), piece in zip(offsets, pieces, strict=True):
        may_lack = piece not in WORD_MARKS and (begin == end or piece[0] in WORD_MARKS)
        while begin < end and text[begin].isspace():
            begin += 1
        while begin < end and text[end - 1].isspace():
            end -= 1
        if may_lack and begin == end < len(text) and not text[end].isspace():
            end += 1
        spans.append((begin, end))
    following = len(text)  # where the next token begins that lies wholly behind
    for place in range(len(spans) - 1, -1, -1):
        begin, end = spans[place]
        if place + 1 < len(spans) and spans[place + 1][0] >= end:
            following = spans[place + 1][0]
        while begin < end < following and unicodedata.category(text[end]).startswith("M"):
            end += 1
        spans[place] = (begin, end)
    return spans


def load_tokenizer(
    path: str | os.PathLike[str], *, lowercase: bool | None = None, model_type: str | None = None
) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: A WordPiece vocabulary (`vocab.txt`), a `tokenizer.json`, RoBERTa's `vocab.json` (with `merges.txt` beside
            it), a SentencePiece `.model`, or a directory with one of them (looked for in the order tokenizer.json,
            vocab.txt, vocab.json, *.model).
        lowercase: For a `vocab.txt`: whether text is lower-cased, and stripped of accents unless the
            `tokenizer_config.json` beside it says otherwise. None: as that file says, or else as the vocabulary shows,
            that is unless it holds upper-case letters. Other files record it themselves.
        model_type: What config.json calls the model it is for, where that is known.

    Raises:
        UserError: A missing, unreadable or unsuitable file, `lowercase` contradicting it, or ids that are not the
            model's.
    """
    source = find_vocabulary(Path(path))
    if source.suffix == ".txt":
        normalization = read_normalization(source.parent)
        if lowercase is not None:
            normalization = normalization._replace(do_lower_case=lowercase)
        return JsonTokenizer(source, wordpiece(read_vocabulary(source), normalization))
    if source.suffix == ".model" and model_type == "xlm-roberta":
        raise UserError(
            f"{source} numbers its pieces otherwise than the model, an xlm-roberta, whose ids fairseq has shifted: "
            f"give its {JSON_NAME}, as transformers' fast tokenizer saves it."
        )
    tokenizer: Tokenizer
    if source.suffix == ".model":
        tokenizer, recorded = SentencePieceTokenizer(source), None
    else:
        backend = byte_level_bpe(source) if source.name == BPE_NAME else read_json(source)
        tokenizer, recorded = JsonTokenizer(source, backend), getattr(backend.normalizer, "lowercase", None)
    if lowercase is not None and lowercase != recorded:
        raise UserError(
            f"lowercase={lowercase} contradicts {source}, which records its own normalization: leave lowercase out, or "
            f"give a vocab.txt."
        )
    return tokenizer


RUN_FOLDER = "tokenizer"
"""Folder of a training run with a copy of its tokenizer."""


def tokenizer_of_run(source: Path) -> Path | None:
    """The copy of its tokenizer that a training run keeps, given its directory or a checkpoint in it; None without."""
    return next((run / RUN_FOLDER for run in (source, source.parent.parent) if (run / RUN_FOLDER).is_dir()), None)


def _role_id(source: Path, pieces: list[str], role: str) -> int:
    for name in ROLES[role]:
        if name in pieces:
            return pieces.index(name)
    raise UserError(
        f"{source} has no {ROLES[role][0]} piece: BERT needs [CLS], [SEP], [PAD], [MASK] and [UNK], train one with "
        f"`megatron-bert train-tokenizer`."
    )


def _word_mark(source: Path, description: dict[str, Any]) -> tuple[str, bool]:
    """With what pieces begin that start a word (True), or that continue one, such as WordPiece's "##"."""
    model = description["model"]
    if model.get("type") == "WordPiece":
        return model["continuing_subword_prefix"], False
    steps = json.dumps([description["pre_tokenizer"], description["normalizer"]])
    if '"ByteLevel"' in steps:
        return WORD_MARKS[1], True
    if '"Metaspace"' in steps or "\\u2581" in steps:
        return WORD_MARKS[0], True
    raise UserError(
        f"{source} does not show where words start: whole-word masking needs a WordPiece, byte-level BPE or "
        f"SentencePiece vocabulary."
    )
