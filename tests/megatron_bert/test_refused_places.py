# SPDX-License-Identifier: Apache-2.0
"""Places that cannot be written to: one sentence with the place and the reason, exit code 2, and nothing left there."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_bert.cli import main
from megatron_bert.config_sections import LoggingSettings
from megatron_bert.data.indexed_writer import IndexedWriter
from megatron_bert.training.metrics import Report
from megatron_bert.training.metrics_file import METRICS_FILE, read_metrics
from parallel.errors import UserError
from tests.megatron_bert.data.support import small_vocabulary
from tests.megatron_bert.training.layouts import make_data
from tests.megatron_bert.training.runs import run_settings, write_config


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The cat sat on the mat.\n\n" * 100_000, encoding="utf-8")
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What a command says, after its name."""
    assert main([str(argument) for argument in arguments]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    name = f"megatron-bert {arguments[0]}: "
    assert line.startswith(name)
    return line.removeprefix(name)


def test_preprocess(
    text: Path, tmp_path: Path, full_disk: Path, read_only: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("preprocess", "--input", text, "--tokenizer", small_vocabulary(tmp_path), "--workers", "1")
    for folder, reason in (
        (full_disk, "No space left on device"),
        (read_only, "Read-only file system"),
        (Path("/proc/x"), "No such file or directory"),
        (text / "x", "Not a directory"),
    ):
        said = refused(capsys, *given, "--output-prefix", folder / "corpus")
        assert said.startswith(f"{folder}/corpus_text_sentence cannot be written ({reason}")
    assert list(full_disk.iterdir()) == []


@pytest.mark.parametrize("kind", ["wordpiece", "sentencepiece", "bpe"])
def test_train_tokenizer(text: Path, read_only: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    for place, reason in ((read_only, "Read-only file system"), (text / "x", "Not a directory")):
        given = ("train-tokenizer", "--input", text, "--vocab-size", "30", "--type", kind, "--output", place)
        assert refused(capsys, *given).startswith(f"{place} cannot be written ({reason}")


def test_train_tokenizer_where_only_its_directory_can_be_made(
    text: Path, one_name_left: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("train-tokenizer", "--input", text, "--vocab-size", "30", "--output", one_name_left / "new")
    assert "(No space left on device" in refused(capsys, *given)
    assert list(one_name_left.iterdir()) == []


def test_names_that_are_too_long(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_data(tmp_path)
    config = write_config(run_settings(tmp_path, tmp_path / "run"), tmp_path / "settings.yaml")
    place = tmp_path / ("n" * 300)
    before = sorted(tmp_path.iterdir())
    for given in (
        ("train-tokenizer", "--input", text, "--vocab-size", "30", "--output", place),
        ("schedule", "--pipeline", "2", "--microbatches", "2", "--schedule", "gpipe", "--trace", place),
        ("pretrain", config, f"training.run_dir={place}"),
    ):
        said = refused(capsys, *given)
        assert f"{place}" in said
        assert "(File name too long" in said
        assert "give " in said
        assert "another file" in said or "shorter name" in said
    assert sorted(tmp_path.iterdir()) == before


def test_schedule(full_disk: Path, read_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("schedule", "--pipeline", "2", "--microbatches", "2", "--schedule", "gpipe")
    (full_disk / "rest").write_bytes(bytes(full_disk_free(full_disk)))
    for folder, reason in ((full_disk, "No space left on device"), (read_only, "Read-only file system")):
        for option in ("--png", "--trace"):
            said = refused(capsys, *given, option, folder / "file")
            assert said.startswith(f"{folder}/file cannot be written ({reason}")
            assert said.endswith(f"give {option} another file")
    assert [path.name for path in full_disk.iterdir()] == ["rest"]


def full_disk_free(place: Path) -> int:
    """Bytes that a file can still have there."""
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize


def test_pretrain(tmp_path: Path, read_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_data(tmp_path)
    config = write_config(run_settings(tmp_path, tmp_path / "run"), tmp_path / "settings.yaml")
    said = refused(capsys, "pretrain", config, f"data.cache_dir={read_only}")
    assert "(Read-only file system" in said
    assert said.endswith("set data.cache_dir to a directory with room that you may write to")
    assert "Read-only file system" in refused(capsys, "pretrain", config, f"training.run_dir={read_only}/run")


def write_sentence(prefix: Path) -> None:
    with IndexedWriter(prefix, "u2") as writer:
        writer.add_sentence(np.arange(5))
        writer.end_document()


def test_a_corpus_that_fits_in_the_buffer_of_its_file(full_disk: Path) -> None:
    (full_disk / "rest").write_bytes(bytes(full_disk_free(full_disk)))
    with pytest.raises(UserError, match="corpus cannot be written"):
        write_sentence(full_disk / "corpus")
    assert [path.name for path in full_disk.iterdir()] == ["rest"]


def test_metrics_wait_for_room(full_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = {"loss": 1.0}
    settings = LoggingSettings(tensorboard=False, progress=False)
    with Report(full_disk, settings, active=True, start=0, steps=3) as report:
        rest = full_disk / "rest"
        rest.write_bytes(bytes(full_disk_free(full_disk)))
        for step in range(200):
            report.evaluation(step, scores)
        assert capsys.readouterr().out.count("warning: metrics.jsonl cannot be written (No space left on device)") == 1
        rest.unlink()
        report.evaluation(200, scores)
    assert [row["step"] for row in read_metrics(full_disk / METRICS_FILE)] == [*range(201)]


def test_metrics_that_are_lost_at_the_end_are_a_warning(full_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Report(full_disk, LoggingSettings(progress=False), active=True, start=0, steps=3) as report:
        report.evaluation(1, {"loss": 1.0})
        rest = full_disk / "rest"
        rest.write_bytes(bytes(full_disk_free(full_disk)))
        for step in range(2, 200):
            report.evaluation(step, {"loss": 1.0})
        lines = capsys.readouterr().out
        assert lines.count("warning: TensorBoard's events cannot be written (No space left on device)") == 1
        rest.unlink()
        report.evaluation(200, {"loss": 1.0})
        assert "TensorBoard's events can be written again\n" in capsys.readouterr().out
        rest.write_bytes(bytes(full_disk_free(full_disk)))
        for step in range(201, 400):
            report.evaluation(step, {"loss": 1.0})
    assert re.search(
        r"warning: the last \d+ rows of metrics.jsonl could not be written, and are lost", capsys.readouterr().out
    )
    found = EventAccumulator(str(full_disk / "tensorboard")).Reload().Scalars("valid/loss")
    assert {1, 200} <= {event.step for event in found}
