# SPDX-License-Identifier: Apache-2.0
"""Ranks that share processors, and messages whose kinds take different times."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_bert.planning.devices import DEVICES, Device, Link, Transfer, Transfers, load_device, load_network
from megatron_bert.planning.layouts import Layout
from megatron_bert.planning.machine import Machine
from megatron_bert.planning.plan_command import run_plan
from megatron_bert.planning.search import predict
from megatron_bert.planning.step_time import StepTime, shared_seconds
from parallel.errors import UserError
from tests.megatron_bert.planning.support import CONFIGS
from tests.megatron_bert.planning.test_closed_forms import workload
from tests.megatron_bert.planning.test_search import arguments

#: Messages that take a while, half of it on a processor.
LINK = Link(gigabytes_per_second=1.0, latency_microseconds=1000.0, processor_share=0.5)
WORK = replace(workload(layers=4, hidden=256), global_batch=32)


def step(layout: Layout, link: Link = LINK, **device: Any) -> StepTime:
    """Of ranks of one host with processors of this kind."""
    values = DEVICES["cpu"].model_dump() | {"link": link.model_dump()} | device
    return predict(WORK, layout, Machine(Device.model_validate(values), link)).time


class TestTurns:
    def test_a_rank_with_a_processor_of_its_own_takes_as_long_as_it_takes(self) -> None:
        assert shared_seconds(3.0, 2.0, 1.0) == 3.0

    @pytest.mark.parametrize("ranks", [1.0, 1.5, 2.0, 3.0, 8.0])
    def test_ranks_that_never_wait_take_turns(self, ranks: float) -> None:
        assert shared_seconds(3.0, 3.0, ranks) == pytest.approx(3 * ranks)

    def test_ranks_that_only_wait_do_so_at_once(self) -> None:
        assert shared_seconds(3.0, 0.0, 4.0) == 3.0
        assert shared_seconds(0.0, 0.0, 4.0) == 0.0

    def test_two_ranks_by_hand(self) -> None:
        """Of 4 seconds a rank is at work for 3: it finds the other one there in 3 of 4 turns, and waits for its 3."""
        assert shared_seconds(4.0, 3.0, 2.0) == pytest.approx(4 + 3 * 3 / 4)
        assert shared_seconds(4.0, 3.0, 1.5) == pytest.approx(4 + 3 * 3 / 4 / 2)

    @pytest.mark.parametrize("work", [0.1, 0.5, 0.9])
    @pytest.mark.parametrize("ranks", [2.0, 3.0, 16.0])
    def test_no_faster_than_processors_and_no_slower_than_one_after_the_other(self, work: float, ranks: float) -> None:
        assert max(1.0, ranks * work) <= shared_seconds(1.0, work, ranks) <= 1 + (ranks - 1) * work


class TestSteps:
    def test_as_many_ranks_as_processors_do_not_share(self) -> None:
        alone = step(Layout(data=4, micro_batch=4))
        assert alone == step(Layout(data=4, micro_batch=4), ranks_at_once=4, devices_per_node=4)
        assert alone.sharing == 1

    def test_two_nodes_share_no_processors(self) -> None:
        layout = Layout(data=4, micro_batch=4)
        assert step(layout, ranks_at_once=2, devices_per_node=2).sharing == 1
        assert step(layout, ranks_at_once=2, devices_per_node=4).sharing > 1

    @pytest.mark.parametrize("part", ["pipeline", "data", "optimizer"])
    def test_every_part_is_longer(self, part: str) -> None:
        alone = step(Layout(data=4, micro_batch=4))
        shared = step(Layout(data=4, micro_batch=4), ranks_at_once=2)
        assert 1 < shared.sharing < 2
        assert getattr(shared, part) == pytest.approx(getattr(alone, part) * shared.sharing)

    def test_others_compute_in_the_bubble(self) -> None:
        """Ranks of a pipeline wait for each other anyway: sharing costs them less than those that never wait."""
        free = Link(gigabytes_per_second=1e6, latency_microseconds=0.0)
        data = step(Layout(data=4, micro_batch=4), free, ranks_at_once=2)
        deep = step(Layout(pipeline=4, micro_batch=16), free, ranks_at_once=2)
        assert data.sharing == pytest.approx(2, rel=1e-3)
        assert deep.bubble > 0.5
        assert deep.sharing < 1.4
        assert deep.timeline is not None
        assert deep.timeline.makespan == pytest.approx(deep.pipeline)

    @pytest.mark.parametrize(
        ("layout", "together"),
        [
            (Layout(data=4, micro_batch=4), True),
            (Layout(tensor=4, micro_batch=4), True),
            (Layout(data=4, sharding="full", micro_batch=4), True),
            (Layout(data=4, sharding="hybrid", shard_size=2, micro_batch=4), False),
            (Layout(tensor=2, data=2, micro_batch=4), False),
            (Layout(pipeline=2, data=2, micro_batch=4), False),
        ],
    )
    def test_nobody_computes_while_all_wait_for_the_same_message(self, layout: Layout, together: bool) -> None:
        """A longer latency is as much longer for ranks that share processors; other groups compute in between."""
        links = [LINK.model_copy(update={"processor_share": 0.0, "latency_microseconds": us}) for us in (100, 2000)]
        alone, shared = ([step(layout, link, ranks_at_once=many).seconds for link in links] for many in (4, 2))
        assert (shared[1] - shared[0] == pytest.approx(alone[1] - alone[0])) == together
        assert shared[0] < shared[1]

    def test_processors_at_work_on_messages_help_nobody(self) -> None:
        layout = Layout(tensor=4, micro_batch=4)
        seconds = [
            step(layout, LINK.model_copy(update={"processor_share": share}), ranks_at_once=2).seconds
            for share in (0.0, 0.5, 1.0)
        ]
        assert seconds == sorted(seconds)
        assert len(set(seconds)) == 3


class TestBesideProducts:
    """Gradients of weights are computed while those of inputs are summed, as far as the sum leaves processors free."""

    LAYOUT = Layout(tensor=2, micro_batch=4)

    def seconds(self, share: float, **device: Any) -> float:
        return step(self.LAYOUT, LINK.model_copy(update={"processor_share": share}), **device).seconds

    def test_what_keeps_no_processor_is_hidden(self) -> None:
        assert self.seconds(0.0) < self.seconds(0.5) < self.seconds(1.0)
        messages = 2 * 4 * 8  # two sums beside products, in four layers and eight micro batches
        longest = LINK.seconds("all-reduce", 4 * 512 * 256 * 2, 2)
        assert self.seconds(1.0) - self.seconds(0.5) == pytest.approx(messages * longest / 2)

    def test_a_gpu_needs_no_processor_for_them(self) -> None:
        assert self.seconds(1.0, asynchronous=True) == self.seconds(0.0, asynchronous=True) < self.seconds(1.0)


class TestKinds:
    @pytest.mark.parametrize(
        ("kind", "layout", "sends"),
        [
            ("all-gather", Layout(tensor=2, micro_batch=4), False),
            ("all-gather", Layout(tensor=2, sequence=True, micro_batch=4), True),
            ("reduce-scatter", Layout(data=2, micro_batch=4), False),
            ("reduce-scatter", Layout(data=2, sharding="optimizer", micro_batch=4), True),
            ("all-gather", Layout(data=2, sharding="full", micro_batch=4), True),
            ("send", Layout(tensor=2, micro_batch=4), False),
            ("send", Layout(pipeline=2, micro_batch=4), True),
        ],
    )
    def test_a_kind_counts_where_it_is_sent(self, kind: str, layout: Layout, sends: bool) -> None:
        slow = Link.model_validate(
            LINK.model_dump() | {"by_kind": {kind: {"gigabytes_per_second": 0.1, "latency_microseconds": 10_000}}}
        )
        assert (step(layout, slow).seconds > step(layout).seconds) == sends

    def test_numbers_of_ranks_that_were_not_measured_have_the_default(self) -> None:
        transfers = Transfers(
            gigabytes_per_second=1,
            latency_microseconds=1,
            by_ranks={2: Transfer(gigabytes_per_second=1, latency_microseconds=1000)},
            latency_by_ranks={3: 7},
        )
        assert transfers.among(2).latency_microseconds == 1000
        assert transfers.among(3).latency_microseconds == 7
        assert transfers.among(4) is transfers


class TestFiles:
    def test_a_network_without_kinds_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "network.yaml"
        path.write_text(
            "link: {gigabytes_per_second: 12.5, latency_microseconds: 20, latency_by_ranks: {2: 10, 4: 15}}"
        )
        link = load_network(path)
        assert link.of("reduce-scatter", 4).seconds("reduce-scatter", 1e9, 4) == pytest.approx(0.75 / 12.5 + 15e-6)
        assert link.of("all-reduce", 8).seconds("all-reduce", 0, 8) == pytest.approx(20e-6)

    @pytest.mark.parametrize(
        ("values", "says"),
        [
            ({"by_kind": {"broadcast": {}}}, "by_kind.broadcast"),
            ({"by_kind": {"send": {"gigabytes_per_second": 1}}}, "by_kind.send.latency_microseconds: Field required"),
            ({"by_ranks": {2: {"gigabytes_per_second": 0, "latency_microseconds": 1}}}, "by_ranks.2.gigabytes_per_sec"),
            ({"by_ranks": {1: {"gigabytes_per_second": 1, "latency_microseconds": 1}}}, "by_ranks.1"),
            ({"latency_by_ranks": {-2: 1}}, "latency_by_ranks.-2"),
            ({"latency_by_ranks": {2: -1}}, "latency_by_ranks.2"),
            ({"processor_share": -0.5}, "processor_share"),
        ],
    )
    def test_what_a_link_cannot_be(self, values: dict[str, Any], says: str, tmp_path: Path) -> None:
        path = tmp_path / "network.yaml"
        path.write_text(yaml.safe_dump({"gigabytes_per_second": 1, "latency_microseconds": 1} | values))
        with pytest.raises(UserError, match=says):
            load_network(path)

    def test_the_file_that_the_documents_show_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "network.yaml"
        (shown,) = re.findall(r"^```yaml\n(.*?)^```", (CONFIGS.parent / "docs/planning.md").read_text(), re.M | re.S)
        path.write_text(shown)
        link = load_network(path)
        assert link.of("all-gather", 2).latency_microseconds == 1000
        assert link.of("reduce-scatter", 2).latency_microseconds == 3500

    def test_a_gpu_has_one_rank(self, tmp_path: Path) -> None:
        path = tmp_path / "gpu.yaml"
        path.write_text(yaml.safe_dump({"device": DEVICES["h100"].model_dump() | {"ranks_at_once": 2}}))
        with pytest.raises(UserError, match="ranks_at_once is for processors"):
            load_device(str(path))

    def test_the_plan_says_that_ranks_share(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "shared.yaml"
        path.write_text(yaml.safe_dump({"device": DEVICES["cpu"].model_dump() | {"ranks_at_once": 2}}))
        given = ["precision.compute=float32", "training.device=cpu", "--gpu", str(path), "--gpus"]
        run_plan(arguments(str(CONFIGS / "bert_tiny.yaml"), *given, "4"))
        assert "2 ranks take turns on a processor" in capsys.readouterr().out
        run_plan(arguments(str(CONFIGS / "bert_tiny.yaml"), *given, "2"))
        assert "take turns" not in capsys.readouterr().out
