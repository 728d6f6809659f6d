# SPDX-License-Identifier: Apache-2.0
"""Streaming documents out of a column of Parquet and Arrow files, a few rows at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_bert.data.rows import Form, Reader, Row
from parallel.errors import UserError, first_of

if TYPE_CHECKING:
    import pyarrow

BATCH_BYTES = 8 << 20
BATCH_ROWS = 1024
"""What is in memory at a time: as many rows as have about so many bytes, but no more than so many."""

DATASET_STATE, DATASET_SPLITS = "state.json", "dataset_dict.json"
"""What `save_to_disk` of Hugging Face's datasets writes into the folder of a dataset, and of several splits."""


class ParquetReader(Reader):
    """Reads the documents of a string column of a Parquet file; other columns are never read.

    The position of a row is its share of the rows times the bytes of the file.

    Raises:
        UserError: pyarrow is missing, the file is not a Parquet file, or the column is missing or not of strings.
    """

    def __init__(self, path: str | os.PathLike[str], column: str) -> None:
        super().__init__(path)
        self._column = column
        with _reading(self.path), self._open() as file:
            _check_column(self.path, file.schema_arrow, column)

    def rows(self, begin: int = 0, end: int | None = None) -> Iterator[Row]:
        """Documents whose position is in [begin, end), in order.

        Raises:
            UserError: The file is damaged.
        """
        self.cut = None
        with _reading(self.path), self._open() as file:
            count = file.metadata.num_rows
            first = -(-begin * count // self.size)
            last = count if end is None else min(count, -(-end * count // self.size))
            start = 0
            for group in range(file.metadata.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if start < last and start + rows > first:
                    yield from self._group(file, group, start, first, last)
                start += rows
            self._bytes_read = min(self.size, end or self.size)
            self.cut = last if last < count else None

    def _group(self, file: Any, group: int, start: int, first: int, last: int) -> Iterator[Row]:
        """Rows `first` to `last` - 1 of the file that are in a row group, whose first row is `start`."""
        metadata = file.metadata.row_group(group)
        chunks = (metadata.column(index) for index in range(metadata.num_columns))
        bytes_here = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == self._column)
        average = max(1, bytes_here // max(1, metadata.num_rows))
        batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES // average))
        for batch in file.iter_batches(batch_rows, row_groups=[group], columns=[self._column], use_threads=False):
            for number, row in enumerate(_values(self.path, batch.column(0), start + 1), start):
                if number >= last:
                    return
                if number >= first:
                    yield row._replace(offset=number)
            start += batch.num_rows
            self._bytes_read = self.size * start // file.metadata.num_rows

    def _open(self) -> Any:
        from pyarrow import parquet

        return parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20)


class ArrowReader(Reader):
    """Reads the documents of a string column of an Arrow file or stream, as Hugging Face's datasets are kept.

    The position of a row is that of its record batch: parts are of whole batches.

    Raises:
        UserError: pyarrow is missing, the file is not an Arrow file, or the column is missing or not of strings.
    """

    def __init__(self, path: str | os.PathLike[str], column: str) -> None:
        super().__init__(path)
        with _reading(self.path), _source(self.path) as source:
            schema = _arrow_schema(source)
            _check_column(self.path, schema, column)
            self._index = schema.names.index(column)

    def rows(self, begin: int = 0, end: int | None = None) -> Iterator[Row]:
        """Documents whose position is in [begin, end), in order.

        Raises:
            UserError: The file is damaged.
        """
        self.cut = None
        with _reading(self.path), _source(self.path) as source:
            for number, (place, batch) in enumerate(self._batches(source)):
                self._bytes_read = place
                if end is not None and place >= end:
                    self.cut = number
                    return
                if place >= begin:
                    for row in _values(self.path, batch.column(0), 1):
                        yield row._replace(offset=number, base=number)
            self._bytes_read = self.size

    def _batches(self, source: Any) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
        from pyarrow import ipc

        options = ipc.IpcReadOptions(included_fields=[self._index], use_threads=False)
        if _is_arrow_file(source):
            file = ipc.open_file(source, options=options)
            for number in range(file.num_record_batches):
                yield self.size * number // file.num_record_batches, file.get_batch(number)
            return
        stream = ipc.open_stream(source, options=options)
        while True:
            place = source.tell()
            try:
                batch = stream.read_next_batch()
            except StopIteration:
                return
            yield place, batch


def dataset_files(folder: Path) -> list[str] | None:
    """The Arrow files of a dataset that Hugging Face's `save_to_disk` wrote; None of other folders.

    Raises:
        UserError: The folder holds several splits, of which one is to be chosen, or is damaged.
    """
    state, splits = folder / DATASET_STATE, folder / DATASET_SPLITS
    if splits.is_file():
        try:
            names = json.loads(splits.read_text(encoding="utf-8"))["splits"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{splits} cannot be read: save the dataset again.") from None
        raise UserError(f"{folder} is a dataset with splits: give {' or '.join(str(folder / name) for name in names)}.")
    if not (state.is_file() and (folder / "dataset_info.json").is_file()):
        return None
    try:
        return [str(folder / file["filename"]) for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{state} does not list the dataset's files: save the dataset again.") from None


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Report a missing library and what it refuses in one sentence."""
    try:
        import pyarrow
    except ImportError:
        raise UserError(
            f"Reading {path} needs pyarrow, which is not installed: pip install 'megatron-bert[arrow]'."
        ) from None
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{path} cannot be read as a table: {reason}.") from None


@contextmanager
def _source(path: str) -> Iterator[Any]:
    import pyarrow

    with pyarrow.OSFile(path) as source:
        yield source


def _is_arrow_file(source: Any) -> bool:
    found = source.read(6) == b"ARROW1"
    source.seek(0)
    return found


def _arrow_schema(source: Any) -> pyarrow.Schema:
    from pyarrow import ipc

    return (ipc.open_file if _is_arrow_file(source) else ipc.open_stream)(source).schema


def _check_column(path: str, schema: pyarrow.Schema, column: str) -> None:
    from pyarrow import types

    if column not in schema.names:
        raise UserError(
            f'{path} has no column "{column}" (found: {first_of(schema.names, 20)}): name the text with --json-key.'
        )
    if schema.names.count(column) > 1:
        raise UserError(f'{path} has {schema.names.count(column)} columns "{column}": rename all but one.')
    kind = schema.field(column).type
    plain = kind.value_type if types.is_dictionary(kind) else kind
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    if not any(test(plain) for test in tests):
        nested = " or a field of it as a column of its own" if types.is_nested(kind) else ""
        raise UserError(f'{path} holds {kind} in column "{column}": expected strings; name another{nested}.')


def _values(path: str, column: pyarrow.Array, line: int) -> Iterator[Row]:
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    for number, data in enumerate(column.cast(pyarrow.large_binary()).to_pylist(), line):
        form: Form = "cell"
        if data is None:
            form, data = "null", b""
        yield Row(path, number, data, form)
