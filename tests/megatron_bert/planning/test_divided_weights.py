# SPDX-License-Identifier: Apache-2.0
"""Copies that FSDP2 makes of weights and gradients: those of closed forms are those of a step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from megatron_bert.planning.devices import DEVICES, NETWORK, Link
from megatron_bert.planning.divided_weights import GATHER_OPERATORS, REDUCE_OPERATORS, added_bytes, units
from megatron_bert.planning.layouts import Layout, stages_of
from megatron_bert.planning.machine import Machine
from megatron_bert.planning.measuring import StepMeter
from megatron_bert.planning.memory import layout_of
from megatron_bert.planning.search import predict
from megatron_bert.planning.step_time import stage_times
from megatron_bert.planning.workload import workload_of
from tests.megatron_bert.planning.support import Vocabulary, measured, settings_of
from tests.megatron_bert.planning.test_closed_forms import workload

H100 = Machine(DEVICES["h100"], NETWORK)
WORK = replace(workload(layers=4, hidden=256), global_batch=64)
#: Ranks of one host, whose messages take nothing.
FREE = Link(gigabytes_per_second=1e9, latency_microseconds=0.0)


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of all of them."""
    return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors)


class CopyMeter:
    """Bytes that each of FSDP2's copies reads and writes, by operator."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes, self.calls = Counter[str](), Counter[str]()
        run = StepMeter.__torch_dispatch__

        def dispatch(meter: StepMeter, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count(func._schema.name, args, kwargs or {})
            return run(meter, func, types, args, kwargs)

        monkeypatch.setattr(StepMeter, "__torch_dispatch__", dispatch)

    def count(self, name: str, args: Any, kwargs: Any) -> None:
        """Count an operator that copies."""
        if name == "fsdp::all_gather_copy_in":
            self.add("sent", 2 * size_of(args[0]))
        elif name == "aten::_foreach_copy_" and args[0][0].dtype != args[1][0].dtype:
            self.add("cast", size_of(args[0]) + size_of(args[1]))
        elif name == "fsdp::split_with_sizes_copy":
            self.add("received", size_of([args[0]]) + size_of(kwargs["out"]))
        elif name == "fsdp::chunk_cat":
            self.add("summed", size_of(args[0]) + size_of([kwargs["out"]]))

    def add(self, what: str, size: int) -> None:
        """Count one."""
        self.bytes[what] += size
        self.calls[what] += 1


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (4, ["parallel.sharding=full"]),
        (4, ["parallel.sharding=full", "precision.compute=float32", "training.global_batch_size=16"]),
        (8, ["parallel.sharding=hybrid", "parallel.shard_size=2", "parallel.tensor=2"]),
        (8, ["parallel.sharding=full", "parallel.pipeline=2", "training.recompute=full"]),
        (8, ["parallel.sharding=full", "parallel.pipeline=2", "parallel.schedule=zero-bubble-h1"]),
    ],
    ids=["d4", "d4-float32", "t2d4-hybrid", "p2d4-recompute", "p2d4-split"],
)
def test_copies_are_those_of_closed_forms(ranks: int, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of("data.packed=false", *overrides)
    work = workload_of(settings, settings.model_config_for(Vocabulary.vocab_size, 0), 1, settings.data.seq_length)
    layout = layout_of(settings, ranks)
    meter = CopyMeter(monkeypatch)
    measured(settings, 0, ranks)
    microbatches = layout.microbatches(work)
    (stage,) = (stage for stage in stages_of(work, layout) if stage.number == 0)
    found = list(units(stage, work.number_bytes))
    times = [2] * len(stage.part.layers) + [1]
    assert [(unit.size, many) for unit, many in zip(found, times, strict=True)] == stage.unit_sizes
    assert meter.calls["sent"] == meter.calls["received"] == microbatches * sum(times)
    assert meter.calls["summed"] == len(found)
    for what, size in (
        ("sent", sum(many * unit.sent_bytes for unit, many in zip(found, times, strict=True)) * microbatches),
        ("received", sum(many * unit.received_bytes for unit, many in zip(found, times, strict=True)) * microbatches),
        ("summed", sum(unit.summed_bytes(microbatches) for unit in found)),
    ):
        seen = meter.bytes[what] + (meter.bytes["cast"] if what == "sent" else 0)
        assert seen == size, what


def seconds(layout: Layout) -> float:
    """Of a step of ranks on processors of their own, but for the optimizer."""
    device = DEVICES["cpu"].model_copy(update={"link": FREE})
    time = predict(WORK, layout, Machine(device, FREE)).time
    return time.seconds - time.optimizer


def of_micro_batch(layout: Layout, machine: Machine) -> float:
    """Seconds of a micro batch."""
    return stage_times(WORK, layout, stages_of(WORK, layout), machine)[0].total


class TestTimes:
    FULL = Layout(data=4, micro_batch=4, sharding="full")

    def test_a_processor_takes_turns_with_copies_and_the_host(self) -> None:
        """Beside whole weights: what is copied and added, at the speed of memory, and the operators of each unit."""
        microbatches = self.FULL.microbatches(WORK)
        found = list(units(stages_of(WORK, self.FULL)[0], 2))
        gathers = [2] * 4 + [1]
        copied = sum(
            microbatches * many * (unit.sent_bytes + unit.received_bytes) + unit.summed_bytes(microbatches)
            for unit, many in zip(found, gathers, strict=True)
        )
        config = WORK.config
        weights = 4 * 12 * config.hidden_size**2 + config.padded_vocab_size * config.hidden_size
        whole = Layout(data=4, micro_batch=4, sharding="optimizer")
        added = weights * microbatches * (added_bytes(WORK, self.FULL) - added_bytes(WORK, whole))
        operators = microbatches * sum(gathers) * GATHER_OPERATORS + len(found) * REDUCE_OPERATORS
        device = DEVICES["cpu"]
        expected = (copied + added) / (device.memory_gb_per_second * device.memory_share * 1e9)
        expected += operators * device.launch_microseconds * 1e-6
        assert seconds(self.FULL) - seconds(whole) == pytest.approx(expected, rel=1e-4)

    def test_gradients_of_the_first_micro_batch_are_not_added(self) -> None:
        one, four = (replace(WORK, global_batch=16 * many) for many in (1, 4))
        assert [added_bytes(work, self.FULL) for work in (one, four)] == [0, (6 + 3 * 10) / 4]
        assert added_bytes(replace(four, compute="float32"), self.FULL) == 3 * 12 / 4
        assert added_bytes(one, Layout(data=4, micro_batch=4)) == 10

    def test_a_gpu_hides_messages_but_not_copies_of_what_arrived(self) -> None:
        """Those run where it computes: as long as their bytes take, with a link so fast that nothing waits for it."""
        quick = DEVICES["h100"].model_copy(update={"launch_microseconds": 0.0, "link": FREE})
        machine = Machine(quick, FREE)
        found = list(units(stages_of(WORK, self.FULL)[0], 2))
        copied = sum(many * unit.received_bytes for unit, many in zip(found, [2] * 4 + [1], strict=True))
        root = found[-1].sent_bytes
        config, per = WORK.config, added_bytes(WORK, self.FULL) - 10
        added = (4 * 12 * config.hidden_size**2 + config.padded_vocab_size * config.hidden_size) * per
        longer = of_micro_batch(self.FULL, machine) - of_micro_batch(replace(self.FULL, sharding="optimizer"), machine)
        assert longer == pytest.approx(machine.moving(copied + root + added), rel=1e-3)

    def test_groups_within_a_node_send_nothing_between_nodes_but_sums(self) -> None:
        slow = Machine(DEVICES["h100"], Link(gigabytes_per_second=0.01, latency_microseconds=100))
        hybrid = Layout(data=16, micro_batch=4, sharding="hybrid", shard_size=8)
        assert of_micro_batch(hybrid, slow) == of_micro_batch(hybrid, H100)
        full = replace(hybrid, sharding="full", shard_size=None)
        assert of_micro_batch(full, slow) > of_micro_batch(full, H100)
