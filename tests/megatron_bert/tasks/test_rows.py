# SPDX-License-Identifier: Apache-2.0
"""Tables, malformed rows and fingerprints of files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from megatron_bert.tasks.rows import BadRows, Row, RowError, converted, file_fingerprint, structured
from megatron_bert.tasks.tables import read_lines, read_table
from parallel.errors import UserError

from .support import write


def rows(path: Path, kind: str, *, header: bool = True, bad: BadRows | None = None, **options: bool) -> list[Row]:
    return list(read_table(path, kind, header, bad or BadRows("error"), **options))  # type: ignore[arg-type]


def test_tabs_alone_separate_and_quotes_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"a, b\t1\n\n""c"" \t0\n')
    found = rows(path, "tsv")
    assert [row.cells for row in found] == [['"a, b', "1"], ['""c"" ', "0"]]
    assert [(row.line, row.number) for row in found] == [(2, 0), (4, 1)]
    assert found[0].names == ("text", "label")
    assert found[0].where == f"{path} line 2"


def test_byte_order_mark_and_carriage_returns_are_no_text(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbftext\tlabel\r\nx\t1\r\ny\t0"
    assert [row.cells for row in rows(write(tmp_path / "a.tsv", content), "tsv")] == [["x", "1"], ["y", "0"]]
    assert [row.text("text") for row in rows(write(tmp_path / "a.tsv", content), "tsv")] == ["x", "y"]
    content = b'\xef\xbb\xbftext,label\r\n"x, ""z""",1\r\n'
    assert [row.cells for row in rows(write(tmp_path / "a.csv", content), "csv")] == [['x, "z"', "1"]]
    content = b'\xef\xbb\xbf{"text": "x"}\r\n\r\n{"text": "y"}\r\n'
    assert [row.text("text") for row in rows(write(tmp_path / "a.jsonl", content), "jsonl")] == ["x", "y"]


def test_other_line_separators_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "a\u2028b\x0bc\x85d\te\n")
    assert list(read_lines(path)) == [(1, "a\u2028b\x0bc\x85d\te")]


def test_quoted_cells_of_csv_hold_line_ends(tmp_path: Path) -> None:
    found = rows(write(tmp_path / "a.csv", 'text,label\n"two\nlines",1\nnext,0\n'), "csv")
    assert [row.cells for row in found] == [["two\nlines", "1"], ["next", "0"]]
    assert [row.line for row in found] == [2, 4]


BAD = [
    ("tsv", b"text\tlabel\ngood\t1\nshort\nlast\t0\n", 3, "1 columns, expected 2"),
    ("tsv", b"text\tlabel\ngood\t1\na\tb\tc\nlast\t0\n", 3, "3 columns, expected 2"),
    ("tsv", b"text\tlabel\ngood\t1\nna\xefve\t1\nlast\t0\n", 3, "not UTF-8 at character 3"),
    ("tsv", b"text\tlabel\ngood\t1\na\0b\t1\nlast\t0\n", 3, "NUL character at character 2"),
    ("csv", b'text,label\ngood,1\n"a"b,1\nlast,0\n', 3, "not CSV"),
    ("csv", b"text,label\ngood,1\na,b,c\nlast,0\n", 3, "3 columns, expected 2"),
    ("jsonl", b'{"text": "good"}\n{"text": \n{"text": "last"}\n', 2, "not JSON"),
    ("jsonl", b'{"text": "good"}\n["x"]\n{"text": "last"}\n', 2, "a JSON list, expected an object"),
    ("jsonl", b'{"text": "good"}\n{"text": "\\ud800"}\n{"text": "last"}\n', 2, "surrogate pair"),
    ("jsonl", b'{"text": "good"}\n{"text": "\xe4"}\n{"text": "last"}\n', 2, "not UTF-8"),
]


@pytest.mark.parametrize(("kind", "content", "line", "reason"), BAD)
def test_bad_rows(tmp_path: Path, kind: str, content: bytes, line: int, reason: str) -> None:
    path = write(tmp_path / f"a.{kind}", content)
    with pytest.raises(UserError, match=rf"line {line}: .*{reason}.*data\.on_bad_row"):
        rows(path, kind)
    bad = BadRows("skip")
    assert [row.text("text") for row in rows(path, kind, bad=bad)] == ["good", "last"]
    assert [row.number for row in rows(path, kind, bad=BadRows("skip"))] == [0, 2]
    assert bad.count == 1
    assert bad.skipped == {str(path): 1}
    assert f"{path} line {line}" in bad.reasons[0]


