# SPDX-License-Identifier: Apache-2.0
"""What the user gives as text: files of every kind, directories, patterns and standard input; and parts of them."""

import glob
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_bert.data.compression import COMPRESSIONS, STANDARD_INPUT, inner_suffix
from megatron_bert.data.rows import OnBadRow, Reader, Row, check_on_bad_row, decode_row
from megatron_bert.data.table_files import ArrowReader, ParquetReader, dataset_files
from megatron_bert.data.tar_files import TarReader
from megatron_bert.data.text_files import JSON_SUFFIXES, TEXT_SUFFIXES, RowReader
from parallel.errors import UserError, first_of

PARQUET_SUFFIXES = (".parquet", ".pq")
ARROW_SUFFIXES = (".arrow", ".feather")
TAR_SUFFIXES = (".tar",)
SUFFIXES = (*JSON_SUFFIXES, *TEXT_SUFFIXES, *PARQUET_SUFFIXES, *ARROW_SUFFIXES, *TAR_SUFFIXES)
"""Files that are taken out of a directory."""


@dataclass(frozen=True)
class Part:
    """One of several parts of the input: parts 1 to `count` together are all of it.

    Attributes:
        number: From 1.
    """

    number: int
    count: int

    def bounds(self, total: int) -> tuple[int, int]:
        """The positions [begin, end) of `total` that the part has."""
        return total * (self.number - 1) // self.count, total * self.number // self.count

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def parse_part(text: str) -> Part:
    """Read "K/N".

    Raises:
        UserError: It is not two numbers with 1 <= K <= N.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f'Part "{text}" must be K/N, part K of N with K from 1 to N, such as 1/8.')
    return Part(int(match[1]), int(match[2]))


def find_inputs(inputs: Iterable[str | os.PathLike[str]]) -> list[str]:
    """The files that the inputs name, in order, each once; those of directories and patterns are sorted by name.

    Says on standard error what is left out of directories, and when files were named again.

    Raises:
        UserError: Something is missing, or a directory or a pattern gives no file.
    """
    named = [path for given in inputs for path in _expand(os.fspath(given))]
    kept, seen = [], set()
    for path in named:
        place = os.path.realpath(path)
        if path == STANDARD_INPUT or place not in seen:
            kept.append(path)
        seen.add(place)
    if len(kept) < len(named):
        print(f"note: {len(named) - len(kept)} inputs name a file again, which is read once", file=sys.stderr)
    return kept


def _expand(given: str) -> list[str]:
    if given == STANDARD_INPUT:
        return [given]
    path = Path(given)
    if path.is_dir():
        return _directory(path)
    if not path.exists() and glob.has_magic(given):
        found = sorted(glob.glob(given, recursive=True))
        if not found:
            raise UserError(f"Input {given} matches no file.")
        return [file for each in found for file in _expand(glob.escape(each) if glob.has_magic(each) else each)]
    return [given]


def _directory(folder: Path) -> list[str]:
    saved = dataset_files(folder)
    if saved is not None:
        return saved
    files = sorted(str(path) for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder)))
    taken = [file for file in files if inner_suffix(file) in SUFFIXES]
    others = [Path(file).name for file in files if inner_suffix(file) not in SUFFIXES]
    if not taken:
        raise UserError(f"Directory {folder} holds no file of text: expected {', '.join(SUFFIXES)}, or compressed.")
    if others:
        print(f"note: {len(others)} other files in {folder} are left out ({first_of(others)})", file=sys.stderr)
    return taken


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def open_reader(path: str, json_key: str) -> Reader:
    """The reader of one file, which its name decides.

    Raises:
        UserError: The file is missing, or has no such column.
    """
    suffix = inner_suffix(path)
    if path == STANDARD_INPUT or suffix not in (*PARQUET_SUFFIXES, *ARROW_SUFFIXES, *TAR_SUFFIXES):
        return RowReader(path)
    if not Path(path).is_file():
        raise UserError(f"Input {path} does not exist or is not a file.")
    if suffix in TAR_SUFFIXES:
        return TarReader(path)
    if path.lower().endswith(COMPRESSIONS):
        raise UserError(f"Input {path} is a table in a compressed file: uncompress it, tables are compressed inside.")
    return (ParquetReader if suffix in PARQUET_SUFFIXES else ArrowReader)(path, json_key)


class InputRows:
    """The documents of some inputs, or of a part of them: the same whatever the machine.

    Parts are of equal size in bytes, and every document is in one of them: where parts meet is decided by where a
    document lies. A part of a compressed file is read from the start of the file.

    Args:
        inputs: What `find_inputs` takes.
        json_key: Where a JSON object holds its text, or the column of a table.
        part: None for all.

    Attributes:
        total: Bytes of all files.

    Raises:
        UserError: Inputs are missing, or standard input is given twice or in parts.
    """

    def __init__(
        self, inputs: Iterable[str | os.PathLike[str]], json_key: str = "text", part: Part | None = None
    ) -> None:
        paths = find_inputs(inputs)
        pipes = paths.count(STANDARD_INPUT)
        if pipes > 1 or (pipes and part is not None):
            raise UserError("Standard input can be read once, by one process: give files for anything else.")
        self.readers = [open_reader(path, json_key) for path in paths]
        self.total = sum(reader.size for reader in self.readers)
        self.part = part
        self._begin, self._end = part.bounds(self.total) if part is not None else (0, self.total)
        self._meets: tuple[list[int], list[int]] = ([0, 0], [0, 0])

    def __iter__(self) -> Iterator[Row]:
        """The documents in order."""
        if self.part is None:
            for reader in self.readers:
                yield from reader.rows()
            return
        start = 0
        first, last = [len(self.readers), 0], [len(self.readers), 0]
        for index, reader in enumerate(self.readers):
            begin, end = max(self._begin - start, 0), min(self._end - start, reader.size)
            if start == self._begin:
                first = [index, 0]
            if start == self._end:
                last = [index, 0]
            start += reader.size
            if begin >= end:
                continue
            seen = None
            for row in reader.rows(begin, None if end == reader.size else end):
                seen = row.offset if seen is None else seen
                yield row
            after = -1 if reader.cut is None else reader.cut
            if begin > 0:
                first = [index, after if seen is None else seen]
            if end < reader.size:
                last = [index, after]
        self._meets = first, last

    @property
    def bytes_read(self) -> int:
        """Bytes of the part of the (compressed) files consumed so far."""
        done = start = 0
        for reader in self.readers:
            begin, end = max(self._begin - start, 0), min(self._end - start, reader.size)
            done += max(0, min(reader.bytes_read, end) - begin)
            start += reader.size
        return done

    @property
    def bytes_to_read(self) -> int:
        """Bytes of the part."""
        return self._end - self._begin

    def note(self) -> dict[str, object] | None:
        """What `merge` compares, once the part is read: the files, and the documents it begins and ends with."""
        if self.part is None:
            return None
        files = [[Path(reader.path).name, reader.size] for reader in self.readers]
        digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
        return {
            "number": self.part.number,
            "count": self.part.count,
            "inputs": digest,
            "begins": self._meets[0],
            "ends": self._meets[1],
        }


class DocumentReader:
    """Iterates over the texts of all documents of some inputs.

    Args:
        inputs: What `find_inputs` takes, read one after the other.
        json_key: Where a JSON object holds its text, or the column of a table.
        on_bad_row: "error" stops at a row that cannot be decoded, "skip" counts it and goes on.

    Attributes:
        total: Bytes of all files.
    """

    def __init__(
        self, inputs: Sequence[str | os.PathLike[str]], *, json_key: str = "text", on_bad_row: OnBadRow = "error"
    ) -> None:
        check_on_bad_row(on_bad_row)
        self._rows = InputRows(inputs, json_key)
        self.total = self._rows.total
        self._json_key, self._on_bad_row = json_key, on_bad_row
        self.skipped = 0

    def __iter__(self) -> Iterator[str]:
        for row in self._rows:
            try:
                text = decode_row(row, self._json_key)
            except UserError:
                if self._on_bad_row == "error":
                    raise
                self.skipped += 1
                continue
            yield text

    @property
    def bytes_read(self) -> int:
        """Bytes of the (compressed) files consumed so far."""
        return self._rows.bytes_read
