# SPDX-License-Identifier: Apache-2.0
"""Training tokenizers from the same text files that `preprocess` reads."""

import io
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

from megatron_bert.data.compression import STANDARD_INPUT
from megatron_bert.data.inputs import DocumentReader
from megatron_bert.data.tokenizers import JsonTokenizer, Tokenizer, load_tokenizer
from megatron_bert.data.vocabularies import MODEL_NAME, Normalization, wordpiece
from parallel.errors import UserError
from parallel.whole_files import reporting, write_bytes

Kind = Literal["wordpiece", "sentencepiece", "bpe"]

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
COVERAGE, MINIMUM_COVERAGE = 0.99995, 0.99
"""Share of a text that the single characters of a WordPiece vocabulary are to make up, and must; the rest is [UNK]."""

WORD_MARK = "\U0010fffd"
"""Marks starts of words while WordPiece is trained; BERT's normalization removes private characters from the text."""

MAX_LINE_BYTES = 1 << 16
"""Longest line SentencePiece is given; it would silently ignore a longer one than its limit."""


def train_tokenizer(
    inputs: Sequence[str | os.PathLike[str]],
    kind: Kind,
    vocab_size: int,
    output: str | os.PathLike[str],
    *,
    cased: bool = False,
    at_most: bool = False,
    json_key: str = "text",
    progress: bool = True,
) -> Tokenizer:
    """Train a tokenizer, write it into a directory and load it; the same inputs always give the same files.

    Args:
        inputs: Files, directories and patterns, see `find_inputs`; they are read more than once.
        kind: "wordpiece" writes vocab.txt and tokenizer.json, "sentencepiece" (unigram) tokenizer.model, "bpe"
            (byte-level) tokenizer.json.
        vocab_size: Entries of the vocabulary, the five special tokens included.
        output: Directory for the files, created if missing.
        cased: Keep upper case; otherwise text is lower-cased, and for WordPiece stripped of accents.
        at_most: Write a smaller vocabulary of a text that cannot fill one of this size.
        json_key: Where a JSON object holds its text, or the column of a table.

    Raises:
        UserError: An unreadable input, no text, or a vocabulary size that the text cannot fill exactly (or, with
            `at_most`, that is too small for it).
    """
    if kind not in get_args(Kind):
        raise UserError(f'Tokenizer type "{kind}" is unknown: choose {", ".join(get_args(Kind))}.')
    if not inputs:
        raise UserError("There is nothing to train a tokenizer on: give at least one input file.")
    if any(os.fspath(path) == STANDARD_INPUT for path in inputs):
        raise UserError("A tokenizer is trained on text that is read more than once: give files, not standard input.")
    if Path(output).exists() and not Path(output).is_dir():
        raise UserError(f"Output {os.fspath(output)} is a file: give a directory, the tokenizer has fixed file names.")
    if vocab_size <= len(SPECIAL_TOKENS):
        raise UserError(f"vocab_size {vocab_size} is too small: {len(SPECIAL_TOKENS)} entries are special tokens.")
    made = not Path(output).exists()
    text = _Lines([os.fspath(path) for path in inputs], json_key, progress)
    train = {"wordpiece": _train_wordpiece, "bpe": _train_bpe, "sentencepiece": _train_sentencepiece}[kind]
    try:
        with reporting("written", Path(output), "give a directory that you may write to"):  # before the work of minutes
            Path(output).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=output):
                pass
        train(text, vocab_size, Path(output), cased, at_most)
    except BaseException:
        if made:
            with suppress(OSError):
                Path(output).rmdir()
        raise
    return load_tokenizer(output)


class _Lines:
    """The non-blank lines of all documents, any number of times; refuses inputs without any."""

    def __init__(self, paths: list[str], json_key: str, progress: bool) -> None:
        self._paths, self._json_key, self._progress = paths, json_key, progress

    def __iter__(self) -> Iterator[str]:
        documents = DocumentReader(self._paths, json_key=self._json_key)
        empty = True
        with tqdm(
            total=documents.total, unit="B", unit_scale=True, desc="read text", disable=not self._progress
        ) as bar:
            for document in documents:
                for line in document.split("\n"):
                    if line.strip():
                        empty = False
                        yield line
                bar.update(documents.bytes_read - bar.n)
        if empty:
            raise UserError(f"No text was found in {', '.join(self._paths)}.")


