# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bert.data import preprocess as module
from megatron_bert.data.indexed import IndexedDataset
from megatron_bert.data.preprocess import PreprocessReport, check_tokenizer, preprocess
from megatron_bert.data.tokenizers import load_tokenizer
from parallel.errors import UserError

from .support import end_this_process, small_vocabulary

TEXTS = ["The cat sat. The dog ran!\nOn the mat", "  \n ", "A b", "\u200b", "the cat"]


def json_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run(folder: Path, inputs: list[Path], **options: Any) -> PreprocessReport:
    vocabulary = small_vocabulary(folder)
    return preprocess(inputs, vocabulary, folder / "out" / "corpus", progress=False, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "out").iterdir())}


def decoded(folder: Path, prefix: str) -> list[list[str]]:
    tokenizer, data = load_tokenizer(folder / "vocab.txt"), IndexedDataset(prefix)
    bounds = data.document_indices
    return [[tokenizer.decode(data[i]) for i in range(a, b)] for a, b in itertools.pairwise(bounds)]


def test_sentences_of_documents(tmp_path: Path) -> None:
    report = run(tmp_path, [json_lines(tmp_path / "x.jsonl", TEXTS)])
    assert report.prefix == str(tmp_path / "out" / "corpus_text_sentence")
    assert decoded(tmp_path, report.prefix) == [["the cat sat.", "the dog ran!", "on the mat"], ["a b"], ["the cat"]]
    assert (report.documents, report.sentences, report.tokens) == (3, 5, 15)
    assert (report.skipped_empty, report.skipped_bad) == (2, 0)
    assert report.seconds > 0
    assert list(files(tmp_path)) == [f"corpus_text_sentence.{suffix}" for suffix in ("bin", "idx", "json")]
    assert IndexedDataset(report.prefix).dtype == np.uint16


@pytest.mark.parametrize(("options", "used"), [({}, "sentencex"), ({"splitter": "punkt", "workers": 2}, "punkt")])
def test_the_note_names_the_splitter(
    tmp_path: Path, options: dict[str, Any], used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 1)
    source = json_lines(tmp_path / "x.jsonl", ["The cat, e.g. a dog, sat. The dog ran"] * 2)
    report = run(tmp_path, [source], **options)
    assert report.splitter == used
    assert json.loads(Path(f"{report.prefix}.json").read_text())["sentence_splitter"] == used
    assert report.sentences == {"sentencex": 4, "punkt": 6}[used]


def test_whole_documents(tmp_path: Path) -> None:
    report = run(tmp_path, [json_lines(tmp_path / "x.jsonl", TEXTS)], split_sentences=False, append_eod=True)
    assert report.prefix.endswith("corpus_text_document")
    data = IndexedDataset(report.prefix)
    assert decoded(tmp_path, report.prefix)[0] == ["the cat sat. the dog ran! on the mat"]
    assert [int(data[i][-1]) for i in range(len(data))] == [3, 3, 3], "each document ends with [SEP]"
    assert (report.sentences, report.tokens, report.splitter) == (3, 18, None)


def test_the_end_of_document_token_follows_the_last_sentence_only(tmp_path: Path) -> None:
    data = IndexedDataset(run(tmp_path, [json_lines(tmp_path / "x.jsonl", TEXTS)], append_eod=True).prefix)
    assert [3 in data[i] for i in range(len(data))] == [False, False, True, True, True]


@pytest.mark.parametrize("inputs", ["plain", "two files"])
def test_other_inputs(tmp_path: Path, inputs: str) -> None:
    if inputs == "plain":
        (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"The cat sat.\nThe dog ran\n\nA b\n"))
        report = run(tmp_path, [tmp_path / "x.txt.gz"])
    else:
        first = json_lines(tmp_path / "x.jsonl", ["The cat sat. The dog ran"])
        report = run(tmp_path, [first, json_lines(tmp_path / "y.jsonl", ["A b"])])
    assert [len(document) for document in decoded(tmp_path, report.prefix)] == [2, 1]


