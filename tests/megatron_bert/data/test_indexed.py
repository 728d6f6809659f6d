# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_bert.data.indexed import IndexedDataset
from megatron_bert.data.indexed_format import best_dtype
from megatron_bert.data.indexed_writer import IndexedWriter
from megatron_bert.data.merging import merge_corpora
from parallel.errors import UserError

from .support import write_corpus

DOCUMENTS = [[[5, 6, 7], [8]], [[9, 10]]]


def index_bytes(code: int, sizes: list[int], offsets: list[int], documents: list[int], tail: bytes = b"") -> bytes:
    """The format description, written out."""
    return (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(sizes), len(documents))
        + struct.pack(f"<{len(sizes)}i", *sizes)
        + struct.pack(f"<{len(offsets)}q", *offsets)
        + struct.pack(f"<{len(documents)}q", *documents)
        + tail
    )


def put(prefix: Path, index: bytes, tokens: bytes) -> Path:
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(tokens)
    return prefix


def test_the_writer_produces_the_documented_bytes(tmp_path: Path) -> None:
    write_corpus(tmp_path / "deep" / "er", DOCUMENTS)
    assert (tmp_path / "deep" / "er.idx").read_bytes() == index_bytes(8, [3, 1, 2], [0, 6, 8], [0, 2, 3])
    assert (tmp_path / "deep" / "er.bin").read_bytes() == struct.pack("<6H", 5, 6, 7, 8, 9, 10)
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["er.bin", "er.idx"]


def test_writing_documents_at_once_equals_writing_sentences(tmp_path: Path) -> None:
    write_corpus(tmp_path / "one", DOCUMENTS)
    with IndexedWriter(tmp_path / "many", "u2") as writer:
        writer.add_documents(np.arange(5, 9), np.array([3, 1]), np.array([2]))
        writer.add_documents(np.arange(9, 11), np.array([2]), np.array([1]))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"many{suffix}").read_bytes() == (tmp_path / f"one{suffix}").read_bytes()


