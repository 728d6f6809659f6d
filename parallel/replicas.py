# SPDX-License-Identifier: Apache-2.0
"""Whether ranks that hold copies of a value hold the same: parameters, optimizer states, and what belongs to them.

Copies start alike and get the same updates, so they stay equal bit for bit. One that differs was damaged: training
would go on from a mixture, and a checkpoint would hold either of them.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.errors import UserError, first_of
from parallel.hosts import host_name
from parallel.mesh import AXES, ParallelMesh
from parallel.object_collectives import gather_objects
from parallel.parts import Part

#: Elements hashed at a time: 32 MiB of temporary values.
_CHUNK = 2**22
#: 2^32 / golden ratio, odd.
_MULTIPLIER = 0x9E3779B1
#: Another odd number, by which chunks differ.
_CHUNK_FACTOR = 0x85EBCA77
#: Tensor ranks compute gradients of what they hold alike each for itself, and kernels may round differently there. The
#: largest such difference, relative to the largest value.
_ROUNDING = 1e-3
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

#: What the ranks that hold one value have in common: coordinates on the axes over which it is not copied.
Place = tuple[tuple[str, int], ...]


#: Of values that differ: their hashes, how far they are from those saved last, and the host.
Evidence = tuple[tuple[int, ...], float | None, str]


@dataclass(frozen=True)
class Copy:
    """Values of this rank that other ranks may hold too.

    Attributes:
        values: this rank's part of them.
        axes: of the mesh, over which they are copied.
    """

    name: str
    values: Tensor
    axes: frozenset[str]

    @classmethod
    def of(cls, name: str, tensor: Tensor | Part, *more_axes: str) -> Copy:
        """What this rank holds of a parameter or its state, with axes it is copied over beside those it shows."""
        part = Part.of(tensor)
        return cls(name, part.values, part.axes | frozenset(more_axes))

    def places(self, mesh: ParallelMesh) -> list[Place]:
        """Where they are compared: with all other copies of this tensor rank, and over the tensor ranks."""
        return [
            tuple((axis, mesh.coordinate[axis]) for axis in AXES if axis not in copied)
            for copied in (self.axes - {"tensor"}, self.axes & {"tensor"})
            if any(mesh.size[axis] > 1 for axis in copied)
        ]


@torch.no_grad()
def bits_hash(values: Tensor) -> Tensor:
    """A hash of the bytes of a tensor, an int64 scalar on its device, the same wherever its kind of device is."""
    if values.is_cuda:
        return sum_hash(values)
    content = values.contiguous().view(-1).view(torch.uint8).numpy().data
    return torch.tensor(zlib.crc32(content))  # ten times as fast as a cryptographic hash, and sure of any flipped bits


def sum_hash(values: Tensor) -> Tensor:
    """A hash that a device computes: exact integers, whatever the order in which they are summed.

    Every element counts with an odd factor of its own, modulo 2^64, so a change of any one element changes the sum.
    """
    flat = values.reshape(-1)
    bits = (flat.view(torch.int8) if flat.dtype == torch.bool else flat).view(_INTEGERS[flat.element_size()])
    factors = _factors(_CHUNK, values.device)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for part in bits.split(_CHUNK):
        total = total * _CHUNK_FACTOR + (factors[: part.numel()] * part).sum()
    return total


@functools.cache
def _factors(count: int, device: torch.device) -> Tensor:
    """Odd int64 numbers, spread by Knuth's multiplicative hash of 0, 1, 2, ..."""
    return torch.arange(count, device=device).mul_(_MULTIPLIER).bitwise_or_(1)


