# SPDX-License-Identifier: Apache-2.0
"""Streaming documents out of tar archives, such as the shards of WebDataset."""

import tarfile
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from megatron_bert.data.compression import DAMAGE
from megatron_bert.data.rows import Reader, Row
from megatron_bert.data.text_files import TEXT_SUFFIXES
from parallel.errors import UserError


class _Member(NamedTuple):
    """A file in the archive; its content if it may be a document."""

    name: str
    offset: int
    data: bytes | None


class TarReader(Reader):
    """Reads the documents of a tar archive, compressed or not.

    A member .txt is one document, and a member .json one JSON object with a document under a key. Members whose names
    differ in their suffix alone are one sample, as in WebDataset: its .txt is taken, or else its .json. All other
    members are left out. The position of a document is that of the header of its sample's first member.
    """

    def rows(self, begin: int = 0, end: int | None = None) -> Iterator[Row]:
        """Documents whose position is in [begin, end), in order.

        Raises:
            UserError: The archive is damaged, or holds no member that could be a document.
        """
        self.cut = None
        name = "its start"
        found = False
        try:
            with self._opened(self.path) as plain:
                mode = "r:" if plain.seekable else "r|"
                with tarfile.open(fileobj=plain.file, mode=mode) as archive:  # type: ignore[call-overload]
                    for sample in _samples(archive):
                        place = plain.position(sample[0].offset)
                        if end is not None and place >= end:
                            self.cut = sample[0].offset
                            return
                        name = sample[0].name
                        document = self._document(sample)
                        found = found or document is not None
                        if document is not None and place >= begin:
                            yield document
            self._bytes_read = self.size
        except (*DAMAGE, tarfile.TarError) as error:
            raise UserError(f"{self.path} cannot be read after {name}: {error}.") from None
        if not found and not begin:
            raise UserError(f"{self.path} holds no member .txt or .json: give archives of texts.")

    def _document(self, sample: list[_Member]) -> Row | None:
        offset = sample[0].offset
        for suffixes, form in ((TEXT_SUFFIXES, "text"), ((".json",), "json")):
            for name, _, data in sample:
                if data is not None and name.endswith(suffixes):
                    return Row(f"{self.path}:{name}", 1, data, form, offset)  # type: ignore[arg-type]
        return None


def _samples(archive: tarfile.TarFile) -> Iterator[list[_Member]]:
    for _, members in groupby(_members(archive), lambda member: member.name.rpartition(".")[0]):
        yield list(members)


def _members(archive: tarfile.TarFile) -> Iterator[_Member]:
    for member in archive:
        if not member.isfile():
            continue
        # Read at once: a compressed archive cannot go back.
        file = archive.extractfile(member) if member.name.endswith((*TEXT_SUFFIXES, ".json")) else None
        yield _Member(member.name, member.offset, None if file is None else file.read())
