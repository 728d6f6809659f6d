# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from parallel.pipeline.actions import Backward
from parallel.pipeline.communication import Payload, incoming, outgoing, plan_communication
from parallel.pipeline.dependencies import ScheduleError
from parallel.pipeline.schedules import SCHEDULES, build_schedule
from tests.parallel.pipeline.grid import action_of, every_schedule, receive_buffers, send_buffers
from tests.parallel.pipeline.plans import validate_plan


def messages(plans):
    return [step.send for plan in plans for step in plan.steps if step.send is not None]


def changed(plans, rank, position, **attributes):
    """The plan with one step of one rank changed."""
    steps = list(plans[rank].steps)
    steps[position] = replace(steps[position], **attributes)
    return (*plans[:rank], replace(plans[rank], steps=tuple(steps)), *plans[rank + 1 :])


def test_a_message_tells_both_ends():
    schedule = build_schedule("1f1b", 2, 2)
    forward = outgoing(schedule, action_of("0F1"))
    assert str(forward) == "activation of microbatch 1 from stage 0 (rank 0) to stage 1 (rank 1)"
    assert forward == incoming(schedule, action_of("1F1"))
    backward = outgoing(schedule, action_of("1B1"))
    assert (backward.payload, backward.channel) == (Payload.GRADIENT, (1, 0))
    assert backward == incoming(schedule, action_of("0B1"))


def test_the_ends_and_the_turn_of_a_v_need_no_message():
    schedule = build_schedule("zero-bubble-v", 3, 3)
    for text in ("0F0", "3F0", "5I0", "2I0", "1W0"):
        assert incoming(schedule, action_of(text)) is None
    for text in ("5F0", "2F0", "3I0", "0I0", "4W0"):
        assert outgoing(schedule, action_of(text)) is None


def check_counts(schedule, plans):
    """Every crossing is sent and received once."""
    sent = Counter(messages(plans))
    boundaries = [s for s in range(schedule.stages - 1) if schedule.rank_of(s) != schedule.rank_of(s + 1)]
    directions = 1 if schedule.backward is Backward.NONE else 2
    assert sent == Counter(message for plan in plans for step in plan.steps for message in step.post)
    assert set(sent.values()) <= {1}
    assert len(sent) == directions * len(boundaries) * schedule.microbatches


def check_buffers(schedule, plans):
    """Receives need a few buffers whatever the microbatches; sent outputs wait no longer than activations."""
    for plan, peak in zip(plans, schedule.peak_activations(), strict=True):
        assert receive_buffers(plan) <= 3
        assert schedule.backward is Backward.NONE or send_buffers(plan) <= max(1, peak)


def test_plans_of_every_schedule():
    for schedule in every_schedule():
        plans = plan_communication(schedule)
        validate_plan(schedule, plans)
        check_counts(schedule, plans)
        check_buffers(schedule, plans)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved-1f1b", "zero-bubble-h1"])
def test_two_receive_buffers_are_enough_for_a_loop(name):
    assert max(receive_buffers(plan) for plan in plan_communication(build_schedule(name, 4, 40))) == 2


def test_receives_are_posted_one_action_ahead():
    plans = plan_communication(build_schedule("1f1b", 2, 3))
    #  0F0 0F1 0B0 0F2 0B1 0B2
    assert [[str(m.microbatch) for m in step.post] for step in plans[0].steps] == [[], ["0"], [], ["1"], ["2"], []]
    assert [step.receive.microbatch if step.receive else None for step in plans[0].steps] == [None, None, 0, None, 1, 2]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_receive_that_is_not_posted_is_refused(name):
    schedule = build_schedule(name, 3, 4)
    plans = plan_communication(schedule)
    position = next(k for k, step in enumerate(plans[1].steps) if step.post)
    with pytest.raises(ScheduleError, match=r"^rank 1, position "):
        validate_plan(schedule, changed(plans, 1, position, post=()))


def test_a_receive_posted_after_its_wait_is_refused():
    schedule = build_schedule("gpipe", 2, 2)
    plans = plan_communication(schedule)
    #  Rank 1 posts both forwards' receives at its first action; let the second come at the third.
    first, second = plans[1].steps[0].post
    late = changed(changed(plans, 1, 0, post=(first,)), 1, 2, post=(second,))
    with pytest.raises(
        ScheduleError, match=r"rank 1, position 1, action 1F1: it waits .* before the receive is posted"
    ):
        validate_plan(schedule, late)


def test_receives_posted_in_another_order_than_sent_are_refused():
    schedule = build_schedule("gpipe", 2, 2)
    plans = plan_communication(schedule)
    with pytest.raises(ScheduleError, match=r"rank 1, position 0, action 1F0: it posts .* where rank 0 sends"):
        validate_plan(schedule, changed(plans, 1, 0, post=tuple(reversed(plans[1].steps[0].post))))


def test_waiting_for_sends_that_are_not_known_to_be_posted_is_a_deadlock():
    def impatient(plan):
        """Waits for every send before the next action."""
        sends = [None, *(step.send for step in plan.steps)]
        finish = [() if send is None else (send,) for send in sends]
        steps = tuple(replace(step, finish=finish[k]) for k, step in enumerate(plan.steps))
        return replace(plan, steps=steps, finish=finish[-1])

    one_chunk = build_schedule("1f1b", 4, 8)
    validate_plan(one_chunk, tuple(map(impatient, plan_communication(one_chunk))))
    chunks = build_schedule("zero-bubble-v", 4, 8)
    with pytest.raises(
        ScheduleError, match=r"^rank 0, position \d+, action 7W\d+: deadlock: it waits for ever for the"
    ):
        validate_plan(chunks, tuple(map(impatient, plan_communication(chunks))))


def test_a_send_finished_twice_or_never_is_refused():
    schedule = build_schedule("1f1b", 2, 3)
    plans = plan_communication(schedule)
    position = next(k for k, step in enumerate(plans[0].steps) if step.finish)
    step = plans[0].steps[position]
    with pytest.raises(ScheduleError, match="which is not under way"):
        validate_plan(schedule, changed(plans, 0, position, finish=step.finish * 2))
    with pytest.raises(ScheduleError, match="is not finished"):
        validate_plan(schedule, changed(plans, 0, position, finish=()))


def test_a_send_that_is_left_out_is_refused():
    schedule = build_schedule("1f1b", 2, 3)
    plans = plan_communication(schedule)
    with pytest.raises(ScheduleError, match=r"rank 0, position 0, action 0F0: its messages are not"):
        validate_plan(schedule, changed(plans, 0, 0, send=None))
