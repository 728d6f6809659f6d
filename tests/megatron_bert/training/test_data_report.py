# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_bert.data.sampling import BlendedCorpus
from megatron_bert.data.sentence_pairs import PairDataset
from megatron_bert.training.data_report import describe_held_out_data, describe_training_data
from tests.megatron_bert.data.support import numbered_tokenizer, write_corpus
from tests.megatron_bert.training.runs import run_settings

#: Of 57 tokens in three documents, seven are in a document of one sentence, and five do not fit the sample.
CORPUS = [[[10] * 20, [11] * 30], [[12] * 7], [[]], [[13] * 9, [14] * 11]]


@pytest.fixture
def corpus(tmp_path: Path) -> BlendedCorpus:
    indexed = write_corpus(tmp_path / "x", CORPUS)
    options: dict[str, Any] = {"seq_length": 48, "max_predictions": 8, "seed": 1, "short_sequence_probability": 0.0}
    tokenizer = numbered_tokenizer(tmp_path)
    single = PairDataset(indexed, (0, 2), tokenizer, objective="none", **options)
    return BlendedCorpus([PairDataset(indexed, (0, 4), tokenizer, **options), single], [1.0, 1.0], seed=1)


def test_training_data_are_described_with_the_epochs_to_come(tmp_path: Path, corpus: BlendedCorpus) -> None:
    settings = run_settings(tmp_path, tmp_path / "run", training__steps=60, training__global_batch_size=8)
    prefix = tmp_path / "x"
    pairs, single, unused, *many = describe_training_data(settings, corpus, first_step=20)
    assert pairs == (
        f"training data {prefix}: 3 documents of 77 tokens make 2 samples per epoch (6.5% of the tokens are cut off "
        f"pairs longer than their sample); the 40 steps to come are 80.0 epochs after 40.0"
    )
    assert single == (
        f"training data {prefix}: 2 documents of 57 tokens make 3 samples per epoch; the 40 steps to come are "
        f"53.3 epochs after 26.7"
    )
    assert f"1 of the documents of {prefix}, 9.1% of its tokens, are not used: they have one sentence" in unused
    assert "pair_objective sop needs two" in unused
    assert [note.split(",")[0] for note in many] == [
        f"note: 60 steps are 120 epochs of {prefix}",
        f"note: 60 steps are 80 epochs of {prefix}",
    ]
    settings = run_settings(tmp_path, tmp_path / "run", training__steps=2)
    assert len(describe_training_data(settings, corpus, first_step=0)) == 3


def test_held_out_data_that_an_evaluation_repeats_are_noted(tmp_path: Path, corpus: BlendedCorpus) -> None:
    settings = run_settings(tmp_path, tmp_path / "run", training__evaluate_batches=1, training__global_batch_size=4)
    lines = describe_held_out_data(settings, corpus)
    assert lines[0].endswith("; an evaluation reads 2 samples")
    assert sum("are repeated" in line for line in lines) == 0
    settings = run_settings(tmp_path, tmp_path / "run", training__evaluate_batches=2, training__global_batch_size=4)
    repeated = [line for line in describe_held_out_data(settings, corpus) if "are repeated" in line]
    assert len(repeated) == 2
    assert repeated[0].startswith(f"note: the 2 held-out samples of {tmp_path / 'x'} are fewer than an evaluation")
