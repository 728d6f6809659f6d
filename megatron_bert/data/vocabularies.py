# SPDX-License-Identifier: Apache-2.0
"""The files of vocabularies, and the tokenizers that they stand for."""

from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from megatron_bert.data.tokenizer_settings import Normalization
from parallel.errors import UserError

ROLES = {
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "pad": ("[PAD]", "<pad>"),
    "mask": ("[MASK]", "<mask>"),
    "unk": ("[UNK]", "<unk>"),
}
"""Special tokens by role: BERT's names, then those of RoBERTa and SentencePiece."""

JSON_NAME, VOCAB_NAME, MODEL_NAME = "tokenizer.json", "vocab.txt", "tokenizer.model"
BPE_NAME, MERGES_NAME = "vocab.json", "merges.txt"
"""The two files of a byte-level BPE vocabulary, as RoBERTa's."""


def wordpiece(vocabulary: dict[str, int], normalization: Normalization) -> tokenizers.Tokenizer:
    """Build BERT's WordPiece tokenizer from its vocabulary.

    Where `normalization` does not say whether text is lower-cased, it is unless the vocabulary holds upper case.
    """
    lowercase = normalization.do_lower_case
    if lowercase is None:
        lowercase = not any(piece != piece.lower() for piece in vocabulary if not _is_bracketed(piece))
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=normalization.tokenize_chinese_chars,
        strip_accents=normalization.strip_accents,
        lowercase=lowercase,
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    names = [name for name, *_ in ROLES.values() if name in vocabulary]
    backend.add_special_tokens(names)
    if "[SEP]" in vocabulary and "[CLS]" in vocabulary:
        backend.post_processor = processors.BertProcessing(
            ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
        )
    return backend


def find_vocabulary(path: Path) -> Path:
    """The tokenizer file meant by a path."""
    if path.is_file():
        if path.suffix not in (".txt", ".json", ".model"):
            raise UserError(
                f"{path} is not a known kind of tokenizer: expected vocab.txt, tokenizer.json, vocab.json or a .model "
                "file."
            )
        return path
    if not path.is_dir():
        raise UserError(
            f"Tokenizer {path} does not exist: give a vocab.txt, a tokenizer.json, a vocab.json, a .model file or a "
            "directory."
        )
    found = _vocabularies(path)
    if not found or (len(found) > 1 and found[0].suffix == ".model"):
        held = f"{len(found)} .model files" if found else "none of them"
        raise UserError(
            f"{path} must hold a {JSON_NAME}, a {VOCAB_NAME}, {BPE_NAME} and {MERGES_NAME}, or one .model file, but "
            f"holds {held}."
        )
    return found[0]


def holds_vocabulary(directory: Path) -> bool:
    """Whether a directory holds any file that `load_tokenizer` looks for."""
    return bool(_vocabularies(directory))


def _vocabularies(directory: Path) -> list[Path]:
    named = [directory / name for name in (JSON_NAME, VOCAB_NAME, BPE_NAME)]
    return [path for path in named if path.is_file()] or sorted(directory.glob("*.model"))


def read_vocabulary(source: Path) -> dict[str, int]:
    """Read a vocab.txt: one piece per line, its id is the line number counted from 0."""
    try:
        text = source.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{source} byte {error.start} is not UTF-8: a vocab.txt holds one piece per line.") from None
    # Only line feeds end a line: other Unicode line separators may be pieces.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise UserError(f"{source} is empty: a vocab.txt holds one piece per line.")
    vocabulary: dict[str, int] = {}
    for number, piece in enumerate(lines):
        if piece in vocabulary:
            first = vocabulary[piece] + 1
            raise UserError(
                f"{source} line {number + 1} repeats the entry {piece!r} of line {first}: remove one of them."
            )
        vocabulary[piece] = number
    return vocabulary


def read_json(source: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json."""
    try:
        return tokenizers.Tokenizer.from_str(source.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{source} is not a tokenizer of the tokenizers library: {error}.") from None


def byte_level_bpe(source: Path) -> tokenizers.Tokenizer:
    """RoBERTa's tokenizer from its vocab.json and the merges.txt beside it."""
    merges = source.with_name(MERGES_NAME)
    if not merges.is_file():
        raise UserError(f"{source} needs the {MERGES_NAME} that was made with it: copy it into the same directory.")
    try:
        backend = tokenizers.Tokenizer(models.BPE.from_file(str(source), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{source} and {MERGES_NAME} are not byte-level BPE vocabulary: {error}.") from None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    vocabulary = backend.get_vocab()
    for _, name in ROLES.values():
        if name not in vocabulary:
            raise UserError(
                f"{source} has no {name} piece: it is not RoBERTa's vocabulary, but another byte-level BPE."
            )
        backend.add_special_tokens([AddedToken(name, lstrip=name == "<mask>", special=True)])
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", vocabulary["</s>"]), ("<s>", vocabulary["<s>"]), trim_offsets=True, add_prefix_space=False
    )
    return backend


def _is_bracketed(piece: str) -> bool:
    """Whether a piece looks like a special token, such as [CLS], [unused7] or <s>."""
    return len(piece) > 2 and (piece[0] + piece[-1]) in ("[]", "<>")
