# SPDX-License-Identifier: Apache-2.0
"""The text the quickstart collects, and the quickstart itself on a text of one's own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from megatron_bert.data.inputs import DocumentReader
from megatron_bert.training.metrics_file import METRICS_FILE, read_metrics
from tools import collect_python_text as collector

ROOT = Path(__file__).resolve().parents[2]


class TestCleanParagraph:
    def test_prose_on_one_line(self) -> None:
        text = "Return the sum of all elements in the sequence,\nas a number of the same type."
        expected = "Return the sum of all elements in the sequence, as a number of the same type."
        assert collector.clean_paragraph(text) == expected

    def test_markup_is_removed(self) -> None:
        text = (
            "Calls :meth:`~Tensor.backward` on *every* ``loss`` and see `the guide <https://x.org>`_ for the rest [1]_."
        )
        expected = "Calls Tensor.backward on every loss and see the guide for the rest."
        assert collector.clean_paragraph(text) == expected

    def test_last_colon_becomes_a_full_stop(self) -> None:
        assert collector.clean_paragraph("The following example shows how a list is sorted::") == (
            "The following example shows how a list is sorted."
        )

    @pytest.mark.parametrize(
        "text",
        [
            ">>> print(sorted([3, 1, 2])) and some more words so that it is long enough.",
            "x : int\n    Number of things that are counted in the course of the whole run.",
            "* First point of a list that nobody reads to the end, but it is long.",
            "Too short to keep.",
            "not the start of a sentence, but long enough to be one if it were.",
            "A paragraph without an end that goes on and on and on and",
            "Shape (N, C, H, W) -> (N, C, H_out, W_out) where H_out = (H + 2p - d(k-1) - 1)/s + 1.",
            "Das hier ist zwar ein ganzer Satz, aber er enthält Umlaute, die nicht englisch sind.",
        ],
    )
    def test_anything_else_is_left_out(self, text: str) -> None:
        assert collector.clean_paragraph(text) is None


def test_strings_of_a_source_file(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        '"""The module as a whole does something that takes a sentence to say."""\n'
        "def f():\n"
        '    r"""Raw strings with \\alpha in them are read like any other string here.\n\n'
        "    And a second paragraph of the same string is one more piece of prose.\n"
        '    """\n'
        '    g(f"""A formatted {string} is left out, since its text is not whole as it stands.""")\n'
        "    return '''A string in single quotes follows a formatted one, and must still be found.'''\n",
        encoding="utf-8",
    )
    assert collector.module_prose(source) == [
        "The module as a whole does something that takes a sentence to say.",
        "Raw strings with \\alpha in them are read like any other string here.",
        "And a second paragraph of the same string is one more piece of prose.",
        "A string in single quotes follows a formatted one, and must still be found.",
    ]


def test_files_that_cannot_be_read_give_nothing(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes(b'"""caf\xe9"""')
    assert collector.module_prose(tmp_path / "latin.py") == []
    assert collector.module_prose(tmp_path / "missing.py") == []


def test_paragraphs_are_kept_once() -> None:
    long = "This paragraph is repeated in many places, word for word. " * 4
    other = "This one is found in a single place and nowhere else at all. " * 4
    assert list(collector.documents([[long], [long.upper(), other], [long]])) == [long, other]


def test_corpus_of_the_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "PACKAGES", ())
    monkeypatch.setattr(sys, "argv", ["collect", str(tmp_path / "text" / "python.txt")])
    assert collector.main() == 0
    documents = list(DocumentReader([tmp_path / "text" / "python.txt"]))
    assert len(documents) > 200
    assert sum(map(len, documents)) > 500_000
    paragraphs = [line for document in documents for line in document.splitlines()]
    assert len({line.lower() for line in paragraphs}) == len(paragraphs)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv" / ".installed-run").exists(), reason="would install the environment first")
def test_own_text_from_start_to_end(tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    # The language reference, code and all: twenty documents are enough for a vocabulary of some hundred words.
    texts = [re.sub(r"\n\s*\n", "\n", topics[name]) for name in sorted(topics)[:20]]
    text.write_text("\n\n".join(texts), encoding="utf-8")
    command = ["bash", str(ROOT / "launch" / "quickstart.sh"), "--text", "own.txt", "--steps", "4", "--out", "out"]
    command += ["training.global_batch_size=4", "training.micro_batch_size=4", "training.evaluate_batches=1"]
    command += ["logging.every=1"]

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "out" / "run"
    rows = read_metrics(run / METRICS_FILE)
    assert rows[-1]["step"] == 4
    assert (run / "curves.png").stat().st_size > 10_000
    assert (run / "checkpoints" / "step_00000004" / ".metadata").exists()
    assert "held-out loss of masked tokens" in done.stdout
    assert "== Filling in masked words" in done.stdout
    assert done.stdout.count("step 4/4 | loss") == 1  # rank 0 alone reports
    assert "tensor 2" in done.stdout
    # All that the text yields, not the 8192 entries of a longer one.
    assert 1024 < len((tmp_path / "out" / "tokenizer" / "vocab.txt").read_text(encoding="utf-8").splitlines()) < 8192
