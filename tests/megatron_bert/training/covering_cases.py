# SPDX-License-Identifier: Apache-2.0
"""Layouts of up to eight ranks among which every pair of options occurs.

``python -m tests.megatron_bert.training.covering_cases`` chooses them again, for options that are added. That takes
longer than to train most of them, so they are written down here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import fields
from itertools import combinations
from typing import Any, get_args

from parallel.mesh import Sharding
from parallel.pipeline.schedules import SCHEDULES
from parallel.recompute import Recompute
from tests.megatron_bert.training.layouts import BATCH, LENGTH, Case

#: Sizes of the tensor and of the data axis: divisors of the heads, the intermediate size and the batch.
WIDTHS = (1, 2, 3, 4, 6, 8)
#: Depths of the model; a case takes the least that gives every stage a layer and, of up to four, some stages more.
DEPTHS = (3, 5, 8, 16)
MOST_RANKS = 8

_TABLE = """
tensor pipeline data schedule chunks sequence recompute sharding microbatches packed by_hand depth
1 1 1 interleaved-1f1b 2 0 selective none 2 1 0 3
1 2 1 zero-bubble-h1 1 0 full none 1 0 1 3
1 1 2 gpipe 1 0 none full 2 0 0 3
1 2 1 zero-bubble-h1 1 0 selective none 4 0 0 3
2 1 1 gpipe 1 0 none none 2 0 0 3
1 3 1 1f1b 1 0 selective none 4 1 1 5
3 1 1 zero-bubble-h1 1 1 selective none 2 0 0 3
1 1 3 interleaved-1f1b 3 0 none full 2 1 1 5
1 3 1 interleaved-1f1b 2 0 selective none 1 0 1 8
2 2 1 gpipe 1 1 none none 2 1 1 3
2 1 2 zero-bubble-v 2 1 full optimizer 2 1 1 3
1 4 1 zero-bubble-v 2 0 none none 1 0 0 8
1 1 4 1f1b 1 0 full hybrid 2 1 1 3
1 2 2 interleaved-1f1b 3 0 selective optimizer 1 0 0 8
2 2 1 zero-bubble-v 2 0 full none 3 0 0 5
4 1 1 zero-bubble-v 2 1 full none 2 1 0 3
1 2 2 interleaved-1f1b 3 0 selective full 3 1 0 8
1 4 1 interleaved-1f1b 3 0 none none 8 0 0 16
1 5 1 gpipe 1 0 selective none 6 0 0 5
1 2 3 1f1b 1 0 selective optimizer 2 0 0 3
2 3 1 interleaved-1f1b 3 1 full none 1 0 0 16
1 3 2 zero-bubble-h1 1 0 none optimizer 4 0 0 5
3 2 1 gpipe 1 0 full none 1 1 1 3
3 1 2 1f1b 1 0 none full 2 0 0 3
1 3 2 zero-bubble-v 2 0 selective full 3 1 1 8
2 1 3 zero-bubble-h1 1 1 none none 2 1 1 3
1 1 6 zero-bubble-v 2 0 full hybrid 2 0 0 3
3 2 1 interleaved-1f1b 3 1 none none 2 1 1 8
1 3 2 gpipe 1 0 none none 6 1 0 5
1 6 1 gpipe 1 0 none none 1 1 1 8
6 1 1 zero-bubble-h1 1 1 full none 2 0 0 3
1 7 1 gpipe 1 0 none none 1 1 1 8
2 2 2 interleaved-1f1b 2 1 selective full 1 0 1 5
1 4 2 zero-bubble-h1 1 0 full full 4 1 1 5
1 2 4 gpipe 1 0 selective hybrid 3 0 0 3
2 4 1 1f1b 1 1 none none 1 0 0 5
2 1 4 interleaved-1f1b 2 1 none hybrid 2 1 1 3
4 2 1 interleaved-1f1b 2 1 full none 3 0 1 5
1 4 2 interleaved-1f1b 2 0 full optimizer 4 0 1 8
1 2 4 zero-bubble-h1 1 0 none hybrid 1 1 1 3
4 1 2 gpipe 1 0 none optimizer 2 0 0 3
1 2 4 interleaved-1f1b 3 0 full hybrid 2 1 0 8
1 8 1 1f1b 1 0 selective none 1 0 0 8
8 1 1 interleaved-1f1b 2 1 full none 2 1 0 3
1 1 8 1f1b 1 0 none optimizer 3 0 0 3
"""


def _read(table: str) -> list[Case]:
    kinds = {field.name: type(field.default) for field in fields(Case)}
    names, *rows = (line.split() for line in table.strip().splitlines())
    cases = (zip(names, row, strict=True) for row in rows)
    return [Case(**{name: kinds[name](int(text) if text.isdigit() else text) for name, text in case}) for case in cases]


CASES = _read(_TABLE)


def triples() -> Iterator[tuple[int, int, int]]:
    """Every (tensor, pipeline, data) of at most eight ranks whose sizes divide the model."""
    for tensor in WIDTHS:
        for pipeline in range(1, MOST_RANKS + 1):
            for data in WIDTHS:
                if tensor * pipeline * data <= MOST_RANKS:
                    yield tensor, pipeline, data


def options(case: Case) -> dict[str, Any]:
    """What pairs are made of. Larger sizes count as one, and numbers of microbatches by how they fit the ranks."""
    rounds, rest = divmod(case.microbatches, case.pipeline)
    fit = "fewer" if rounds == 0 else "remainder" if rest else "one round" if rounds == 1 else "rounds"
    return {
        "tensor": min(case.tensor, 3),
        "pipeline": min(case.pipeline, 4),
        "data": min(case.data, 3),
        "schedule": (case.schedule, case.chunks),
        "sequence": case.sequence,
        "recompute": case.recompute,
        "sharding": case.sharding,
        "fit": fit,
        "packed": case.packed,
        "by_hand": case.by_hand,
    }


def features(case: Case) -> set[Any]:
    """The triple of a case, and all pairs of its options."""
    return {(case.tensor, case.pipeline, case.data), *combinations(options(case).items(), 2)}


def random_case(rng: random.Random, tensor: int, pipeline: int, data: int) -> Case:
    """Any other settings that a triple allows."""
    schedule, chunks = rng.choice(
        [*((name, kind.chunks[0]) for name, kind in SCHEDULES.items()), ("interleaved-1f1b", 3)]
    )
    if pipeline * chunks > DEPTHS[-1]:
        schedule, chunks = "interleaved-1f1b", 2
    stages = pipeline * chunks
    microbatches = rng.choice([m for m in range(1 if pipeline > 1 else 2, 9) if BATCH // data % m == 0])
    even = BATCH // data // microbatches * LENGTH % tensor == 0
    shardings = {1: ("none",), 2: ("none", "optimizer", "full"), 3: ("none", "optimizer", "full")}
    return Case(
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        schedule=schedule,
        chunks=chunks,
        sequence=tensor > 1 and even and rng.random() < 0.5,
        recompute=rng.choice(get_args(Recompute)),
        sharding=rng.choice(shardings.get(data, get_args(Sharding))),
        microbatches=microbatches,
        packed=rng.random() < 0.5,
        by_hand=rng.random() < 0.5,
        depth=min(depth for depth in DEPTHS if depth >= stages + (stages < 5)),
    )


def cost(case: Case) -> int:
    """Of a run of so small a model, in passes through a layer: those of all ranks, and what ranks and cases add."""
    return case.tensor * case.data * case.microbatches * case.depth + 12 * case.ranks + 80


def covering_cases() -> list[Case]:
    """Cases in which every triple and every possible pair of options occurs: a greedy choice from many random ones."""
    rng = random.Random(5)
    pool = [random_case(rng, *triple) for _ in range(200) for triple in triples()]
    numbers: dict[Any, int] = {}
    masks = []
    for case in pool:
        masks.append(sum(1 << numbers.setdefault(feature, len(numbers)) for feature in features(case)))
    costs = [cost(case) for case in pool]
    missing = (1 << len(numbers)) - 1
    chosen = []
    while missing:
        best = max(range(len(pool)), key=lambda index: (masks[index] & missing).bit_count() / costs[index])
        missing &= ~masks[best]
        chosen.append(pool[best])
    return sorted(chosen, key=lambda case: case.ranks)


if __name__ == "__main__":
    names = _TABLE.split("\n")[1].split()
    for case in covering_cases():
        values = (getattr(case, name) for name in names)
        print(*(value if isinstance(value, str) else int(value) for value in values))