def test_an_open_quote_is_one_bad_row(tmp_path: Path) -> None:
    """What follows is read as if that line were not there."""
    rest = "".join(f'row {number},0\n"two\nlines {number}",1\n' for number in range(50))
    path = write(tmp_path / "a.csv", 'text,label\ngood,1\n"open,1\n' + rest + '"again,0\nlast,0\n')
    bad = BadRows("skip")
    found = rows(path, "csv", bad=bad)
    assert len(found) == 1 + 100 + 1
    assert [row.cells for row in found[:3]] == [["good", "1"], ["row 0", "0"], ["two\nlines 0", "1"]]
    assert [row.line for row in found[:3]] == [2, 4, 5]
    assert (found[-1].cells, found[-1].line, bad.count) == (["last", "0"], 155, 2)
    assert "line 3: it is not CSV" in bad.reasons[0]
    assert "line 154: it is not CSV" in bad.reasons[1]


def test_a_csv_cell_may_hold_a_long_document(tmp_path: Path) -> None:
    text = "word " * 60_000
    path = write(tmp_path / "a.csv", f'text,label\n"{text}",1\n')
    assert [row.cells for row in rows(path, "csv")] == [[text, "1"]]


@pytest.mark.parametrize("content", [b"a\ta\n1\t2\n", b"a\t\xff\n1\t2\n", b"a\t\0\n1\t2\n"])
def test_a_bad_header_stops_whatever_the_policy(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError, match="line 1"):
        rows(write(tmp_path / "a.tsv", content), "tsv", bad=BadRows("skip"))


def test_columns_by_position(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "x\ty\nz\n")
    row = rows(path, "tsv", header=False, equal_widths=False)[0]
    assert [row.value(0), row.value(-1)] == ["x", "y"]
    assert (row.has(1), row.has(2), row.has(-2), row.has(-3), row.has("x")) == (True, False, True, False, False)
    with pytest.raises(RowError, match=r"no column 2 .found: 2 columns without names"):
        row.value(2)


def test_a_value_that_is_no_text(tmp_path: Path) -> None:
    row = rows(write(tmp_path / "a.jsonl", '{"text": null}\n'), "jsonl")[0]
    with pytest.raises(RowError, match="holds null, expected text"):
        row.text("text")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.tsv cannot be read .No such file"):
        rows(tmp_path / "nothing.tsv", "tsv")


def test_reasons_are_kept_for_the_first_rows_alone(tmp_path: Path) -> None:
    bad = BadRows("skip")
    rows(write(tmp_path / "a.jsonl", "x\n" * 30), "jsonl", bad=bad)
    assert (bad.count, len(bad.reasons)) == (30, 5)


ROWS = [{"text": "a", "label": 1}, 3, {"text": "\ud800"}, {"text": "b", "label": None}]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_is_rows(tmp_path: Path, indent: int | None) -> None:
    path = write(tmp_path / "a.json", b"\xef\xbb\xbf\n" + json.dumps(ROWS, indent=indent).encode())
    bad = BadRows("skip")
    found = rows(path, "jsonl", bad=bad)
    assert [(row.number, row.where, row.value("text")) for row in found] == [
        (0, f"{path} item 1", "a"),
        (3, f"{path} item 4", "b"),
    ]
    assert [reason.split(": ", 1)[1] for reason in bad.reasons] == [
        "it is a JSON int, expected an object",
        "it holds half of a surrogate pair, which is not valid text",
    ]
    with pytest.raises(UserError, match=r"a\.json begins as a JSON array does, but is not JSON"):
        rows(write(path, '[{"text": "a"},\n'), "jsonl")
    # A line that is a list is a bad row of JSON lines.
    bad = BadRows("skip")
    assert [row.text("text") for row in rows(write(path, '["x"]\n{"text": "a"}\n'), "jsonl", bad=bad)] == ["a"]
    assert "line 1: it is a JSON list" in bad.reasons[0]