def compare_replicas(
    copies: Iterable[Copy], mesh: ParallelMesh, saved: Callable[[str], Tensor | None] | None = None
) -> None:
    """Compare what several ranks hold alike; every rank calls.

    What is copied nowhere is not looked at. Differences over tensor ranks alone that rounding explains are none.

    Args:
        copies: what this rank holds.
        saved: this rank's part of a value as it was saved last, or None; asked where two ranks differ and no third says
            which of them is right.

    Raises:
        UserError: copies differ; it names ranks and values, and is the same on every rank.
    """
    placed = [(copy, places) for copy in copies if (places := copy.places(mesh))]
    sums = torch.stack([bits_hash(copy.values) for copy, _ in placed]).tolist() if placed else []
    mine: dict[Place, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    by_name: dict[tuple[Place, str], Copy] = {}
    for (copy, places), value in zip(placed, sums, strict=True):
        for place in places:
            mine[place][copy.name].add(value)  # two values where this rank holds two copies that differ
            by_name[place, copy.name] = copy
    suspects = _differing(gather_objects({place: _digests(found) for place, found in mine.items()}))
    if not suspects:
        return
    # From here on every rank knows that something differs, and takes part in finding out what.
    named = {
        (place, name): tuple(sorted(found)) for place in suspects & mine.keys() for name, found in mine[place].items()
    }
    evidence = {}
    for key in sorted(_differing(gather_objects(named)) & by_name.keys()):
        copy = by_name[key]
        if "tensor" not in dict(key[0]) and _rounded(copy.values, mesh):
            continue
        before = None if saved is None else saved(copy.name)
        moved = None if before is None else (copy.values - before).abs().max().nan_to_num(torch.inf).item()
        evidence[key] = (named[key], moved, host_name())
    found = gather_objects(evidence)
    if any(found):
        raise UserError(_sentence(found))


def _digests(found: dict[str, set[int]]) -> tuple[bytes, ...]:
    """One of all values; a second where two copies on this rank differ."""
    first = sorted((name, min(values)) for name, values in found.items())
    last = sorted((name, max(values)) for name, values in found.items())
    return tuple({hashlib.blake2b(repr(values).encode(), digest_size=16).digest() for values in (first, last)})


def _differing(everyone: list[dict[Any, Any]]) -> set[Any]:
    """Keys under which the ranks that have them do not all have the same single value."""
    values = defaultdict(set)
    for rank in everyone:
        for key, found in rank.items():
            values[key].update(found)
    return {key for key, found in values.items() if len(found) > 1}


def _rounded(values: Tensor, mesh: ParallelMesh) -> bool:
    """Whether the tensor ranks' copies differ by no more than their kernels' rounding; all of them call."""
    if not values.is_floating_point():
        return False
    ends = mesh.all_reduce(
        torch.stack((values, -values)).double().nan_to_num(torch.inf), ("tensor",), dist.ReduceOp.MAX
    )
    apart = (ends[0] + ends[1]).max()
    return bool(apart <= _ROUNDING * ends.abs().max())


def _sentence(everyone: list[dict[tuple[Place, str], Evidence]]) -> str:
    """Which rank holds what of its own."""
    holders: dict[tuple[Place, str], dict[int, Evidence]] = defaultdict(dict)
    for rank, evidence in enumerate(everyone):
        for key, found in evidence.items():
            holders[key][rank] = found
    accused: dict[tuple[int, ...], list[str]] = defaultdict(list)
    pairs: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for (_, name), ranks in holders.items():
        odd = _odd(ranks)
        (accused if odd else pairs)[tuple(odd or ranks)].append(name)
    hosts = {rank: found[2] for ranks in holders.values() for rank, found in ranks.items()}
    parts = []
    for ranks_accused, names in sorted(accused.items()):
        verb = "holds" if len(ranks_accused) == 1 else "hold"
        parts.append(
            f"{_ranks(ranks_accused, hosts)} {verb} other values than the ranks with copies of {_names(names)}"
        )
    for pair, names in sorted(pairs.items()) if not accused else ():
        parts.append(
            f"{_ranks(pair, hosts)} hold different values of {_names(names)}, of which they should have equal copies"
            if len(pair) > 1
            else f"{_ranks(pair, hosts)} holds two copies of {_names(names)} that differ"
        )
    return (
        f"{'; '.join(parts)}: damaged in memory or by a device; nothing was saved of them, so start again from the "
        "checkpoint before, without that host if it happens there again"
    )


def _odd(ranks: dict[int, Evidence]) -> list[int]:
    """The ranks of a minority; of two ranks, the one whose values are much further from those saved last."""
    ((most, count), *others) = Counter(value for value, _, _ in ranks.values()).most_common()
    if count > sum(number for _, number in others) or not others:
        return [rank for rank, (value, _, _) in ranks.items() if value != most]
    apart = {rank: moved for rank, (_, moved, _) in ranks.items() if moved is not None}
    if len(apart) < len(ranks):
        return []
    near = min(apart.values())
    far = [rank for rank, moved in apart.items() if moved > 10 * near]
    return far if len({ranks[rank][0] for rank in far}) == 1 else []


def _names(names: list[str]) -> str:
    return first_of(dict.fromkeys(names))


def _ranks(ranks: tuple[int, ...], hosts: dict[int, str]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {first_of(f'{rank} ({hosts[rank]})' for rank in ranks)}"