def test_output_does_not_depend_on_workers_or_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    words = ["The", "cats", "ran", "on", "a", "mat.", "dog!", "\n"]
    texts = [" ".join(rng.choice(words, size=rng.integers(0, 30))) for _ in range(300)]
    source = json_lines(tmp_path / "x.jsonl", texts)
    whole = run(tmp_path, [source])
    expected = files(tmp_path)
    monkeypatch.setattr(module, "CHUNK_ROWS", 7)
    for workers in (1, 3):
        report = run(tmp_path, [source], workers=workers)
        assert files(tmp_path) == expected
        assert (report.documents, report.tokens, report.skipped_empty) == (
            whole.documents,
            whole.tokens,
            whole.skipped_empty,
        )


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_rows_leave_nothing_behind_or_are_skipped(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 1)  # one chunk alone is worked on here
    source = json_lines(tmp_path / "x.jsonl", ["the cat"])
    with source.open("a") as file:
        file.write('{"text": 3}\n')
    with pytest.raises(UserError, match=r'x\.jsonl line 2 holds a number under "text"'):
        run(tmp_path, [source], workers=workers)
    assert files(tmp_path) == {}
    report = run(tmp_path, [source], workers=workers, on_bad_row="skip")
    assert (report.documents, report.skipped_bad) == (1, 1)


def test_an_interrupted_run_keeps_the_earlier_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = json_lines(tmp_path / "x.jsonl", TEXTS)
    run(tmp_path, [source])
    before = files(tmp_path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_tokenize", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [source])
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers 0"),
        ({"on_bad_row": "drop"}, 'on_bad_row "drop"'),
        ({"json_key": "body"}, r'line 1 has no key "body"'),
        ({"json_key": "body", "on_bad_row": "skip"}, "0 documents are empty, 5 unreadable"),
        ({"inputs": []}, "nothing to preprocess"),
        ({"splitter": "punkt", "split_sentences": False}, "Sentence splitter punkt has nothing to do"),
        ({"splitter": "punkt", "language": "ja"}, 'no model of language "ja"'),
        ({"inputs": ["missing.jsonl"]}, r"missing\.jsonl does not exist"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    inputs = options.pop("inputs", None)
    inputs = [json_lines(tmp_path / "x.jsonl", TEXTS)] if inputs is None else [tmp_path / name for name in inputs]
    with pytest.raises(UserError, match=message):
        run(tmp_path, inputs, **options)
    assert not list(tmp_path.glob("out/*"))


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    prefix = run(tmp_path, [json_lines(tmp_path / "x.jsonl", TEXTS)]).prefix
    check_tokenizer(prefix, load_tokenizer(tmp_path / "vocab.txt"))
    other = load_tokenizer(small_vocabulary(tmp_path, ["the", "cat"]))
    with pytest.raises(UserError, match=r"made with a tokenizer of 22 entries .* the one given has 7 "):
        check_tokenizer(prefix, other)
    note = Path(f"{prefix}.json")
    assert json.loads(note.read_text())["documents"] == 3
    note.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        check_tokenizer(prefix, other)
    note.unlink()
    check_tokenizer(prefix, other)


def running_in_group(group: int) -> list[str]:
    """Processes of a process group, without those that have ended but nobody has waited for."""
    lines = subprocess.check_output(["ps", "-A", "-o", "pgid=,stat=,pid="], text=True).splitlines()
    fields = [line.split() for line in lines]
    return [pid for pgid, state, pid in fields if int(pgid) == group and not state.startswith("Z")]


def test_control_c_stops_all_processes_and_leaves_nothing(tmp_path: Path) -> None:
    source = json_lines(tmp_path / "x.jsonl", ["The cat sat. The dog ran! " * 400] * 3000)
    program = (
        "import sys\n"
        "from megatron_bert.data.preprocess import preprocess\n"
        "if __name__ == '__main__':\n"
        "    preprocess([sys.argv[1]], sys.argv[2], sys.argv[3], workers=2)\n"
    )
    (tmp_path / "run.py").write_text(program)
    vocabulary = small_vocabulary(tmp_path)
    arguments = [sys.executable, tmp_path / "run.py", source, vocabulary, tmp_path / "out" / "corpus"]
    environment = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])}
    process = subprocess.Popen(
        arguments,
        env=environment,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # A test run in the background of a shell has Control-C ignored, and its processes would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 30
    while not any(path.stat().st_size for path in tmp_path.glob("out/*.tmp")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no worker delivered anything"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole foreground group
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert b"KeyboardInterrupt" in errors
    assert files(tmp_path) == {}
    deadline = time.monotonic() + 10
    while running := running_in_group(process.pid):
        assert time.monotonic() < deadline, f"processes {running} survive"
        time.sleep(0.02)


def test_a_worker_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = json_lines(tmp_path / "x.jsonl", TEXTS)
    monkeypatch.setattr(module, "CHUNK_ROWS", 1)
    monkeypatch.setattr(module, "_tokenize_in_worker", end_this_process)
    with pytest.raises(UserError, match="worker ended early"):
        run(tmp_path, [source], workers=2)
    assert files(tmp_path) == {}