@pytest.mark.parametrize(
    ("code", "dtype"), [(1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (6, "<f8"), (7, "<f4"), (8, "<u2")]
)
def test_every_token_type_is_read_and_written(tmp_path: Path, code: int, dtype: str) -> None:
    tokens = np.array([1, 2, 3], dtype=dtype)
    size = tokens.itemsize
    put(tmp_path / "x", index_bytes(code, [2, 1], [0, 2 * size], [0, 1, 2]), tokens.tobytes())
    data = IndexedDataset(tmp_path / "x")
    assert data.dtype == np.dtype(dtype)
    assert data[0].tolist() == [1, 2]
    assert data[-1].tolist() == [3]
    with IndexedWriter(tmp_path / "y", dtype) as writer:
        for sentence in ([1, 2], [3]):
            writer.add_sentence(sentence)
            writer.end_document()
    assert (tmp_path / "y.idx").read_bytes() == (tmp_path / "x.idx").read_bytes()
    assert (tmp_path / "y.bin").read_bytes() == (tmp_path / "x.bin").read_bytes()


def test_code_7_of_old_files_means_float64(tmp_path: Path) -> None:
    put(tmp_path / "x", index_bytes(7, [2, 1], [0, 16], [0, 2]), np.array([1.0, 2.0, 3.0]).tobytes())
    assert IndexedDataset(tmp_path / "x")[1].tolist() == [3.0]


def test_reading(tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "x", DOCUMENTS)
    assert len(data) == 3
    assert (data.sizes.dtype, data.sizes.tolist()) == (np.int32, [3, 1, 2])
    assert (data.document_indices.dtype, data.document_indices.tolist()) == (np.int64, [0, 2, 3])
    assert data.offsets.tolist() == [0, 6, 8]
    assert data.modes is None
    assert data.tokens(0, 2).tolist() == [5, 6, 7, 8]
    assert data.tokens(1, 1).tolist() == []
    assert data.tokens(0, 3).base is not None, "a view, not a copy"
    with pytest.raises(IndexError):
        data[3]
    with pytest.raises(ValueError, match="read-only"):
        data[0][0] = 1
    assert pickle.loads(pickle.dumps(data))[2].tolist() == [9, 10]


def test_empty_sentences_documents_and_corpora_are_legal(tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "x", [[[5], []], [], [[6]]])
    assert data[1].tolist() == []
    assert data.document_indices.tolist() == [0, 2, 2, 3]
    assert len(write_corpus(tmp_path / "none", [])) == 0


def test_modes_of_multimodal_files(tmp_path: Path) -> None:
    put(tmp_path / "x", index_bytes(8, [1, 1], [0, 2], [0, 2], tail=b"\x00\x01"), struct.pack("<2H", 1, 2))
    data = IndexedDataset(tmp_path / "x")
    assert data.modes is not None
    assert data.modes.tolist() == [0, 1]
    with pytest.raises(UserError, match="multimodal"):
        merge_corpora([tmp_path / "x"], tmp_path / "y")


def test_fingerprint_follows_the_layout_not_the_place(tmp_path: Path) -> None:
    first = write_corpus(tmp_path / "a", DOCUMENTS).fingerprint()
    assert write_corpus(tmp_path / "b", DOCUMENTS).fingerprint() == first
    assert write_corpus(tmp_path / "c", [DOCUMENTS[0] + DOCUMENTS[1]]).fingerprint() != first
    assert write_corpus(tmp_path / "d", [[[5, 6], [7, 8]], [[9, 10]]]).fingerprint() != first


GOOD = index_bytes(8, [3, 1, 2], [0, 6, 8], [0, 2, 3])
TOKENS = struct.pack("<6H", 5, 6, 7, 8, 9, 10)


@pytest.mark.parametrize(
    ("index", "tokens", "message"),
    [
        (b"TNTIDX\x00\x00" + GOOD[9:], TOKENS, r"x\.idx is in the old TNTIDX format.*re-create"),
        (b"PK\x03\x04 nonsense ..........................", TOKENS, r"x\.idx byte 0 is"),
        (b"", TOKENS, r"x\.idx byte 0 is"),
        (GOOD[:20], TOKENS, r"x\.idx ends at byte 20"),
        (GOOD[:9] + struct.pack("<Q", 2) + GOOD[17:], TOKENS, r"x\.idx byte 9 gives format version 2"),
        (GOOD[:17] + b"\x09" + GOOD[18:], TOKENS, r"x\.idx byte 17 gives token type 9"),
        (GOOD[:-1], TOKENS, rf"x\.idx is {len(GOOD) - 1} bytes long but 3 sentences"),
        (GOOD + b"\x00\x00", TOKENS, rf"x\.idx is {len(GOOD) + 2} bytes long"),
        (index_bytes(8, [3, -1, 2], [0, 6, 8], [0, 2, 3]), TOKENS, r"x\.idx byte 38: sentence 1 has -1 tokens"),
        (index_bytes(8, [3, 1, 2], [2, 6, 8], [0, 2, 3]), TOKENS, r"x\.idx byte 46: sentence 0 starts at byte 2"),
        (index_bytes(8, [3, 1, 2], [0, 6, 9], [0, 2, 3]), TOKENS, r"x\.idx byte 62: sentence 2 starts at byte 9"),
        (index_bytes(8, [3, 1, 2], [0, 6, 8], [1, 2, 3]), TOKENS, r"x\.idx byte 70: the document boundaries"),
        (
            index_bytes(8, [3, 1, 2], [0, 6, 8], [0, 4, 3]),
            TOKENS,
            r"x\.idx byte 86: document 2 starts before document 1",
        ),
        (
            index_bytes(8, [3, 1, 2], [0, 6, 8], [0, 2, 2]),
            TOKENS,
            r"x\.idx byte 86: the last document ends at sentence 2",
        ),
        (index_bytes(8, [3, 1, 2], [0, 6, 8], []), TOKENS, r"x\.idx byte 70: the document boundaries"),
        (GOOD, TOKENS[:-2], r"x\.bin ends at byte 10 but .*x\.idx describes 12 bytes"),
        (GOOD, TOKENS + b"\x00\x00", r"x\.bin has 14 bytes but"),
    ],
)
def test_damaged_files_are_refused_with_the_place(tmp_path: Path, index: bytes, tokens: bytes, message: str) -> None:
    put(tmp_path / "x", index, tokens)
    with pytest.raises(UserError, match=message):
        IndexedDataset(tmp_path / "x")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_files_are_named(tmp_path: Path, suffix: str) -> None:
    put(tmp_path / "x", GOOD, TOKENS)
    (tmp_path / f"x{suffix}").unlink()
    with pytest.raises(UserError, match=rf"x\{suffix} does not exist"):
        IndexedDataset(tmp_path / "x")


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    write_corpus(tmp_path / "x", DOCUMENTS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted() -> None:
        with IndexedWriter(tmp_path / "x", "u2") as writer:
            writer.add_sentence([1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"Token id 70000 does not fit the uint16"),
        IndexedWriter(tmp_path / "x", "u2") as writer,
    ):
        writer.add_sentence([70000])
    with pytest.raises(UserError, match="float16"):
        IndexedWriter(tmp_path / "x", np.float16)
    assert list(tmp_path.iterdir()) == []


def test_best_dtype() -> None:
    assert best_dtype(65499) == np.uint16
    assert best_dtype(65500) == np.int32


def test_merge_equals_writing_everything_at_once(tmp_path: Path) -> None:
    more = [[[11]], [], [[12, 13], [14]]]
    write_corpus(tmp_path / "a", DOCUMENTS)
    write_corpus(tmp_path / "b", more)
    write_corpus(tmp_path / "whole", DOCUMENTS + more + DOCUMENTS)
    merge_corpora([tmp_path / "a", tmp_path / "b", tmp_path / "a"], tmp_path / "merged")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"merged{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_merge_refuses_what_does_not_go_together(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", DOCUMENTS)
    write_corpus(tmp_path / "wide", DOCUMENTS, dtype="i4")
    with pytest.raises(UserError, match=r"stores int32 tokens but .*merged uint16"):
        merge_corpora([tmp_path / "a", tmp_path / "wide"], tmp_path / "merged")
    with pytest.raises(UserError, match="cannot replace its own input"):
        merge_corpora([tmp_path / "a"], tmp_path / "a")
    with pytest.raises(UserError, match="nothing to merge"):
        merge_corpora([], tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))
