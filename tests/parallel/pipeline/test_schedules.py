# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from parallel.errors import UserError
from parallel.pipeline.actions import Placement
from parallel.pipeline.schedules import SCHEDULES, build_schedule, forward_only, rounds_of
from parallel.pipeline.simulate import Costs, simulate
from tests.parallel.pipeline.grid import RANKS, sizes


def bubble(name, ranks, microbatches, chunks=None, costs=None):
    return simulate(build_schedule(name, ranks, microbatches, chunks), costs).bubble


@pytest.mark.parametrize("name", SCHEDULES)
def test_simulated_bubble_is_the_closed_form(name):
    for ranks, microbatches, chunks in sizes(name):
        simulated = bubble(name, ranks, microbatches, chunks)
        closed = SCHEDULES[name].bubble(ranks, microbatches, chunks)
        if name == "zero-bubble-v" and 2 * microbatches < 3 * ranks - 1:
            assert simulated >= closed - 1e-12, (ranks, microbatches)
        else:
            assert simulated == pytest.approx(closed, abs=1e-12), (ranks, microbatches, chunks)


def test_closed_forms_are_the_published_ones():
    for p in RANKS:
        for m in (p, 2 * p, 5 * p):
            assert SCHEDULES["gpipe"].bubble(p, m, 1) == pytest.approx((p - 1) / (m + p - 1))
            assert SCHEDULES["1f1b"].bubble(p, m, 1) == pytest.approx((p - 1) / (m + p - 1))
            assert SCHEDULES["zero-bubble-h1"].bubble(p, m, 1) == pytest.approx((p - 1) / (3 * m + p - 1))
            assert SCHEDULES["zero-bubble-v"].bubble(p, m, 2) == pytest.approx((p - 1) / (6 * m + p - 1))
            for v in (2, 3, 4):
                assert SCHEDULES["interleaved-1f1b"].bubble(p, m, v) == pytest.approx((p - 1) / (v * m + p - 1))
        for m in (2 * p, 5 * p):
            assert SCHEDULES["interleaved-1f1b"].peak(p, m, 3) == pytest.approx(p * (1 + (p - 1) / (3 * p)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_peak_activations_are_the_closed_form(name):
    for ranks, microbatches, chunks in sizes(name):
        peaks = build_schedule(name, ranks, microbatches, chunks).peak_activations()
        assert max(peaks) / chunks == pytest.approx(SCHEDULES[name].peak(ranks, microbatches, chunks))


def test_rank_r_of_1f1b_holds_p_minus_r():
    assert build_schedule("1f1b", 4, 8).peak_activations() == (4, 3, 2, 1)
    assert build_schedule("1f1b", 4, 2).peak_activations() == (2, 2, 2, 1)


@pytest.mark.parametrize(
    ("ranks", "microbatches", "percent"),
    [
        (4, 8, (27.3, 27.3, 15.8, 8.6, 11.1, 5.9)),
        (4, 16, (15.8, 15.8, 8.6, 4.5, 5.9, 3.0)),
        (4, 32, (8.6, 8.6, 4.5, 2.3, 3.0, 1.5)),
        (8, 32, (17.9, 17.9, 9.9, 5.2, 6.8, 3.5)),
    ],
)
def test_bubbles_of_common_sizes(ranks, microbatches, percent):
    asked = [("gpipe", 1), ("1f1b", 1), ("interleaved-1f1b", 2), ("interleaved-1f1b", 4)]
    asked += [("zero-bubble-h1", 1), ("zero-bubble-v", 2)]
    found = tuple(round(100 * bubble(name, ranks, microbatches, chunks), 1) for name, chunks in asked)
    assert found == percent


def test_bubbles_when_the_three_costs_differ():
    costs = Costs(1, 1.3, 0.8)
    names = ("1f1b", "interleaved-1f1b", "zero-bubble-h1", "zero-bubble-v")
    assert [round(100 * bubble(name, 4, 16, costs=costs), 1) for name in names] == [15.8, 8.6, 8.3, 3.8]


def test_zero_bubble_h1_idles_p_minus_1_times_f_plus_b_minus_w():
    # Table 2 of arXiv 2401.10241, in its domain W <= F + B; every rank idles as long.
    for costs in (Costs(1, 1.3, 0.8), Costs(1, 2, 1), Costs(2, 2, 1)):
        for p, m in ((2, 4), (4, 8), (6, 20)):
            timeline = simulate(build_schedule("zero-bubble-h1", p, m), costs)
            idle = (p - 1) * (costs.forward + costs.backward_input - costs.backward_weight)
            assert timeline.makespan - max(timeline.busy) == pytest.approx(idle)


def test_zero_bubble_v_is_close_to_its_bound_for_few_microbatches():
    for p in RANKS:
        for m in range(p, 2 * p):
            slots = simulate(build_schedule("zero-bubble-v", p, m)).makespan
            assert slots - (6 * m + p - 1) <= 2
        # With one microbatch nothing can overlap: forwards and input gradients of all stages, one weight gradient.
        assert simulate(build_schedule("zero-bubble-v", p, 1)).makespan == 4 * p + (1 if p > 1 else 2)


def test_fewer_microbatches_than_ranks_take_the_depth_of_the_pipeline():
    assert simulate(build_schedule("1f1b", 4, 1)).makespan == 4 * 3
    assert simulate(build_schedule("interleaved-1f1b", 4, 1, 2)).makespan == 8 * 3
    assert simulate(build_schedule("zero-bubble-h1", 4, 1)).makespan == 4 * 2 + 1


def test_rounds_are_even_and_no_smaller_than_the_ranks():
    assert [list(group) for group in rounds_of(4, 9)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]
    assert [len(group) for group in rounds_of(4, 3)] == [3]
    for ranks in RANKS:
        for microbatches in range(1, 40):
            groups = rounds_of(ranks, microbatches)
            assert [i for group in groups for i in group] == list(range(microbatches))
            assert microbatches < ranks or min(map(len, groups)) >= ranks
            assert len(groups[0]) == max(map(len, groups)) <= min(map(len, groups)) + 1


@pytest.mark.parametrize(("placement", "chunks"), [(Placement.LOOP, 1), (Placement.LOOP, 3), (Placement.V, 2)])
def test_forward_only_bubble(placement, chunks):
    for p in RANKS:
        for m in (p, p + 1, 2 * p, 3 * p + 2):
            timeline = simulate(forward_only(p, m, chunks, placement))
            expected = (p - 1) / (m + p - 1) if placement is Placement.V else (p - 1) / (chunks * m + p - 1)
            assert timeline.bubble == pytest.approx(expected)
            assert {event.action.kind.value for event in timeline.events} == {"F"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dualpipe", 4, 8, None), "unknown pipeline schedule 'dualpipe': choose one of gpipe, 1f1b"),
        (("1f1b", 0, 8, None), "given 0 pipeline ranks: give 1 or more"),
        (("1f1b", 4, 0, None), "given 0 microbatches: give 1 or more"),
        (("interleaved-1f1b", 4, 8, 0), "given 0 virtual stages: give 1 or more"),
        (("interleaved-1f1b", 4, 8, 1), "given 1 virtual stages per rank but takes at least 2"),
        (("1f1b", 4, 8, 2), "given 2 virtual stages per rank but takes exactly 1"),
        (("zero-bubble-v", 4, 8, 3), "takes exactly 2"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        build_schedule(*arguments)
    assert str(caught.value).endswith(".")


def test_forward_only_refuses_bad_sizes():
    with pytest.raises(UserError, match="given 0 microbatches"):
        forward_only(2, 0)


def test_the_table_tells_what_the_schedules_are():
    for name, kind in SCHEDULES.items():
        schedule = build_schedule(name, 3, 4)
        assert (schedule.name, schedule.placement, schedule.backward) == (name, kind.placement, kind.backward)
        assert schedule.chunks == kind.default_chunks
