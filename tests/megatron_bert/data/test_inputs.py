# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import ipc, parquet

from megatron_bert.data import compression, table_files
from megatron_bert.data.inputs import DocumentReader, InputRows, Part, find_inputs, parse_part
from megatron_bert.data.rows import decode_row
from parallel.errors import UserError

TEXTS = [f"document {number} of many\nwith {number * 7919} words" for number in range(97)]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def json_lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text, "id": 1}).encode() + b"\n" for text in texts)


def plain(texts: list[str]) -> bytes:
    return "\n\n \n".join(texts).encode()


def table(texts: list[str | None], kind: pa.DataType | None = None) -> pa.Table:
    return pa.table({"id": pa.array(range(len(texts))), "text": pa.array(texts, kind or pa.string())})


def write_arrow(path: Path, texts: list[str], stream: bool) -> None:
    data = table(list(texts))
    with (ipc.new_stream if stream else ipc.new_file)(path, data.schema) as writer:
        writer.write_table(data, max_chunksize=10)


def tar(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def write_input(folder: Path, kind: str, texts: list[str]) -> Path:
    """A file, or a directory, with texts."""
    path = folder / f"x.{kind}"
    inner, _, compression_suffix = kind.partition(".")
    compress = COMPRESS[f".{compression_suffix}" if compression_suffix else ""]
    if inner == "jsonl":
        path.write_bytes(compress(json_lines(texts)))
    elif inner == "txt":
        path.write_bytes(compress(plain(texts)))
    elif inner == "parquet":
        parquet.write_table(table(list(texts)), path, row_group_size=20)
    elif inner in ("arrow", "feather"):
        write_arrow(path, texts, stream=inner == "arrow")
    elif inner == "tar":
        samples = {f"{number:03}.txt": text.encode() for number, text in enumerate(texts[:50])}
        samples["049.json"] = b'{"caption": 1}'
        samples |= {
            f"{number:03}.json": json.dumps({"text": text}).encode() for number, text in enumerate(texts[50:], 50)
        }
        path.write_bytes(compress(tar(samples)))
    else:
        assert kind == "saved"
        path.mkdir()
        for shard in range(2):
            write_arrow(
                path / f"data-0000{shard}-of-00002.arrow", texts[shard * 40 : (shard + 1) * 40 + 17 * shard], True
            )
        files = [{"filename": f"data-0000{shard}-of-00002.arrow"} for shard in range(2)]
        (path / "state.json").write_text(json.dumps({"_data_files": files}))
        (path / "dataset_info.json").write_text("{}")
    return path


KINDS = [
    *(f"{name}{suffix}" for name in ("jsonl", "txt") for suffix in COMPRESS),
    "parquet",
    "arrow",
    "feather",
    "saved",
    "tar",
    "tar.gz",
]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that a compressed file of a test has several, and batches of few rows."""
    monkeypatch.setattr(compression, "READ_BYTES", 64)
    monkeypatch.setattr(table_files, "BATCH_ROWS", 7)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_whole_and_in_parts(tmp_path: Path, kind: str, small_blocks: None) -> None:
    path = write_input(tmp_path, kind, TEXTS)
    reader = DocumentReader([path])
    assert list(reader) == TEXTS
    assert reader.bytes_read == reader.total
    for count in (2, 3, 7):
        found: list[list[str]] = []
        notes: list[Any] = []
        for number in range(1, count + 1):
            rows = InputRows([path], part=Part(number, count))
            found.append([decode_row(row) for row in rows])
            notes.append(rows.note())
            assert rows.bytes_read == rows.bytes_to_read
        assert [text for part in found for text in part] == TEXTS
        assert all(before["ends"] == after["begins"] for before, after in pairwise(notes))
        if kind in ("jsonl", "txt", "parquet", "tar"):
            assert min(map(len, found)) >= len(TEXTS) // count - 3, "parts are of equal size"


@pytest.mark.parametrize("seed", range(4))
def test_parts_of_many_small_files(tmp_path: Path, seed: int, small_blocks: None) -> None:
    rng = np.random.default_rng(seed)
    expected = []
    for number, kind in enumerate(rng.choice(["jsonl", "txt", "txt.gz", "parquet", "empty.txt", "arrow"], size=12)):
        folder = tmp_path / f"{number:02}"
        folder.mkdir()
        texts = [f"{number} {'word ' * int(size)}end" for size in rng.integers(0, 60, size=rng.integers(1, 9))]
        if kind == "empty.txt":
            (folder / "x.txt").write_bytes(b"\n" * int(rng.integers(0, 3)))
            continue
        write_input(folder, str(kind), texts)
        expected += texts
    for count in (2, 5, 40):
        parts = [InputRows([tmp_path], part=Part(number, count)) for number in range(1, count + 1)]
        assert [decode_row(row) for part in parts for row in part] == expected
        notes: list[Any] = [part.note() for part in parts]
        assert all(before["ends"] == after["begins"] for before, after in pairwise(notes))


def test_directories_patterns_and_their_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("b/2.txt", "b/10.jsonl", "a.txt.gz", "README.md", "_SUCCESS", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [str(tmp_path / name) for name in ("a.txt.gz", "b/10.jsonl", "b/2.txt")]
    assert find_inputs([tmp_path]) == names
    assert "note: 1 other files in" in capsys.readouterr().err
    assert find_inputs([f"{tmp_path}/**/*.txt*"]) == [names[0], names[2]]
    assert find_inputs([f"{tmp_path}/b", names[0]]) == [names[1], names[2], names[0]]
    (tmp_path / "odd[1].txt").touch()
    assert find_inputs([tmp_path / "odd[1].txt"]) == [str(tmp_path / "odd[1].txt")]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("compress", COMPRESS.values(), ids=COMPRESS)
def test_standard_input(compress: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (json_lines(TEXTS), plain(TEXTS)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(compress(content))))
        assert list(DocumentReader(["-"])) == TEXTS


def test_a_pipe_of_compressed_text(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.write(writing, gzip.compress(json_lines(TEXTS[:9])))
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        monkeypatch.setattr("sys.stdin", pipe)
        assert list(DocumentReader(["-"])) == TEXTS[:9]


def test_a_table_on_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    parquet.write_table(table(list(TEXTS)), content)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.getvalue())))
    with pytest.raises(UserError, match=r"Standard input is a \.parquet table, which no pipe can carry"):
        list(DocumentReader(["-"]))


def test_standard_input_is_read_once() -> None:
    with pytest.raises(UserError, match="Standard input can be read once"):
        InputRows(["-", "-"])
    with pytest.raises(UserError, match="Standard input can be read once"):
        InputRows(["-"], part=Part(1, 2))


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/4"])
def test_impossible_parts(text: str) -> None:
    with pytest.raises(UserError, match="must be K/N"):
        parse_part(text)
    assert parse_part("2/4").bounds(10) == (2, 5)


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_types_of_strings(tmp_path: Path, kind: pa.DataType) -> None:
    write = table(["a", "ä", "a"], kind)
    parquet.write_table(write, tmp_path / "x.parquet")
    with ipc.new_file(tmp_path / "x.arrow", write.schema) as writer:
        writer.write_table(write)
    for name in ("x.parquet", "x.arrow"):
        assert list(DocumentReader([tmp_path / name])) == ["a", "ä", "a"]


def test_rows_that_are_no_text_are_named_or_counted(tmp_path: Path) -> None:
    parquet.write_table(table(["a", None, "b"]), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r'x\.parquet row 2 is null in column "text"'):
        list(DocumentReader([tmp_path / "x.parquet"]))
    reader = DocumentReader([tmp_path / "x.parquet"], on_bad_row="skip")
    assert (list(reader), reader.skipped) == (["a", "b"], 1)
    parquet.write_table(pa.table({"text": pa.array([b"\xff"])}), tmp_path / "y.parquet")
    with pytest.raises(UserError, match=r"y\.parquet row 1 is not UTF-8 at byte 0 of the value"):
        list(DocumentReader([tmp_path / "y.parquet"]))


def bad_inputs() -> dict[str, tuple[Any, str]]:
    """Name -> what writes the input, and the message."""

    def written(data: pa.Table) -> Any:
        return lambda path: parquet.write_table(data, path)

    content = io.BytesIO()
    parquet.write_table(table(TEXTS), content, row_group_size=20)  # type: ignore[arg-type]
    whole = content.getvalue()
    damaged = whole[:100] + bytes(200) + whole[300:]
    nested = pa.table({"text": [["a"]]})
    return {
        "missing.parquet": (lambda path: None, "does not exist"),
        "no*.txt": (lambda path: None, "matches no file"),
        "empty.parquet": (lambda path: path.touch(), "cannot be read as a table: .*0 bytes"),
        "text.parquet": (lambda path: path.write_text("some text " * 9), "cannot be read as a table"),
        "cut.parquet": (lambda path: path.write_bytes(whole[:-50]), "cannot be read as a table"),
        "damaged.parquet": (lambda path: path.write_bytes(damaged), "cannot be read as a table"),
        "other.parquet": (
            written(pa.table({"body": ["a"], "title": ["b"]})),
            r'no column "text" \(found: body, title\): name the text with --json-key',
        ),
        "nested.parquet": (written(nested), r'holds list<.*> in column "text": expected strings; .* field of it'),
        "numbers.parquet": (written(pa.table({"text": [1]})), 'holds int64 in column "text": expected strings'),
        "x.parquet.gz": (written(nested), "table in a compressed file"),
        "text.arrow": (lambda path: path.write_text("some text " * 9), "cannot be read as a table"),
        "empty.arrow": (lambda path: path.touch(), "cannot be read as a table"),
        "empty.tar": (lambda path: path.write_bytes(tar({"a.png": b"x"})), r"holds no member \.txt or \.json"),
        "text.tar": (lambda path: path.write_text("some text " * 99), r"text\.tar cannot be read after its start"),
        "folder": (lambda path: path.mkdir(), "holds no file of text"),
        "splits": (
            lambda path: (path.mkdir(), (path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')),
            r"is a dataset with splits: give .*splits/train or .*splits/test",
        ),
    }


@pytest.mark.parametrize("name", bad_inputs())
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, name: str) -> None:
    write, message = bad_inputs()[name]
    write(tmp_path / name)
    with pytest.raises(UserError, match=message) as caught:
        list(DocumentReader([tmp_path / name]))
    assert "\n" not in str(caught.value)


def test_other_columns_are_not_read(tmp_path: Path) -> None:
    """A file damaged in another column gives its text."""
    data = pa.table({"text": TEXTS, "noise": np.random.default_rng(0).random(len(TEXTS))})
    for name in ("x.parquet", "x.arrow"):
        path = tmp_path / name
        parquet.write_table(data, path, compression="none", use_dictionary=False)
        content = path.read_bytes()
        noise = data["noise"].to_numpy().tobytes()
        assert noise in content
        path.write_bytes(content.replace(noise, b"\xff" * len(noise)))
        assert list(DocumentReader([tmp_path / "x.parquet"])) == TEXTS


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(table(["a"]), tmp_path / "x.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow, which is not installed: pip install 'megatron-bert\[arrow\]'"):
        DocumentReader([tmp_path / "x.parquet"])


def test_a_file_that_several_inputs_name_is_read_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.jsonl", "sub/b.txt"):
        (tmp_path / name).write_text("x")
    wanted = [str(tmp_path / "a.jsonl"), str(tmp_path / "sub" / "b.txt")]
    assert find_inputs([tmp_path, tmp_path / "a.jsonl"]) == wanted
    assert "1 inputs name a file again" in capsys.readouterr().err
    assert find_inputs([f"{tmp_path}/**"]) == wanted, "which matches files and the directories that hold them"
