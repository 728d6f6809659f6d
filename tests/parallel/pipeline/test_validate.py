# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random
from dataclasses import replace

import pytest

from parallel.pipeline.actions import Backward
from parallel.pipeline.communication import plan_communication
from parallel.pipeline.dependencies import ScheduleError, execution_order
from parallel.pipeline.schedules import SCHEDULES, build_schedule, forward_only
from parallel.pipeline.validate import validate
from tests.parallel.pipeline.grid import action_of, every_schedule
from tests.parallel.pipeline.plans import validate_plan


def with_actions(schedule, rank, actions):
    """The schedule with another list for one rank, written as actions or their texts."""
    parsed = tuple(action_of(action) if isinstance(action, str) else action for action in actions)
    return replace(schedule, actions=(*schedule.actions[:rank], parsed, *schedule.actions[rank + 1 :]))


def swapped(schedule, rank, one, other):
    actions = list(schedule.actions[rank])
    actions[one], actions[other] = actions[other], actions[one]
    return with_actions(schedule, rank, actions)


def refusal(schedule, **options):
    with pytest.raises(ScheduleError) as caught:
        validate(schedule, **options)
    return caught.value


def test_every_schedule_of_the_grid_is_valid():
    for schedule in every_schedule():
        validate(schedule)


@pytest.mark.parametrize("name", SCHEDULES)
def test_missing_action(name):
    schedule = build_schedule(name, 3, 4)
    for position in (0, 3, len(schedule.actions[1]) - 1):
        actions = list(schedule.actions[1])
        gone = actions.pop(position)
        error = refusal(with_actions(schedule, 1, actions))
        assert (error.rank, error.position, error.action) == (1, None, gone)
        assert str(error) == f"rank 1, action {gone}: it is missing"


@pytest.mark.parametrize("name", SCHEDULES)
def test_repeated_action(name):
    schedule = build_schedule(name, 3, 4)
    actions = [*schedule.actions[2], schedule.actions[2][1]]
    error = refusal(with_actions(schedule, 2, actions))
    assert (error.rank, error.position, error.action) == (2, len(actions) - 1, actions[1])
    assert "it also stands at position 1" in str(error)


def test_action_on_another_ranks_stage():
    error = refusal(with_actions(build_schedule("zero-bubble-v", 2, 2), 0, ["0F0", "1F0"]))
    assert str(error) == "rank 0, position 1, action 1F0: the rank holds stages 0, 3"


def test_microbatch_that_the_step_does_not_have():
    schedule = build_schedule("1f1b", 2, 2)
    error = refusal(with_actions(schedule, 1, [*schedule.actions[1], "1F2"]))
    assert (error.rank, error.position) == (1, 4)
    assert "the step has microbatches 0 to 1" in str(error)


@pytest.mark.parametrize(("backward", "actions"), [("full", ["0F0", "0I0", "0W0"]), ("split", ["0F0", "0B0"])])
def test_kind_that_does_not_fit_the_schedules_backward(backward, actions):
    schedule = replace(build_schedule("1f1b", 1, 1), backward=Backward(backward))
    error = refusal(with_actions(schedule, 0, actions))
    assert (error.position, str(error.action)) == (1, actions[1])
    assert f"a schedule whose backward is {backward} has the kinds F, " in str(error)


def test_backward_in_a_forward_only_schedule():
    schedule = forward_only(1, 1)
    assert "has the kinds F" in str(refusal(with_actions(schedule, 0, ["0F0", "0B0"])))


def test_weights_gradient_left_out():
    schedule = build_schedule("zero-bubble-h1", 2, 2)
    error = refusal(with_actions(schedule, 0, [a for a in schedule.actions[0] if str(a) != "0W1"]))
    assert str(error.action) == "0W1"


def test_backward_before_its_forward():
    error = refusal(with_actions(build_schedule("1f1b", 1, 1), 0, ["0B0", "0F0"]))
    assert (error.position, str(error.action)) == (0, "0B0")
    assert "it stands before 0F0, whose result it needs" in str(error)


def test_weight_gradient_before_its_input_gradient():
    error = refusal(with_actions(build_schedule("zero-bubble-h1", 1, 1), 0, ["0F0", "0W0", "0I0"]))
    assert (error.position, str(error.action)) == (1, "0W0")
    assert "it stands before 0I0" in str(error)


def test_lists_of_other_ranks_than_the_schedule_has():
    schedule = build_schedule("1f1b", 3, 3)
    with pytest.raises(ValueError, match="2 lists of actions for 3 ranks"):
        validate(replace(schedule, actions=schedule.actions[:2]))


def test_ranks_that_wait_for_each_other_are_all_named():
    # Rank 0 wants the gradient of microbatch 0 before it starts microbatch 1; rank 1 wants both forwards first.
    schedule = with_actions(build_schedule("1f1b", 2, 2), 0, ["0F0", "0B0", "0F1", "0B1"])
    schedule = with_actions(schedule, 1, ["1F0", "1F1", "1B0", "1B1"])
    error = refusal(schedule)
    assert (error.rank, error.position, str(error.action)) == (0, 1, "0B0")
    assert "rank 0 at position 1 (0B0) waits for 1B0 of rank 1" in str(error)
    assert "rank 1 at position 1 (1F1) waits for 0F1 of rank 0" in str(error)


def test_chunks_that_wait_for_each_other():
    # Rank 0 starts microbatch 1 only after both chunks of microbatch 0; rank 1 wants both on its first chunk first.
    schedule = forward_only(2, 2, 2)
    schedule = with_actions(schedule, 0, ["0F0", "2F0", "0F1", "2F1"])
    schedule = with_actions(schedule, 1, ["1F1", "1F0", "3F0", "3F1"])
    error = refusal(schedule)
    assert (error.rank, error.position, str(error.action)) == (0, 1, "2F0")
    assert "rank 0 at position 1 (2F0) waits for 1F0 of rank 1" in str(error)


def test_more_activations_than_allowed():
    schedule = build_schedule("gpipe", 2, 4)
    validate(schedule, peak=4)
    error = refusal(schedule, peak=3)
    assert (error.rank, error.position, str(error.action)) == (0, 3, "0F3")
    assert "holds 4 stage-microbatches of activations and may hold 3" in str(error)


def test_any_two_swapped_actions_are_refused_or_still_compute_the_step():
    """Swaps keep every action once, so what is refused must be an order fault, and what passes must run."""
    generator = random.Random(0)
    faults = []
    for name in SCHEDULES:
        for _ in range(60):
            schedule = build_schedule(name, 3, 4)
            rank = generator.randrange(3)
            one, other = generator.sample(range(len(schedule.actions[rank])), 2)
            corrupted = swapped(schedule, rank, one, other)
            try:
                validate(corrupted)
            except ScheduleError as error:
                faults.append(str(error))
            else:
                assert len(execution_order(corrupted)) == sum(map(len, schedule.actions))
                validate_plan(corrupted, plan_communication(corrupted))
    assert len(faults) > 100
    assert all("deadlock" in fault or "stands before" in fault for fault in faults)
