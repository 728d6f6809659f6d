# SPDX-License-Identifier: Apache-2.0
r"""Megatron's memory-mapped token files: a pair `PREFIX.bin` (tokens) and `PREFIX.idx` (where sentences lie).

Layout of the `.idx` file, little endian, S sentences and D document boundaries:

    offset  bytes  content
    0       9      b"MMIDIDX\x00\x00"
    9       8      uint64 version, 1
    17      1      uint8 code of the token type, see DTYPES
    18      8      uint64 S
    26      8      uint64 D = documents + 1
    34      4 S    int32 tokens in each sentence
    ...     8 S    int64 byte offset of each sentence in the .bin file
    ...     8 D    int64 first sentence of each document, then S
    ...     S      int8 mode of each sentence (multimodal files only)

The `.bin` file holds the tokens of all sentences one after the other and nothing else.
"""

import struct
from pathlib import Path

import numpy as np

from parallel.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
"""Token types by their code in the header."""


def corpus_prefix_of(source: str) -> str:
    """The prefix of a corpus that is given by itself or by one of its files."""
    return source.removesuffix(".idx").removesuffix(".bin")


def best_dtype(vocab_size: int) -> np.dtype:
    """Smallest token type Megatron uses for a vocabulary: uint16 below 65,500 entries, else int32."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


def dtype_code(dtype: np.dtype) -> int:
    """Code of a token type in the header."""
    return next(code for code, candidate in DTYPES.items() if candidate == dtype)


def read_header(path: Path) -> tuple[int, int, int]:
    """Read the header of an `.idx` file: (code of the token type, sentences, document boundaries)."""
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if header.startswith(LEGACY_MAGIC):
        raise UserError(
            f"{path} is in the old TNTIDX format (--dataset-impl lazy or cached): re-create it from the text with "
            f"`megatron-bert preprocess`, or with Megatron's preprocess_data.py --dataset-impl mmap."
        )
    if not header.startswith(MAGIC[: len(header)]) or not header:
        raise UserError(f"{path} byte 0 is {header[:9]!r} instead of {MAGIC!r}: it is not a Megatron index.")
    if len(header) < HEADER.size:
        raise UserError(f"{path} ends at byte {len(header)}, inside the {HEADER.size}-byte header: preprocess again.")
    _, version, code, sentences, boundaries = HEADER.unpack(header)
    if version != VERSION:
        raise UserError(f"{path} byte 9 gives format version {version}: only version {VERSION} is known.")
    return code, sentences, boundaries
