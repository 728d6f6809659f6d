"""Tables, malformed rows and fingerprints of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from megatron_bert.tasks.rows import BadRows, Row, RowError, file_fingerprint, read_lines, read_table
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
