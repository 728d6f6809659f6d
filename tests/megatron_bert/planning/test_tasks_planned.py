# SPDX-License-Identifier: Apache-2.0
"""Runs of tasks are planned, with their heads, before there is a checkpoint or data."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bert.planning.plan_command import run_plan
from megatron_bert.planning.planned import load_planned
from parallel.errors import UserError
from tests.megatron_bert.planning.support import CONFIGS
from tests.megatron_bert.planning.test_search import arguments

ENCODER = CONFIGS / "bert_345m.yaml"


@pytest.mark.parametrize(
    ("config", "rows", "sequences", "pooled", "note"),
    [
        ("finetune/mnli", 1, 1, True, "the model has the sizes of"),
        ("finetune/race", 1, 4, True, "a question is counted with 4 choices"),
        ("finetune/squad2", 384, 1, False, "a vocabulary of 30,522 is assumed"),
        ("finetune/ner", 128, 1, False, ""),
        ("quantize/classification", 1, 1, True, "of the model before it is quantized"),
    ],
)
def test_a_task_is_planned_before_its_encoder_is_there(
    config: str, rows: int, sequences: int, pooled: bool, note: str
) -> None:
    planned = load_planned(Path(config), [], ENCODER)
    head = planned.workload.head
    assert head is not None
    assert (head.rows, head.sequences, head.pooled) == (rows, sequences, pooled)
    assert planned.workload.sample_tokens == planned.workload.length * sequences
    assert (planned.workload.config.num_hidden_layers, planned.workload.config.hidden_size) == (24, 1024)
    assert note in " ".join(planned.notes)


def test_dropout_is_that_of_the_task() -> None:
    planned = load_planned(Path("finetune/mnli"), ["model.hidden_dropout_prob=0.25"], ENCODER)
    assert planned.workload.config.hidden_dropout_prob == 0.25


def test_the_plan_says_what_it_assumes(capsys: pytest.CaptureFixture[str]) -> None:
    run_plan(arguments("finetune/race", "--encoder", str(ENCODER), "--gpus", "2", "--top", "1"))
    assert f"note: the model has the sizes of {ENCODER}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["finetune/mnli"], "or before there is one the settings that will pretrain it, with --encoder"),
        (["bert_345m", "--encoder", str(ENCODER)], "--encoder .* is for tasks, but bert_345m has settings of pretrain"),
        (["finetune/mnli", "--encoder", "finetune/mnli"], "--encoder finetune/mnli has settings of a task"),
        (["finetune/mnli", "--encoder", "nowhere.yaml"], "cannot read the settings file nowhere.yaml"),
        (["finetune/mnli", "task.max_length=513", "--encoder", str(ENCODER)], "the model takes at most 512"),
    ],
)
def test_what_is_missing_is_said(given: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        run_plan(arguments(*given, "--gpus", "2"))