@pytest.mark.parametrize(
    ("kind", "content", "reason"),
    [
        ("tsv", b"", "is empty"),
        ("csv", b"\n\n", "is empty"),
        ("jsonl", b" \n", "is empty"),
        ("jsonl", b"[]", "is empty"),
        ("tsv", b"text\tlabel\n", "names its columns in line 1, but holds no usable row"),
        ("jsonl", b"PAR1\x15\x04", "a Parquet file: write its rows as JSON lines"),
        ("csv", b"\x1f\x8b\x08", "compressed by gzip: unpack it"),
    ],
)
def test_files_without_rows(tmp_path: Path, kind: str, content: bytes, reason: str) -> None:
    for policy in ("error", "skip"):
        with pytest.raises(UserError, match=f"a.{kind} .*{reason}"):
            rows(write(tmp_path / f"a.{kind}", content), kind, bad=BadRows(policy))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "content", "reason"),
    [
        ("tsv", "text,label\nx,1\n", r"\(found: text,label\): commas seem .* where tabs were .*data\.format: csv"),
        ("csv", "text\tlabel\nx\t1\n", r"tabs seem .* where commas were expected: .*data\.format: tsv"),
        ("csv", "text;label\nx;1\n", "semicolons seem .*: convert it"),
        ("tsv", '{"text": "x", "label": 1}\n{"text": "y"}\n', r"seems to hold JSON: .*data\.format: jsonl"),
        ("tsv", "text\tlable\nx\t1\ny\t2\n", r"\(found: text, lable\): see data\.columns"),
        ("jsonl", '{"text": "x"}\n{"text": "y"}\n', r"\(found: text\): see data\.columns"),
    ],
)
def test_a_column_that_no_row_has(tmp_path: Path, kind: str, content: str, reason: str) -> None:
    """The file's fault, not a row's: skipping rows is not advice, and skips nothing."""
    path = write(tmp_path / f"a.{kind}", content)
    for policy in ("error", "skip"):
        bad = BadRows(policy)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=rf"no row of .* has a column 'label' .*{reason}") as caught:
            list(converted(rows(path, kind, bad=bad), lambda row: row.value("label"), bad))
        assert "on_bad_row" not in str(caught.value)


@pytest.mark.parametrize("first", ['{"text": "x"}\n{"label": 1}\n', '{"label": 1}\n{"text": "x"}\n'])
def test_a_column_that_a_row_lacks(tmp_path: Path, first: str) -> None:
    path = write(tmp_path / "a.jsonl", first)
    with pytest.raises(
        UserError, match=r"line \d: it has no column 'label' \(found: text\); fix it, or set data\.on_bad"
    ):
        list(converted(rows(path, "jsonl"), lambda row: row.value("label"), BadRows("error")))
    bad = BadRows("skip")
    assert list(converted(rows(path, "jsonl"), lambda row: row.value("label"), bad)) == [1]
    assert bad.count == 1


def test_lists_in_cells() -> None:
    for cell in ('["a", "b\'s"]', "['a', \"b's\"]"):
        assert structured(cell, "it") == ["a", "b's"]
    assert structured(["a"], "it") == ["a"]
    assert structured("a", "it") == "a"
    assert structured("{'text': ['a'], 'answer_start': [3]}", "it") == {"text": ["a"], "answer_start": [3]}
    # As NumPy prints them: Python would join the texts.
    for cell in ("['a' 'b']", "[array(['a'], dtype=object)]", "[" * 2000, "['a',"):
        with pytest.raises(RowError, match="neither JSON nor a Python list: write JSON lines"):
            structured(cell, "it")


def test_fingerprints(tmp_path: Path) -> None:
    path = write(tmp_path / "a" / "x.txt", b"some bytes")
    assert file_fingerprint(path) == {
        "path": str(path),
        "sha256": hashlib.sha256(b"some bytes").hexdigest(),
        "bytes": 10,
    }
    whole = file_fingerprint(tmp_path / "a")
    assert whole["bytes"] == 10
    write(tmp_path / "b" / "x.txt", b"some bytes")
    assert file_fingerprint(tmp_path / "b")["sha256"] == whole["sha256"]
    write(tmp_path / "b" / "y.txt", b"")
    assert file_fingerprint(tmp_path / "b")["sha256"] != whole["sha256"]
