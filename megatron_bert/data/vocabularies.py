# SPDX-License-Identifier: Apache-2.0
"""The files of vocabularies, and the tokenizers that they stand for."""

from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from megatron_bert.json_file import read_object
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
SETTINGS_NAME = "tokenizer_config.json"
"""What transformers keeps beside a vocabulary."""


class Normalization(NamedTuple):
    """What happens to text before a WordPiece vocabulary is looked up, which its vocab.txt does not say.

    The names are those of transformers.

    Attributes:
        do_lower_case: whether text is lower-cased; None where it is not known.
        strip_accents: whether accents are removed; None does what ``do_lower_case`` does.
        tokenize_chinese_chars: whether every Chinese character is a word of its own.
    """

    do_lower_case: bool | None = None
    strip_accents: bool | None = None
    tokenize_chinese_chars: bool = True

    def settings(self) -> dict[str, bool | None]:
        """What there is to say of them in the file."""
        return {name: value for name, value in self._asdict().items() if value is not None or name == "strip_accents"}


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


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file of settings, empty where there is no file.

    Raises:
        UserError: the file holds something else.
    """
    return read_object(path, "fetch the file again, or remove it") if path.is_file() else {}


def read_normalization(folder: Path) -> Normalization:
    """What the tokenizer_config.json of a folder says of its vocab.txt; the defaults where it says nothing.

    Raises:
        UserError: it is damaged, or says something else than true or false.
    """
    path = folder / SETTINGS_NAME
    stated = {name: value for name, value in read_settings(path).items() if name in Normalization._fields}
    for name, value in stated.items():
        if type(value) is not bool and not (value is None and name == "strip_accents"):
            raise UserError(f"{path} says that {name} is {repr(value)[:40]}: write true or false, or leave it out")
    return Normalization(**stated)


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
