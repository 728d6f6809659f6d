# SPDX-License-Identifier: Apache-2.0
"""Rows of pipes, handed on as they arrive."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_bert.cli import main
from megatron_bert.finetuning.arrivals import Rows, arriving
from megatron_bert.finetuning.finetune import finetune
from tests.megatron_bert.finetuning.support import make_run


class Ends:
    """Both ends of a pipe."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        self.reader, self.writer = os.fdopen(reading, encoding="utf-8"), os.fdopen(writing, "wb", buffering=0)

    def close(self) -> None:
        self.reader.close()
        self.writer.close()


@pytest.fixture
def pipe() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


class Folder(io.StringIO):
    """A directory, opened as no file can be."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.descriptor = os.open(path, os.O_RDONLY)

    def fileno(self) -> int:
        return self.descriptor

    def close(self) -> None:
        if not self.closed:  # it is called once more when the object goes, and another file may have the number by then
            os.close(self.descriptor)
        super().close()


def all_of(rows: Rows, most: int) -> list[list[str]]:
    return list(iter(lambda: rows.take(most), []))


class TestPipe:
    def test_what_is_there_is_taken_without_waiting_for_more(self, pipe: Ends) -> None:
        with arriving(pipe.reader) as rows:
            for number in range(3):
                pipe.writer.write(b"%d\n" % number)
                assert rows.take(100) == [str(number)]

    def test_a_line_in_pieces_is_one(self, pipe: Ends) -> None:
        with arriving(pipe.reader) as rows:
            for piece in (b"caf", b"\xc3", b"\xa9", b"\xff\nne"):
                pipe.writer.write(piece)
                time.sleep(0.01)
            assert rows.take(5) == ["café\udcff"]
            pipe.writer.write(b"xt")
            pipe.writer.close()
            assert rows.take(5) == ["next"], "the last needs no line end"
            assert rows.take(5) == []

    def test_rows_that_come_within_the_time_come_together(self, pipe: Ends) -> None:
        with arriving(pipe.reader) as rows:
            pipe.writer.write(b"1\n")
            threading.Timer(0.02, pipe.writer.write, [b"2\n3\n"]).start()
            assert rows.take(3, wait=60.0) == ["1", "2", "3"]

    def test_more_than_a_pipe_holds(self, pipe: Ends) -> None:
        """Without more lines read ahead than were asked for."""
        lines = [f"{number} {'x' * 1000}" for number in range(500)]

        def write() -> None:
            pipe.writer.write("\n".join(lines).encode())
            pipe.writer.close()

        threading.Thread(target=write).start()
        with arriving(pipe.reader) as rows:
            found = all_of(rows, 70)
        assert [line for block in found for line in block] == lines
        assert max(map(len, found)) <= 70

    def test_it_is_left_while_it_stays_open(self, pipe: Ends) -> None:
        before = threading.active_count()
        with arriving(pipe.reader) as rows:
            pipe.writer.write(b"1\n2\n3\n4\n")
            rows.take(1)
        assert threading.active_count() == before

    def test_what_cannot_be_read(self, tmp_path: Path) -> None:
        with Folder(tmp_path) as file, pytest.raises(IsADirectoryError), arriving(file) as rows:
            rows.take(1)


def test_files_are_read_in_whole_blocks(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("1\n2\n3\n", encoding="utf-8")
    with (tmp_path / "rows").open(encoding="utf-8") as file, arriving(file) as rows:
        assert all_of(rows, 2) == [["1\n", "2\n"], ["3\n"]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arrivals")
    finetune(make_run(folder, training__steps=2))
    return folder / "run"


class Coprocess:
    """`megatron-bert predict` in a thread, between two pipes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
        self.questions, self.answers = Ends(), Ends()
        monkeypatch.setattr(sys, "stdin", self.questions.reader)
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(self.answers.writer))
        self.code: int | None = None
        self.thread = threading.Thread(target=self._run, args=[["predict", *arguments, "--device", "cpu"]], daemon=True)
        self.thread.start()

    def _run(self, arguments: list[str]) -> None:
        self.code = main(arguments)

    def ask(self, **row: object) -> None:
        self.questions.writer.write(json.dumps(row).encode() + b"\n")

    def ended(self) -> int | None:
        self.thread.join(30.0)
        return self.code


@pytest.mark.parametrize("options", [[], ["--batch-size", "1"], ["--stream"], ["--stream", "--wait", "0.001"]])
def test_each_row_is_answered_while_the_pipe_stays_open(
    trained: Path, options: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    process = Coprocess(monkeypatch, str(trained), *options)
    for number in range(3):
        process.ask(id=number, text="w1 w2")
        answer = json.loads(process.answers.reader.readline())
        assert (answer["id"], "label" in answer) == (number, True)
    # A row that cannot be read ends it, although there may be more.
    process.ask(id="good", text="w1")
    process.ask(id="bad")
    assert json.loads(process.answers.reader.readline())["id"] == "good"
    assert process.ended() == 2
    assert 'line 5 has no "text"' in capfd.readouterr().err


def test_it_ends_quietly_when_nobody_reads_answers(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    process = Coprocess(monkeypatch, str(trained))
    process.ask(text="w1")
    process.answers.reader.readline()
    process.answers.reader.close()
    process.ask(text="w1")
    assert process.ended() == 141
    assert capfd.readouterr().err == ""
