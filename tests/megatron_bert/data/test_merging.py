# SPDX-License-Identifier: Apache-2.0
"""Parts of a corpus made apart and joined are the corpus made at once, byte for byte."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bert.data.indexed import IndexedDataset
from megatron_bert.data.indexed_writer import IndexedWriter
from megatron_bert.data.inputs import Part
from megatron_bert.data.merging import merge_corpora, part_prefix
from megatron_bert.data.preprocess import preprocess
from parallel.errors import UserError
from tests.commands import run_command

from .support import small_vocabulary, write_corpus

SUFFIXES = (".bin", ".idx", ".json")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder with text of several kinds, some documents of which are there twice."""
    rng = np.random.default_rng(0)
    words = ["The", "cats", "ran", "on", "a", "mat.", "dog!", "\n"]
    texts = [" ".join(rng.choice(words, size=rng.integers(0, 30))).strip() for _ in range(200)]
    texts += texts[:20]
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:100]))
    (folder / "b.txt.gz").write_bytes(gzip.compress("\n\n".join(text for text in texts[100:] if text).encode()))
    return folder


def make(text: Path, part: Part | None = None, **options: Any) -> Any:
    folder = text.parent
    return preprocess([text], small_vocabulary(folder), folder / "corpus", progress=False, part=part, **options)


def files(prefix: str | Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES]


@pytest.mark.parametrize(("count", "options"), [(1, {}), (4, {"append_eod": True}), (50, {"split_sentences": False})])
def test_merged_parts_equal_the_single_run(text: Path, count: int, options: dict[str, Any]) -> None:
    whole = make(text, **options)
    assert whole.duplicates > 15
    parts = [make(text, Part(number, count), **options) for number in range(1, count + 1)]
    assert parts[0].prefix == part_prefix(whole.prefix, Part(1, count))
    assert sum(part.documents for part in parts) == whole.documents
    report = merge_corpora([part.prefix for part in reversed(parts)], text.parent / "merged")
    assert files(text.parent / "merged") == files(whole.prefix)
    assert (report.documents, report.sentences, report.tokens) == (whole.documents, whole.sentences, whole.tokens)
    assert (report.duplicates, report.corpora) == (whole.duplicates, count)


def test_parts_by_the_command_line(text: Path) -> None:
    folder = text.parent
    small_vocabulary(folder)
    common = ("preprocess", "--tokenizer", "vocab.txt", "--output-prefix", "out/c", "--workers", "1")
    assert run_command(*common, "--input", "text", folder=folder).code == 0
    for number in (1, 2):
        done = run_command(*common, "--input", "text/*", "--part", f"{number}/2", folder=folder)
        assert done.code == 0, done.text
    prefixes = [f"out/c_text_sentence.part-0000{number}-of-00002.idx" for number in (1, 2)]
    done = run_command("merge", *prefixes, "--output", "out/merged", folder=folder)
    assert done.code == 0, done.text
    assert "of 2 corpora" in done.text
    assert "equal an earlier one" in done.text
    assert files(folder / "out" / "merged") == files(folder / "out" / "c_text_sentence")
    done = run_command("merge", prefixes[1], "--output", "out/other", folder=folder)
    assert (done.code, "1/2 are not given" in done.text) == (2, True)


def test_a_killed_part_starts_again_alone(text: Path) -> None:
    """Killed at a random moment, it leaves nothing under its name, and nothing at all once it has run again."""
    folder = text.parent
    with (text / "a.jsonl").open("a") as file:
        file.write(json.dumps({"text": "The cat sat. The dog ran! " * 30}) + "\n")
        file.writelines(json.dumps({"text": f"The cat sat {number}. The dog ran!"}) + "\n" for number in range(20_000))
    prefix = part_prefix(f"{folder}/corpus_text_sentence", Part(1, 2))
    program = (
        "import sys\n"
        "from megatron_bert.data.inputs import Part\n"
        "from megatron_bert.data.preprocess import preprocess\n"
        "preprocess([sys.argv[1]], sys.argv[2], sys.argv[3], progress=False, part=Part(1, 2))\n"
    )
    arguments = [sys.executable, "-c", program, text, small_vocabulary(folder), folder / "corpus"]
    process = subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])})
    while not any(path.stat().st_size for path in folder.glob("corpus*.tmp")) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.random() * 0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = list(folder.glob("corpus*"))
    if process.returncode == -signal.SIGKILL:
        assert [path.suffix for path in left] == [".tmp"]
    for path in left:
        os.utime(path, (0, 0))  # abandoned long ago
    for part in (Part(1, 2), Part(2, 2)):
        make(text, part)
    assert not list(folder.glob("corpus*.tmp"))
    merge_corpora([prefix, prefix.replace("00001-", "00002-")], folder / "merged")
    assert files(folder / "merged") == files(make(text).prefix)


