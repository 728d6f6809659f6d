# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import zstandard

from megatron_bert.data.inputs import DocumentReader
from megatron_bert.data.text_files import RowReader
from parallel.errors import UserError

JSON_LINES = '{"text": "one\\nline"}\n\n{"text": "zwei ä", "id": 2}\n{"text": ""}'.encode()
JSON_TEXTS = ["one\nline", "zwei ä", ""]
PLAIN = b"one\nline\n\n \n\nzwei \xc3\xa4\n"
PLAIN_TEXTS = ["one\nline", "zwei ä"]


def texts(path: Path, content: bytes, **options: str) -> list[str]:
    path.write_bytes(content)
    return list(DocumentReader([path], **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.ndjson", "x", "x.data", "x.jsonl.bak"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    assert texts(tmp_path / name, JSON_LINES) == JSON_TEXTS


@pytest.mark.parametrize("name", ["x.txt", "x", "wiki.train.raw"])
def test_plain_text(tmp_path: Path, name: str) -> None:
    assert texts(tmp_path / name, PLAIN) == PLAIN_TEXTS


def test_text_that_starts_like_json_is_text_if_named_so(tmp_path: Path) -> None:
    assert texts(tmp_path / "x.txt", b"{ not json\n") == ["{ not json"]


@pytest.mark.parametrize(
    ("suffix", "content", "expected"), [("jsonl", JSON_LINES, JSON_TEXTS), ("txt", PLAIN, PLAIN_TEXTS)]
)
def test_windows_line_ends_byte_order_marks_and_compression(
    tmp_path: Path, suffix: str, content: bytes, expected: list[str]
) -> None:
    windows = b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")
    assert texts(tmp_path / f"w.{suffix}", windows) == expected
    assert texts(tmp_path / f"x.{suffix}.gz", gzip.compress(windows)) == expected
    assert texts(tmp_path / f"y.{suffix}.zst", zstandard.compress(windows)) == expected
    two_frames = zstandard.compress(windows[:7]) + zstandard.compress(windows[7:])
    assert texts(tmp_path / f"z.{suffix}.zst", two_frames) == expected


def test_empty_files_have_no_documents(tmp_path: Path) -> None:
    assert texts(tmp_path / "x.jsonl", b"") == []
    assert texts(tmp_path / "x.txt", b"\n\n") == []


def test_long_compressed_documents(tmp_path: Path) -> None:
    document = "word " * 500_000
    assert texts(tmp_path / "x.txt.zst", zstandard.compress(document.encode())) == [document]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_truncated_and_mislabeled_archives_are_named(tmp_path: Path, compress: object) -> None:
    suffix = "gz" if compress is gzip.compress else "zst"
    content = compress(b"some text\n" * 1000)  # type: ignore[operator]
    path = tmp_path / f"x.txt.{suffix}"
    with pytest.raises(UserError, match=rf"x\.txt\.{suffix} cannot be read"):
        texts(path, content[: len(content) // 2])
    with pytest.raises(UserError, match=rf"x\.txt\.{suffix} cannot be read"):
        texts(path, b"plain after all")


BAD_ROWS = [
    (b'{"text": "broken\n', r"x\.jsonl line 2 is not JSON"),
    (b"[" * 100_000 + b"\n", r"x\.jsonl line 2 is not JSON"),
    (b'{"body": "b", "title": "t"}\n', r'x\.jsonl line 2 has no key "text" \(found: body, title\)'),
    (b'["text"]\n', r'x\.jsonl line 2 has no key "text" \(found: list\)'),
    (b'{"text": null}\n', r'x\.jsonl line 2 holds null under "text"'),
    (b'{"text": "\xff"}\n', r"x\.jsonl line 2 is not UTF-8 at byte 10 of the line"),
    (b'{"text": "\\ud83d"}\n', r"x\.jsonl line 2 holds half of a surrogate pair"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_bad_rows_stop_with_file_and_line_or_are_counted(tmp_path: Path, row: bytes, message: str) -> None:
    content = b'{"text": "a"}\n' + row + b'{"text": "\\ud83d\\ude00"}\n'
    with pytest.raises(UserError, match=message):
        texts(tmp_path / "x.jsonl", content)
    reader = DocumentReader([tmp_path / "x.jsonl"], on_bad_row="skip")
    assert list(reader) == ["a", "\U0001f600"]
    assert reader.skipped == 1
    assert reader.bytes_read == len(content)


def test_bad_plain_lines_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.txt line 4 is not UTF-8 at byte 2 of the line"):
        texts(tmp_path / "x.txt", b"a\n\nb\ncc\xff\n")


def test_other_keys_and_mistaken_settings(tmp_path: Path) -> None:
    assert texts(tmp_path / "x.jsonl", b'{"body": "b"}\n', json_key="body") == ["b"]
    with pytest.raises(UserError, match=r"missing\.txt does not exist"):
        RowReader(tmp_path / "missing.txt")
    with pytest.raises(UserError, match='on_bad_row "ignore"'):
        DocumentReader([], on_bad_row="ignore")  # type: ignore[arg-type]


def test_rows_know_their_lines(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\n\na\nb\n\n\nc")
    assert [(row.line, row.data) for row in RowReader(tmp_path / "x.txt")] == [(3, b"a\nb"), (7, b"c")]
