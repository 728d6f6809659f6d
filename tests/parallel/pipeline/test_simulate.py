# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import pairwise

import pytest

from parallel.errors import UserError
from parallel.pipeline.dependencies import ScheduleError
from parallel.pipeline.schedules import SCHEDULES, build_schedule
from parallel.pipeline.simulate import Costs, TimedAction, Timeline, simulate
from tests.parallel.pipeline.grid import action_of
from tests.parallel.pipeline.test_validate import with_actions


def times(timeline):
    return {str(event.action): (event.start, event.end) for event in timeline.events}


def test_times_of_a_small_schedule_by_hand():
    timeline = simulate(build_schedule("1f1b", 2, 2), Costs(1, 2, 3))
    assert times(timeline) == {
        "0F0": (0, 1),
        "0F1": (1, 2),
        "1F0": (1, 2),
        "1B0": (2, 7),
        "1F1": (7, 8),
        "1B1": (8, 13),
        "0B0": (7, 12),
        "0B1": (13, 18),
    }
    assert timeline.makespan == 18
    assert timeline.busy == (12, 12)
    assert timeline.rank_bubbles == pytest.approx((1 / 3, 1 / 3))
    assert timeline.bubble == pytest.approx(1 / 3)


def test_split_backward_sends_the_input_gradient_before_the_weight_gradient():
    timeline = simulate(build_schedule("zero-bubble-h1", 2, 1), Costs(1, 2, 5))
    assert times(timeline) == {
        "0F0": (0, 1),
        "1F0": (1, 2),
        "1I0": (2, 4),
        "1W0": (4, 9),
        "0I0": (4, 6),
        "0W0": (6, 11),
    }


def test_messages_between_ranks_take_their_time_and_those_within_a_rank_none():
    assert simulate(build_schedule("1f1b", 3, 1), Costs(communication=0.5)).makespan == 3 * 3 + 4 * 0.5
    # The V turns on its last rank: 2p-2 hops each way, p-1 of them twice.
    assert simulate(build_schedule("zero-bubble-v", 3, 1), Costs(communication=0.5)).makespan == 13 + 8 * 0.5


def test_communication_overlaps_computation():
    # Only the first activation and the first gradient are waited for; the others travel while the ranks compute.
    schedule = build_schedule("gpipe", 2, 50)
    assert simulate(schedule, Costs(communication=0.25)).makespan == pytest.approx(3 * 51 + 2 * 0.25)


def test_uneven_stages_wait_for_the_slowest():
    schedule = build_schedule("1f1b", 3, 30)
    timeline = simulate(schedule, Costs((1, 1, 2), (1, 1, 2), (1, 1, 2)))
    assert timeline.busy == (90, 90, 180)
    assert timeline.makespan == 180 + 2 * 3
    assert timeline.rank_bubbles[2] == pytest.approx(6 / 186)


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_is_at_least_the_busiest_rank_and_the_longest_path(name):
    schedule = build_schedule(name, 4, 6)
    costs = Costs([1 + stage / 3 for stage in range(schedule.stages)], 1.3, 0.8, communication=0.1)
    timeline = simulate(schedule, costs)
    path = sum(costs.forward) + 1.3 * schedule.stages
    assert timeline.makespan >= max(*timeline.busy, path)
    assert timeline.bubble == pytest.approx(1 - sum(timeline.busy) / (4 * timeline.makespan))


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_rank_does_two_things_at_once_and_inputs_come_first(name):
    schedule = build_schedule(name, 4, 7)
    timeline = simulate(schedule, Costs(1, 1.3, 0.8, communication=0.3))
    at = times(timeline)
    for rank, actions in enumerate(schedule.actions):
        assert [event.action for event in timeline.events if event.rank == rank] == list(actions)
        for before, after in pairwise(actions):
            assert at[str(before)][1] <= at[str(after)][0]
        for action in actions:
            producer = schedule.producer(action)
            if producer is not None:
                crosses = schedule.rank_of(producer.stage) != rank
                assert at[str(action)][0] >= at[str(producer)][1] + (0.3 if crosses else 0)


def test_a_deadlock_is_an_error_not_an_endless_loop():
    schedule = with_actions(build_schedule("1f1b", 2, 1), 0, ["0B0", "0F0"])
    with pytest.raises(ScheduleError, match=r"rank 0, position 0, action 0B0: deadlock"):
        simulate(schedule)


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        (Costs(forward=(1, 2)), "forward costs were given for 2 stages of 3: give one per stage"),
        (Costs(backward_input=-1), "backward_input costs were given as -1: give finite times of 0 or more"),
        (Costs(communication=float("nan")), "communication costs were given as nan"),
    ],
)
def test_costs_that_do_not_fit_are_refused(costs, message):
    with pytest.raises(UserError, match=message):
        simulate(build_schedule("1f1b", 3, 3), costs)


def test_free_actions_take_no_time():
    assert simulate(build_schedule("gpipe", 2, 2), Costs(0, 0, 0)).bubble == 0


def test_recorded_times_need_not_start_at_zero():
    timeline = Timeline(1, (TimedAction(0, action_of("0F0"), 5.0, 6.0), TimedAction(0, action_of("0B0"), 7.0, 9.0)))
    assert (timeline.start, timeline.makespan) == (5, 4)
    assert timeline.bubble == pytest.approx(0.25)