def test_files_of_a_living_writer_stay(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", "u2") as first:
        for path in tmp_path.glob("*.tmp"):
            os.utime(path, (0, 0))
        with IndexedWriter(tmp_path / "x", "u2"):
            pass
        first.add_sentence([1, 2])
        first.end_document()
    assert IndexedDataset(tmp_path / "x")[0].tolist() == [1, 2]


def edit_note(prefix: str, **changes: Any) -> None:
    note = json.loads(Path(f"{prefix}.json").read_text())
    for key, value in changes.items():
        (note["part"] if key in note["part"] else note)[key] = value
    Path(f"{prefix}.json").write_text(json.dumps(note))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "Of the 3 parts of the corpus, 2/3 are not given"),
        ("twice", "are the same part"),
        ("counts", "is one of 3 parts and .* one of 2: give those of one"),
        ("settings", "made with different settings"),
        ("inputs", "or other input files"),
        ("moved", "does not begin where .* ends"),
        ("note", "is not a part, but others are"),
        ("tokenizer", "different tokenizers"),
        ("damaged", "is damaged"),
    ],
)
def test_parts_that_do_not_make_a_whole(text: Path, what: str, message: str) -> None:
    prefixes = [make(text, Part(number, 3)).prefix for number in (1, 2, 3)]
    if what == "missing":
        del prefixes[1]
    elif what == "twice":
        prefixes.append(prefixes[0])
    elif what == "counts":
        prefixes[2] = make(text, Part(2, 2)).prefix
    elif what == "settings":
        make(text, Part(3, 3), append_eod=True)
    elif what == "inputs":
        with (text / "a.jsonl").open("a") as file:
            file.write('{"text": "the cat"}\n')
        make(text, Part(3, 3))
    elif what == "moved":
        edit_note(prefixes[1], begins=[0, 7])
    elif what == "note":
        Path(f"{prefixes[1]}.json").unlink()
    elif what == "tokenizer":
        edit_note(prefixes[1], tokenizer="0" * 64)
    elif what == "damaged":
        Path(f"{prefixes[1]}.json").write_text("{")
    with pytest.raises(UserError, match=message):
        merge_corpora(prefixes, text.parent / "merged")
    assert not list(text.parent.glob("merged*"))


def test_notes_of_different_corpora_are_joined(text: Path) -> None:
    english, german = (
        make(text),
        preprocess([text], text.parent / "vocab.txt", text.parent / "de", progress=False, language="de"),
    )
    report = merge_corpora([english.prefix, german.prefix], text.parent / "merged")
    note = json.loads((text.parent / "merged.json").read_text())
    assert (note["language"], note["sentence_splitter"]) == (["en", "de"], "sentencex")
    assert note["documents"] == report.documents == 2 * english.documents
    assert report.duplicates == english.duplicates + english.documents
    assert report.noted
    write_corpus(text.parent / "nvidia", [[[5, 6]]])
    report = merge_corpora([english.prefix, text.parent / "nvidia"], text.parent / "merged")
    assert not report.noted
    assert not (text.parent / "merged.json").exists()


def test_a_directory_is_not_an_output(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path} is a directory: give a prefix, such as {tmp_path}/corpus"):
        merge_corpora([tmp_path / "a"], tmp_path)
