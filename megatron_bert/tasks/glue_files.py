# SPDX-License-Identifier: Apache-2.0
"""GLUE's official files: which columns hold what, and how MRPC's original files become its splits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_bert.tasks.rows import BadRows, Row, RowError
from megatron_bert.tasks.settings import Column
from megatron_bert.tasks.tables import read_lines, read_table


@dataclass(frozen=True)
class GlueLayout:
    """One task of GLUE.

    Attributes:
        folder: the name of its directory.
        text: column of the text, or of the first of a pair.
        text_pair: column of the second.
        label: column of the label in training and development files.
        labels: names by class number; () for a regression.
        metrics: names of its metrics, the one that decides first.
        submission: split -> file of the leaderboard.
        number: column of a test row's number.
    """

    folder: str
    text: Column
    text_pair: Column | None
    label: Column
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    submission: dict[str, str]
    number: str = "index"


_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")

_ACCURACY, _BOTH = ("accuracy",), ("accuracy_f1", "accuracy", "f1")
_CORRELATIONS = ("pearson_spearman", "pearson", "spearman", "squared_error_loss")
_NLI = ("contradiction", "entailment", "neutral")
_MNLI_FILES = {"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv", "test_diagnostic": "AX.tsv"}
_PAIR, _QUESTIONS, _STRINGS = ("sentence1", "sentence2"), ("question1", "question2"), ("#1 String", "#2 String")

LAYOUTS = {
    "cola": GlueLayout("CoLA", 3, None, 1, _BINARY, ("matthews", "accuracy"), {"test": "CoLA.tsv"}),
    "sst2": GlueLayout("SST-2", "sentence", None, "label", _BINARY, _ACCURACY, {"test": "SST-2.tsv"}),
    "mrpc": GlueLayout("MRPC", *_STRINGS, "Quality", _BINARY, _BOTH, {"test": "MRPC.tsv"}),
    "qqp": GlueLayout("QQP", *_QUESTIONS, "is_duplicate", _BINARY, _BOTH, {"test": "QQP.tsv"}, number="id"),
    "stsb": GlueLayout("STS-B", *_PAIR, "score", (), _CORRELATIONS, {"test": "STS-B.tsv"}),
    "mnli": GlueLayout("MNLI", *_PAIR, "gold_label", _NLI, _ACCURACY, _MNLI_FILES),
    "qnli": GlueLayout("QNLI", "question", "sentence", "label", _ENTAILMENT, _ACCURACY, {"test": "QNLI.tsv"}),
    "rte": GlueLayout("RTE", *_PAIR, "label", _ENTAILMENT, _ACCURACY, {"test": "RTE.tsv"}),
    "wnli": GlueLayout("WNLI", *_PAIR, "label", _BINARY, _ACCURACY, {"test": "WNLI.tsv"}),
}

COLA_COLUMNS = 4
COLA_TEST_HEADER = ["index", "sentence"]
MRPC_FILES = {"train": "msr_paraphrase_train.txt", "test": "msr_paraphrase_test.txt"}
MRPC_DEVELOPMENT = "dev_ids.tsv"


def official_files(name: str, directory: Path) -> dict[str, list[Path]]:
    """The files there are in a task's directory, or in the directory of all of GLUE, by split.

    MRPC as Microsoft distributes it has no development file: GLUE takes for it the pairs of the training file that
    dev_ids.tsv lists.
    """
    layout = LAYOUTS[name]
    folder = directory / layout.folder if (directory / layout.folder).is_dir() else directory
    names = {"train": ["train.tsv"], "valid": ["dev.tsv"], "test": ["test.tsv"]}
    if name == "mnli":
        names = {"train": ["train.tsv"]}
        for part in ("matched", "mismatched"):
            names |= {f"valid_{part}": [f"dev_{part}.tsv"], f"test_{part}": [f"test_{part}.tsv"]}
        names["test_diagnostic"] = ["diagnostic.tsv", "../diagnostic/diagnostic.tsv", "../AX/test.tsv"]
    if name == "mrpc":
        names["train"] += [MRPC_FILES["train"]]
        names["test"] += [MRPC_FILES["test"]]
        if (folder / MRPC_DEVELOPMENT).is_file():
            names["valid"] += [MRPC_FILES["train"]]
    order = sorted(names, key=lambda split: ("train", "valid", "test").index(split.split("_")[0]))
    found = {split: next((folder / n for n in names[split] if (folder / n).is_file()), None) for split in order}
    return {split: [path] for split, path in found.items() if path is not None}


def read_glue(name: str, path: Path, split: str, bad: BadRows, numbers: Iterator[int]) -> Iterator[Row]:
    """Rows of one file for one split, which `numbers` numbers."""
    # CoLA's training and development files have no header; its test file has one.
    header = name != "cola" or next((line for _, line in read_lines(path)), "").split("\t") == COLA_TEST_HEADER
    rows = read_table(path, "tsv", header, bad, numbers=numbers)
    if path.name == MRPC_FILES["train"] and (path.parent / MRPC_DEVELOPMENT).is_file():
        rows = _mrpc_part(rows, path.parent / MRPC_DEVELOPMENT, split == "valid", bad)
    return rows


def _mrpc_part(rows: Iterator[Row], ids: Path, development: bool, bad: BadRows) -> Iterator[Row]:
    """Rows of MRPC's training file that are, or are not, among the development pairs."""
    listed = {tuple(row.cells) for row in read_table(ids, "tsv", False, bad)}
    for row in rows:
        try:
            pair = (row.text("#1 ID"), row.text("#2 ID"))
        except RowError as reason:
            bad.add(row.path, f"line {row.line}", reason)
            continue
        if (pair in listed) == development:
            yield row
