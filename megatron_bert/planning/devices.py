# SPDX-License-Identifier: Apache-2.0
"""What devices and networks can do: from the makers' data sheets, or measured by ``megatron-bert bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from megatron_bert.config_file import read_mapping
from megatron_bert.planning.workload import BYTES
from megatron_bert.section import Section
from parallel.errors import UserError, brief
from parallel.whole_files import reporting

#: Bytes of a gibibyte.
GIB = 2**30


#: What ranks send, as a file of a link names it; a receive takes as long as the send.
Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "send"]
_Several = Annotated[int, Field(ge=2)]
#: Far above what any device or network does, and below what most do in another unit, such as bytes per second.
_MOST = 1e9


def ring_share(kind: str, ranks: int) -> float:
    """How many times the bytes of a whole tensor each rank sends where a collective goes around a ring."""
    around = (ranks - 1) / ranks
    return {"all-reduce": 2 * around, "all-gather": around, "reduce-scatter": around}.get(kind, 1.0)


class Transfer(Section):
    """What a message takes: a time of its own, and one for its bytes."""

    gigabytes_per_second: float = Field(
        gt=0, le=_MOST, description="Of one rank, in one direction, as if collectives went around a ring."
    )
    latency_microseconds: float = Field(ge=0, le=_MOST, description="Of a message of nothing.")
    processor_share: float = Field(
        1.0, ge=0, le=1, description="Of its time, for which a processor of each rank is at work; see ranks_at_once."
    )

    def seconds(self, kind: str, size: float, ranks: int) -> float:
        """Seconds of a message of so many bytes, of the whole tensor, among so many ranks."""
        return ring_share(kind, ranks) * size / (self.gigabytes_per_second * 1e9) + self.latency_microseconds * 1e-6


class Transfers(Transfer):
    """The same for any number of ranks."""

    latency_by_ranks: dict[_Several, Annotated[float, Field(ge=0, le=_MOST)]] = Field(
        {}, description="Of a message of nothing among so many ranks, where that is known."
    )
    by_ranks: dict[_Several, Transfer] = Field({}, description="Among so many ranks, where that was measured.")

    def among(self, ranks: int) -> Transfer:
        """Among so many ranks."""
        if ranks in self.by_ranks or ranks not in self.latency_by_ranks:
            return self.by_ranks.get(ranks, self)
        return self.model_copy(update={"latency_microseconds": self.latency_by_ranks[ranks]})


class Link(Transfers):
    """A connection between ranks: what an all-reduce takes, and other messages where they differ."""

    by_kind: dict[Kind, Transfers] = Field({}, description="Other kinds of messages, where they were measured.")

    def of(self, kind: str, ranks: int) -> Transfer:
        """What messages of a kind take among so many ranks."""
        return self.by_kind.get("send" if kind == "receive" else kind, self).among(ranks)  # type: ignore[call-overload]


class Device(Section):
    """What a rank computes on.

    Shares say what of a peak is reached. Those of published devices are from runs that others or this project
    published, see docs/planning.md.
    """

    name: str = Field(description="For people.")
    source: Literal["published", "measured"] = Field("published", description="Where the numbers are from.")
    note: str = Field("", description="By what they were measured.")
    memory_gib: float = Field(gt=0, le=_MOST, description="Of one rank.")
    peak_tflops: dict[str, float] = Field(min_length=1, description="Dense matrix products, by format.")
    product_share: float = Field(0.85, gt=0, le=1, description="Of the peak, that large matrix products reach.")
    product_size: float = Field(
        64, ge=0, le=_MOST, description="Rows or columns of a product at which half of that is reached."
    )
    attention_share: float = Field(0.24, gt=0, le=1, description="Of the peak, that attention reaches.")
    attention_dropout_share: float | None = Field(
        None, gt=0, le=1, description="The same with dropout; five sixths of it where unset."
    )
    memory_gb_per_second: float = Field(gt=0, le=_MOST, description="Of reading and writing.")
    memory_share: float = Field(0.8, gt=0, le=1, description="Of that, that elementwise operators reach.")
    optimizer_gb_per_second: float | None = Field(
        None, gt=0, le=_MOST, description="Of the optimizer; as other operators where unset."
    )
    launch_microseconds: float = Field(6.0, ge=0, le=_MOST, description="Of the host, for each operator.")
    asynchronous: bool = Field(True, description="Whether the host and messages work on beside it, as with a GPU.")
    devices_per_node: int = Field(8, gt=0, le=2**20, description="That share the inner link.")
    ranks_at_once: int | None = Field(
        None,
        gt=0,
        description="Ranks of a node that can compute at the same time, where more of them share its processors.",
    )
    link: Link | None = Field(None, description="Inside a node; none where a node has one device.")

    @model_validator(mode="after")
    def _only_processors_are_shared(self) -> Self:
        if self.asynchronous and self.ranks_at_once is not None:
            raise ValueError("ranks_at_once is for processors (asynchronous: false), for a GPU has one rank")
        if self.ranks_at_once is not None and self.ranks_at_once > self.devices_per_node:
            raise ValueError(f"ranks_at_once {self.ranks_at_once} is above devices_per_node {self.devices_per_node}")
        return self

    @model_validator(mode="after")
    def _several_have_a_link(self) -> Self:
        if self.link is None and self.devices_per_node > 1:
            raise ValueError(f"link is not set, but the {self.devices_per_node} devices_per_node share one")
        return self

    @field_validator("name", "note")
    @classmethod
    def _on_a_terminal(cls, value: str) -> str:
        if not value.isprintable():
            raise ValueError("it has characters that cannot be printed")
        return value

    @field_validator("peak_tflops")
    @classmethod
    def _of_formats(cls, value: dict[str, float]) -> dict[str, float]:
        for name, peak in value.items():
            if name not in BYTES or not 0 < peak <= _MOST:
                raise ValueError(f"{name}: {peak} is not a peak of {', '.join(BYTES)}")
        return value


def _gpu(name: str, memory: float, half: float, single: float, bandwidth: float, link: float, **more: Any) -> Device:
    return Device(
        name=name,
        memory_gib=memory,
        peak_tflops={"float32": single, "bfloat16": half, "float16": half},
        memory_gb_per_second=bandwidth,
        link=Link(gigabytes_per_second=link, latency_microseconds=12),
        **more,
    )


#: Dense peaks, memory and links of the makers' data sheets; links in one direction. V100 has no bfloat16 products.
DEVICES: dict[str, Device] = {
    "b200": _gpu("B200", 179, 2250, 80, 8000, 900),
    "h200": _gpu("H200 SXM", 140, 989, 67, 4800, 450),
    "h100": _gpu("H100 SXM", 79, 989, 67, 3350, 450),
    "a100": _gpu("A100 SXM 80 GB", 79, 312, 19.5, 2039, 300, attention_share=0.4),
    "l40s": _gpu("L40S", 44, 362, 91.6, 864, 32, attention_share=0.4),
    "v100": Device(
        name="V100 SXM 32 GB",
        memory_gib=31.5,
        peak_tflops={"float32": 15.7, "float16": 125},
        memory_gb_per_second=900,
        product_share=0.75,
        attention_share=0.25,
        link=Link(gigabytes_per_second=150, latency_microseconds=12),
    ),
    "cpu": Device(
        name="a core with AVX-512",
        memory_gib=16,
        peak_tflops={"float32": 0.12, "bfloat16": 0.25},
        memory_gb_per_second=10,
        memory_share=0.5,
        attention_share=0.3,
        launch_microseconds=10,
        asynchronous=False,
        link=Link(gigabytes_per_second=1, latency_microseconds=100),
    ),
}

#: Between nodes: 400 Gbit/s a device, as such clusters have.
NETWORK = Link(gigabytes_per_second=50, latency_microseconds=25)


def load_device(name: str) -> Device:
    """A device by its name, or from a file that ``megatron-bert bench`` wrote.

    Raises:
        UserError: there is neither.
    """
    if name.lower() in DEVICES:
        return DEVICES[name.lower()]
    return _load(Path(name), Device, f"--gpu is {name!r}: give one of {', '.join(DEVICES)}, or a file")


def load_network(path: Path | None) -> Link:
    """The link between nodes; the usual one without a file.

    Raises:
        UserError: the file cannot be read, or is not one.
    """
    return NETWORK if path is None else _load(path, Link, f"--network is {str(path)!r}: give a file")


def _load(path: Path, kind: type[Any], says: str) -> Any:
    remedy = "write it with `megatron-bert bench`"
    if not path.is_file():
        raise UserError(f"{says} that `megatron-bert bench` wrote")
    with reporting("read", path, remedy):
        values = read_mapping(path, remedy)
    if kind is Link and "device" in values and values.get("link") is None:
        raise UserError(
            f"--network {path} holds no link, for a single rank was measured: measure several with "
            "`megatron-bert bench --ranks N`, or leave --network out"
        )
    try:
        return kind.model_validate(values.get(kind.__name__.lower(), values))
    except ValidationError as error:
        first = error.errors()[0]
        place = brief(".".join(map(str, first["loc"])) or "the file")
        raise UserError(f"{path}: {place}: {brief(first['msg'], 300)}; {remedy}") from error
