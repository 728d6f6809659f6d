# SPDX-License-Identifier: Apache-2.0
"""Where ranks run, and what each kind of work takes there."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bert.planning.devices import Device, Link
from megatron_bert.planning.layouts import Layout


@dataclass(frozen=True)
class Machine:
    """Where ranks run.

    Attributes:
        device: of each.
        network: between nodes.
        working: whether messages count only for as long as they keep a processor at work.
    """

    device: Device
    network: Link
    working: bool = False

    def link(self, layout: Layout, axis: str) -> Link:
        """The link that the ranks of an axis have between them: neighbors in rank are in one node."""
        inside = {"tensor": 1, "data_shard": layout.shards, "data_replicate": layout.data, "data": layout.data}
        span = layout.tensor * inside[axis] if axis in inside else layout.world_size
        inner = self.device.link if span <= self.device.devices_per_node else None
        return inner or self.network

    def product(self, rows: float, columns: float, inner: float, compute: str) -> float:
        """Seconds of a matrix product: small ones reach less of the peak."""
        device = self.device
        share = device.product_share
        for size in (rows, columns, inner):
            share *= size / (size + device.product_size)
        return 2 * rows * columns * inner / (device.peak_tflops[compute] * 1e12 * share)

    def attention(self, flops: float, compute: str, dropout: bool) -> float:
        """Seconds of attention."""
        share = self.device.attention_share
        if dropout:
            share = self.device.attention_dropout_share or share * 5 / 6
        return flops / (self.device.peak_tflops[compute] * 1e12 * share)

    def moving(self, size: float) -> float:
        """Seconds of elementwise operators that read and write so many bytes."""
        return size / (self.device.memory_gb_per_second * 1e9 * self.device.memory_share)

    def message(self, kind: str, size: float, ranks: int, link: Link) -> float:
        """Seconds of a message."""
        if ranks == 1:
            return 0.0
        transfer = link.of(kind, ranks)
        return transfer.seconds(kind, size, ranks) * (transfer.processor_share if self.working else 1.0)

    def unattended(self, kind: str, size: float, ranks: int, link: Link) -> float:
        """Seconds of a message in which a rank can compute: all on a GPU, those without a processor on one of those."""
        seconds = self.message(kind, size, ranks, link)
        if self.device.asynchronous:
            return seconds
        return 0.0 if self.working else seconds * (1 - link.of(kind, ranks).processor_share)

    def ranks_per_processor(self, ranks: int) -> float:
        """How many of a run's ranks take turns on a processor; 1 where each has its own."""
        at_once = self.device.ranks_at_once
        return 1.0 if at_once is None else max(1.0, min(ranks, self.device.devices_per_node) / at_once)

    def with_host(self, device_seconds: float, operators: float) -> float:
        """Seconds of operators with what the host takes to start them, which a GPU does not wait for."""
        host = operators * self.device.launch_microseconds * 1e-6
        return max(device_seconds, host) if self.device.asynchronous else device_seconds + host
