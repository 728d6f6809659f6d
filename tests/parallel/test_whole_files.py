# SPDX-License-Identifier: Apache-2.0
"""Nothing that is written is ever half there."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path

import pytest

from parallel.errors import UserError
from parallel.whole_files import reporting, whole_directory, whole_file, write_json


class TestWholeFile:
    def test_takes_the_place_of_another_at_the_end(self, tmp_path: Path) -> None:
        path = tmp_path / "values.json"
        write_json(path, {"a": 1})
        with whole_file(path, sync=True) as file:
            file.write("new")
            file.flush()
            assert json.loads(path.read_text()) == {"a": 1}
        assert path.read_text() == "new"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
    def test_an_error_leaves_what_was_there(self, tmp_path: Path, error: BaseException) -> None:
        path = tmp_path / "values"
        path.write_bytes(b"old")

        def write() -> None:
            with whole_file(path, "wb") as file:
                file.write(b"half")
                raise error

        with pytest.raises(type(error)):
            write()
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_writers_at_once_do_not_mix(self, tmp_path: Path) -> None:
        def write(letter: str) -> None:
            for _ in range(20):
                with whole_file(tmp_path / "file") as file:
                    for _ in range(10):
                        file.write(letter * 1000)
                        file.flush()

        writers = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        text = (tmp_path / "file").read_text()
        assert len(text) == 10_000
        assert len(set(text)) == 1
        assert len(list(tmp_path.iterdir())) == 1

    def test_a_name_of_the_greatest_length(self, tmp_path: Path) -> None:
        with whole_file(tmp_path / ("n" * 255)) as file:
            file.write("text")
        assert (tmp_path / ("n" * 255)).read_text() == "text"

    def test_permissions_follow_the_umask(self, tmp_path: Path) -> None:
        (tmp_path / "plain").touch()
        write_json(tmp_path / "whole", {})
        assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_the_file_system_refuses_is_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"^corpus cannot be written \(No such file or directory at .*\): make room$"),
        reporting("written", "corpus", "make room"),
        whole_file(tmp_path / "missing" / "file"),
    ):
        pass


class TestWholeDirectory:
    def test_takes_the_place_of_another(self, tmp_path: Path) -> None:
        for number in (1, 2):
            with whole_directory(tmp_path / "run" / "model") as directory:
                (directory / f"file{number}").touch()
                assert not (tmp_path / "run" / "model" / f"file{number}").exists()
            assert [path.name for path in (tmp_path / "run" / "model").iterdir()] == [f"file{number}"]
            assert [path.name for path in (tmp_path / "run").iterdir()] == ["model"]

    def test_an_error_leaves_what_was_there(self, tmp_path: Path) -> None:
        def write(name: str, error: BaseException | None = None) -> None:
            with whole_directory(tmp_path / "model") as directory:
                (directory / name).touch()
                if error is not None:
                    raise error

        write("first")
        with pytest.raises(KeyboardInterrupt):
            write("second", KeyboardInterrupt())
        assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["model", "model/first"]

    def test_what_a_killed_process_has_left_is_not_in_the_way(self, tmp_path: Path) -> None:
        for name in ("model", "model.partial", "model.old.partial"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "half").touch()
        with whole_directory(tmp_path / "model") as directory:
            (directory / "whole").touch()
        assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["model", "model/whole"]

    def test_a_kill_between_the_last_two_renames_loses_nothing(self, tmp_path: Path) -> None:
        for name in ("model.partial", "model.old.partial"):
            (tmp_path / name).mkdir()
            (tmp_path / name / name).touch()
        with pytest.raises(OSError, match="disk"), whole_directory(tmp_path / "model"):
            raise OSError("the disk is full")
        assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
            "model",
            "model/model.old.partial",
        ]
