# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from parallel.pipeline.actions import Action, ActionKind, Backward, Placement, activations_in_flight
from parallel.pipeline.schedules import build_schedule
from tests.parallel.pipeline.grid import action_of


def test_text_form():
    assert str(Action(ActionKind.BACKWARD_INPUT, stage=3, microbatch=11)) == "3I11"


def test_loop_and_v_placement():
    assert [Placement.LOOP.rank(stage, 3) for stage in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [Placement.V.rank(stage, 3) for stage in range(6)] == [0, 1, 2, 2, 1, 0]
    assert Placement.LOOP.stages(1, ranks=3, chunks=3) == (1, 4, 7)
    assert Placement.V.stages(1, ranks=3, chunks=3) == (1, 4, 7)
    assert Placement.V.stages(0, ranks=3, chunks=2) == (0, 5)


@pytest.mark.parametrize("name", ["interleaved-1f1b", "zero-bubble-v"])
def test_stage_lookups_agree(name):
    schedule = build_schedule(name, 4, 4)
    for rank in range(4):
        for stage in schedule.stages_of(rank):
            assert schedule.rank_of(stage) == rank


def test_producer_and_consumer_are_inverse_and_stop_at_the_ends():
    schedule = build_schedule("zero-bubble-v", 2, 3)
    assert schedule.producer(action_of("0F1")) is None
    assert schedule.producer(action_of("3I1")) is None
    assert schedule.consumer(action_of("3F1")) is None
    assert schedule.producer(action_of("2W1")) is None
    assert schedule.producer(action_of("2F1")) == action_of("1F1")
    assert schedule.producer(action_of("2I1")) == action_of("3I1")
    for action in (action for run in schedule.actions for action in run):
        consumer = schedule.consumer(action)
        assert consumer is None or schedule.producer(consumer) == action


def test_split_backward_holds_activations_until_the_weight_gradient():
    actions = [action_of(text) for text in ["0F0", "0F1", "0I0", "0F2", "0W0", "0I1", "0W1"]]
    assert activations_in_flight(actions) == [1, 2, 2, 3, 2, 2, 1]


def test_text_of_a_schedule_is_one_line_a_rank():
    assert str(build_schedule("1f1b", 2, 2)) == "0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1"


def test_backward_kinds_follow_their_order():
    assert "".join(Backward.SPLIT.kinds) == "IW"
    assert "".join(Backward.FULL.kinds) == "B"
    assert Backward.NONE.kinds == ()
