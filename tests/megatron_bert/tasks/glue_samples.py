# SPDX-License-Identifier: Apache-2.0
"""Two rows of every GLUE file, in the columns of the official distribution."""

from __future__ import annotations

from pathlib import Path

from .support import write

PARSES = ["( x )", "( y )", "(ROOT x)", "(ROOT y)"]
MNLI = ["index", "promptID", "pairID", "genre"] + [
    f"sentence{n}_{kind}" for kind in ("binary_parse", "parse") for n in (1, 2)
]
STSB = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2"]
MRPC = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]


def table(*rows: list[str]) -> str:
    return "".join("\t".join(row) + "\n" for row in rows)


def labeled_files() -> dict[str, str]:
    """Training and development files; the first text of a row is '"one" a', the second 'b, two'."""
    one, two = '"one" a', "b, two"
    mnli = ["0", "31193", "31193n", "government", *PARSES, one, two]
    rte = [["0", one, two, "not_entailment"], ["1", one, two, "entailment"]]
    mnli_names = [*MNLI, "sentence1", "sentence2"]
    annotators = [f"label{n}" for n in range(1, 6)]
    stsb = ["1", "main-news", "headlines", "2015", "0001", "none", "none", one, two]
    return {
        "CoLA/train": table(["gj04", "1", "", one], ["gj04", "0", "*", one]),
        "SST-2/train": table(["sentence", "label"], [one, "1"], [one, "0"]),
        "MRPC/train": table(MRPC, ["1", "7", "8", one, two], ["0", "9", "10", one, two]),
        "QQP/train": table(
            ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
            ["10", "1", "2", one, two, "1"],
            ["11", "3", "4", one, two, "0"],
        ),
        "STS-B/train": table([*STSB, "score"], [*stsb, "5.000"], [*stsb, "0.250"]),
        "MNLI/train": table(
            [*mnli_names, "label1", "gold_label"],
            [*mnli, "neutral", "neutral"],
            [*mnli, "entailment", "contradiction"],
        ),
        "MNLI/dev_matched": table([*mnli_names, *annotators, "gold_label"], [*mnli, *["neutral"] * 5, "entailment"]),
        "MNLI/dev_mismatched": table([*mnli_names, *annotators, "gold_label"], [*mnli, *["neutral"] * 5, "neutral"]),
        "QNLI/train": table(
            ["index", "question", "sentence", "label"], ["0", one, two, "entailment"], ["1", one, two, "not_entailment"]
        ),
        "RTE/train": table(["index", "sentence1", "sentence2", "label"], *rte),
        "WNLI/train": table(["index", "sentence1", "sentence2", "label"], ["0", one, two, "1"], ["1", one, two, "0"]),
    }


def unlabeled_files() -> dict[str, str]:
    """Test files: no labels, and columns that differ in places."""
    pair, texts = ["b", "c"], ["index", "sentence1", "sentence2"]
    mnli = table(
        [*MNLI, "sentence1", "sentence2"], ["5", "1", "1n", "g", *PARSES, *pair], ["6", "1", "1n", "g", *PARSES, *pair]
    )
    diagnostic = table(texts, ["5", *pair], ["6", *pair])
    stsb = ["main-news", "headlines", "2015", "0001", "none", "none", *pair]
    return {
        "CoLA/test": table(["index", "sentence"], ["5", "b"], ["6", "c"]),
        "SST-2/test": table(["index", "sentence"], ["5", "b"], ["6", "c"]),
        "MRPC/test": table(["index", *MRPC[1:]], ["5", "1", "2", *pair], ["6", "3", "4", *pair]),
        "QQP/test": table(["id", "question1", "question2"], ["5", *pair], ["6", *pair]),
        "STS-B/test": table(STSB, ["5", *stsb], ["6", *stsb]),
        "MNLI/test_matched": mnli,
        "MNLI/test_mismatched": mnli,
        "AX/test": diagnostic,
        "QNLI/test": table(["index", "question", "sentence"], ["5", *pair], ["6", *pair]),
        "RTE/test": table(texts, ["5", *pair], ["6", *pair]),
        "WNLI/test": table(texts, ["5", *pair], ["6", *pair]),
    }


def write_glue(folder: Path) -> Path:
    """A directory of all of GLUE."""
    for name, content in (labeled_files() | unlabeled_files()).items():
        write(folder / f"{name}.tsv", content)
        if name.endswith("/train") and name != "MNLI/train":
            write(folder / name.replace("/train", "/dev.tsv"), content)
    return folder