def _train_wordpiece(text: Iterable[str], vocab_size: int, output: Path, cased: bool, at_most: bool) -> None:
    """Learn merges and write them as whole-word and "##" pieces.

    The library's own WordPiece trainer numbers "##" characters in the order of a randomly seeded hash table, and ties
    between merges follow these numbers: two runs give two vocabularies. So byte-pair encoding, which is the algorithm
    behind it and is deterministic, learns on words marked at their start; pieces with the mark start a word.
    """
    # The text is prepared exactly as the finished tokenizer will prepare it.
    finished = wordpiece({token: number for number, token in enumerate(SPECIAL_TOKENS)}, Normalization(not cased))
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = finished.normalizer
    marked = pre_tokenizers.Metaspace(WORD_MARK, prepend_scheme="always")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), marked])
    alphabet = _alphabet(text, backend.normalizer, vocab_size)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size + 1,  # one entry is the mark itself, which is not a piece
        min_frequency=2,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=[WORD_MARK, *alphabet],
        limit_alphabet=len(alphabet) + 1,
        show_progress=False,
    )
    backend.train_from_iterator(text, trainer)
    pieces = [*SPECIAL_TOKENS, *alphabet, *(f"##{character}" for character in alphabet)]
    for learned, _ in sorted(backend.get_vocab().items(), key=itemgetter(1)):
        if len(learned) > 1 and learned not in SPECIAL_TOKENS:
            pieces.append(learned[1:] if learned[0] == WORD_MARK else f"##{learned}")
    # A marked single character is learned as a merge but is there already.
    distinct = list(dict.fromkeys(pieces))[:vocab_size]
    _check_size(len(distinct), vocab_size, at_most)
    vocabulary = {piece: number for number, piece in enumerate(distinct)}
    JsonTokenizer(output, wordpiece(vocabulary, Normalization(not cased))).save(output)


def _alphabet(text: Iterable[str], normalizer: normalizers.Normalizer, vocab_size: int) -> list[str]:
    """Characters that get entries, sorted: the most frequent ones that make up nearly all of the text.

    They fill at most half of the vocabulary; each takes two entries.
    """
    raw: Counter[str] = Counter()
    for line in text:
        raw.update(line)
    counts: Counter[str] = Counter()
    for character, count in raw.items():
        for normal in normalizer.normalize_str(character):
            if not normal.isspace():
                counts[normal] += count
    if not counts:
        raise UserError(
            f"Nothing is left of the text once it is normalized: vocab_size {vocab_size} cannot be reached."
        )
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    coverage = np.cumsum([counts[character] for character in ranked]) / counts.total()
    kept = min(int(np.searchsorted(coverage, COVERAGE)) + 1, vocab_size // 4)
    if coverage[kept - 1] < MINIMUM_COVERAGE:
        raise UserError(
            f"vocab_size {vocab_size} is too small: the {kept} characters it has room for make up "
            f"{coverage[kept - 1]:.1%} of the text, at least {MINIMUM_COVERAGE:.0%} are needed."
        )
    return sorted(ranked[:kept])


def _train_bpe(text: Iterable[str], vocab_size: int, output: Path, cased: bool, at_most: bool) -> None:
    backend = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
    backend.normalizer = normalizers.NFC()
    if not cased:
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # The space in front makes the first word of a sentence the same piece as inside a sentence.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        # The mask stands for a word with the space before it, as such words are trained on.
        special_tokens=[AddedToken(name, lstrip=name == "[MASK]", special=True) for name in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(text, trainer)
    _check_size(backend.get_vocab_size(), vocab_size, at_most)
    sep, cls = SPECIAL_TOKENS.index("[SEP]"), SPECIAL_TOKENS.index("[CLS]")  # special tokens come first
    backend.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    JsonTokenizer(output, backend).save(output)


def _train_sentencepiece(text: Iterable[str], vocab_size: int, output: Path, cased: bool, at_most: bool) -> None:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_cut_lines(text),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=not at_most,
            normalization_rule_name="nmt_nfkc" if cased else "nmt_nfkc_cf",
            max_sentence_length=2 * MAX_LINE_BYTES,
            # One thread: sums of floats in another order would give another vocabulary.
            num_threads=1,
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            pad_piece="[PAD]",
            unk_piece="[UNK]",
            control_symbols=["[CLS]", "[SEP]", "[MASK]"],
            minloglevel=2,
        )
    except UserError:
        raise
    except (RuntimeError, OSError) as error:
        raise UserError(f"vocab_size {vocab_size} does not fit this text: {_last_sentence(error)}.") from None
    write_bytes(output / MODEL_NAME, model.getvalue())


def _cut_lines(text: Iterable[str]) -> Iterator[str]:
    """Cut lines that are too long for SentencePiece; a character has at most four bytes."""
    step = MAX_LINE_BYTES // 4
    for line in text:
        for begin in range(0, len(line), step):
            yield line[begin : begin + step]


def _last_sentence(error: Exception) -> str:
    """What a SentencePiece error says, without its place in the source and advice on options of the library."""
    return str(error).replace("\n", " ").rsplit("] ", 1)[-1].split(" or decrease ")[0].strip().rstrip(".")


def _check_size(reached: int, wanted: int, at_most: bool) -> None:
    if reached > wanted:
        raise UserError(f"vocab_size {wanted} is too small: special tokens and single characters alone need {reached}.")
    if reached < wanted and not at_most:
        raise UserError(
            f"vocab_size {wanted} is too large: this text yields {reached} entries seen at least twice, give more "
            f"text, or a vocab_size of at most {reached}, or take as many as there are (--at-most)."
        )
