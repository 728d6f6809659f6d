# SPDX-License-Identifier: Apache-2.0
"""Corpora on Slurm before they are queued: what is checked, and the two scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bert.cli import main
from tests.megatron_bert.data.support import small_vocabulary

JOB = ["submit", "--command", "preprocess", "--time", "60"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEGATRON_BERT_SITE", raising=False)
    small_vocabulary(tmp_path)
    (tmp_path / "a b.txt").write_text("the cat")
    return tmp_path


def given(source: str = "a b.txt", *more: str) -> list[str]:
    return ["--", "--input", source, "--tokenizer", "vocab.txt", "--output-prefix", "out/c", *more]


def test_the_scripts(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "site.yaml").write_text("partition: cpu\nmemory: 0\npython: /opt/python\nmodules: [gcc]\n")
    assert main([*JOB, "--parts", "2", "--site", "site.yaml", "--dry-run", *given("*.txt")]) == 0
    parts, merging = capsys.readouterr().out.split("\n#!/usr/bin/env bash\n")
    for line in (
        "#SBATCH --job-name=c_text_sentence",
        "#SBATCH --array=1-2",
        "#SBATCH --partition=cpu",
        "#SBATCH --requeue",
        "#SBATCH --exclusive",
        "#SBATCH --mem=0",
        "#SBATCH --output=out/c_text_sentence.logs/slurm-%A_%a.out",
        "module load gcc",
        "CONTAINER=(/opt/python)",
        "OPTIONS=(--input '*.txt' --tokenizer vocab.txt --output-prefix out/c)",
    ):
        assert line in parts.splitlines()
    assert parts.rstrip().endswith('preprocess "${OPTIONS[@]}" --part "$SLURM_ARRAY_TASK_ID/2"')
    assert "#SBATCH --dependency=afterok:PARTS" in merging
    names = " ".join(f"out/c_text_sentence.part-0000{number}-of-00002" for number in (1, 2))
    assert f"PARTS=({names})" in merging
    assert merging.rstrip().endswith('merge "${PARTS[@]}" --output out/c_text_sentence')
    assert not (place / "out").exists()
    assert main([*JOB, "--parts", "2", "--cpus-per-part", "8", "--dry-run", *given()]) == 0
    parts = capsys.readouterr().out
    assert "#SBATCH --cpus-per-task=8" in parts
    assert "--exclusive" not in parts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (given(), "--parts is missing"),
        (["--parts", "0", *given()], "--parts is 0"),
        (["--parts", "10001", *given()], "--parts is 10001: give at most 10,000"),
        (["--parts", "2", *given("a b.txt", "--workers", "0")], "workers 0 must be at least 1"),
        (["--parts", "2", *given("a b.txt", "--keep-documents", "--sentence-splitter", "punkt")], "leave one out"),
        (["--parts", "2", "--nodes", "2", *given()], "--nodes does not go with --command preprocess"),
        (["--parts", "2", "--style", "srun", *given()], "--style does not go with"),
        (["--parts", "2", *given("none.txt")], "none.txt does not exist"),
        (["--parts", "2", *given("-")], "Standard input can be read once"),
        (["--parts", "2", *given("a b.txt", "--part", "1/2")], "--part is what each job of the array gets"),
        (["--parts", "2", *given("a b.txt", "--nonsense")], "Options of preprocess: unrecognized arguments"),
        (["--parts", "2", "--", "--input", "a b.txt"], "Options of preprocess: the following arguments are required"),
        (["--parts", "2", *given("a b.txt", "--json-key", "%a")], "holds %a"),
    ],
)
def test_mistakes(place: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main([*JOB, *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert not (place / "out").exists()


def test_parts_are_of_corpora_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--time", "60", "--gpus-per-node", "1"]
    assert main(["submit", "x.yaml", *size]) == 2
    assert "--nodes is missing" in capsys.readouterr().err
    assert main(["submit", "x.yaml", *size, "--nodes", "1", "--parts", "2"]) == 2
    assert "--parts goes with --command preprocess, not pretrain" in capsys.readouterr().err
