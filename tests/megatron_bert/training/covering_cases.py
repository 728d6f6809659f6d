# SPDX-License-Identifier: Apache-2.0
"""Layouts of up to eight ranks among which every pair of options occurs.

``python -m tests.megatron_bert.training.covering_cases`` chooses them again, for options that are added. That takes
longer than to train them, so they are written down here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import fields
from itertools import combinations
from typing import Any, get_args

import numpy as np

from parallel.mesh import Sharding
from parallel.pipeline.schedules import SCHEDULES
from parallel.recompute import Recompute
from tests.megatron_bert.training.layouts import BATCH, LENGTH, Case

#: Sizes of the tensor and of the data axis: divisors of the heads, the intermediate size and the batch.
WIDTHS = (1, 2, 3, 4, 6, 8)
#: Depths of the model; a case takes the least that gives every stage a layer and, of up to four or divided by hand,
#: some stages more.
DEPTHS = (3, 5, 8, 16)
MOST_RANKS = 8

_TABLE = """
tensor pipeline data schedule chunks sequence recompute sharding microbatches packed by_hand depth
1 1 1 zero-bubble-v 2 0 full none 2 1 0 3
1 2 1 interleaved-1f1b 3 0 selective none 3 0 1 8
2 1 1 gpipe 1 0 selective none 2 0 1 3
1 1 2 zero-bubble-h1 1 0 none none 2 0 1 3
1 2 1 zero-bubble-v 2 0 selective none 2 1 1 5
1 2 1 interleaved-1f1b 3 0 none none 4 0 0 8
1 2 1 interleaved-1f1b 2 0 full none 3 1 0 5
3 1 1 interleaved-1f1b 2 1 none none 2 0 1 3
1 1 3 interleaved-1f1b 3 0 none full 2 0 1 5
1 3 1 interleaved-1f1b 2 0 none none 6 0 0 8
1 3 1 zero-bubble-v 2 0 none none 4 0 0 8
1 3 1 interleaved-1f1b 3 0 none none 3 0 1 16
1 2 2 zero-bubble-v 2 0 none full 4 0 0 5
1 4 1 gpipe 1 0 none none 8 0 1 5
1 1 4 interleaved-1f1b 3 0 none hybrid 2 0 0 5
1 2 2 1f1b 1 0 full optimizer 4 1 0 3
2 1 2 interleaved-1f1b 3 1 none optimizer 1 0 1 5
2 2 1 gpipe 1 1 selective none 4 0 1 3
4 1 1 interleaved-1f1b 3 0 none none 1 1 1 5
1 5 1 interleaved-1f1b 3 0 full none 1 0 1 16
1 3 2 gpipe 1 0 full full 1 1 1 5
3 2 1 zero-bubble-h1 1 0 none none 4 0 1 3
3 2 1 zero-bubble-h1 1 0 full none 2 0 1 3
1 6 1 zero-bubble-v 2 0 none none 1 0 1 16
3 2 1 gpipe 1 0 none none 3 0 1 3
1 1 6 1f1b 1 0 none optimizer 2 0 0 3
6 1 1 zero-bubble-h1 1 0 none none 1 0 0 3
2 3 1 1f1b 1 1 none none 3 0 1 5
2 1 3 interleaved-1f1b 2 0 none optimizer 1 0 1 3
1 3 2 zero-bubble-h1 1 0 selective optimizer 1 0 0 5
1 2 3 gpipe 1 0 none optimizer 2 0 0 3
3 1 2 interleaved-1f1b 2 0 selective full 1 0 1 3
1 7 1 interleaved-1f1b 2 0 none none 1 0 1 16
1 2 4 1f1b 1 0 none hybrid 3 0 1 3
1 8 1 1f1b 1 0 selective none 1 0 0 8
1 4 2 1f1b 1 0 none full 4 0 1 5
8 1 1 1f1b 1 0 none none 1 0 1 3
2 2 2 zero-bubble-h1 1 1 none full 3 0 1 3
1 2 4 gpipe 1 0 selective hybrid 1 1 1 3
1 1 8 gpipe 1 0 none none 1 0 1 3
1 2 4 zero-bubble-h1 1 0 none hybrid 6 0 1 3
4 2 1 zero-bubble-h1 1 0 none none 1 0 1 3
4 1 2 zero-bubble-v 2 0 none optimizer 1 0 1 3
1 2 4 interleaved-1f1b 2 0 none hybrid 2 0 0 5
2 4 1 zero-bubble-h1 1 1 none none 1 1 0 5
1 4 2 gpipe 1 0 none optimizer 6 0 0 5
2 1 4 zero-bubble-v 2 1 full hybrid 1 0 0 3
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
        "fit": fit if case.pipeline > 1 else "several" if case.microbatches > 1 else "one",
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
    fewest = 1 if tensor * pipeline * data > 1 else 2  # with one it would be compared with itself
    microbatches = rng.choice([m for m in range(fewest, 9) if BATCH // data % m == 0])
    even = BATCH // data // microbatches * LENGTH % tensor == 0
    by_hand = stages < DEPTHS[-1] and rng.random() < 0.5
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
        by_hand=by_hand,
        depth=min(depth for depth in DEPTHS if depth >= stages + (stages < 5 or by_hand)),
    )


def cost(case: Case) -> float:
    """Milliseconds of a processor that a run takes, of all ranks together: fitted to 121 that were measured."""
    replicas, split = case.tensor * case.data, case.sharding in ("full", "hybrid")
    passes = replicas * case.microbatches
    layer = {"none": 0.3, "selective": 6.3, "full": 10.9}[case.recompute] + 5 * case.packed + 6 * split
    stage = 12.5 * (case.stages - 1) if case.pipeline > 1 else 0.0
    if case.tensor > 1:
        layer += 6.5 + 2.9 * case.tensor + 10 * case.sequence
        stage += 14
    weights = case.depth * (8 + 19 * split)
    return passes * (case.depth * layer + stage) + replicas * weights + case.ranks * (90 + 45 * split)


def covering_cases() -> list[Case]:
    """Of many random cases those that cost least together and hold every triple and every possible pair of options."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # here, since tests only read the table
    from scipy.sparse import csr_array

    rng = random.Random(5)
    cheapest: dict[frozenset[Any], Case] = {}
    for case in (random_case(rng, *triple) for _ in range(1000) for triple in triples()):
        key = frozenset(features(case))
        cheapest[key] = min(cheapest.get(key, case), case, key=cost)
    pool = list(cheapest.values())
    numbers: dict[Any, int] = {}
    places = [(numbers.setdefault(each, len(numbers)), column) for column, key in enumerate(cheapest) for each in key]
    holds = csr_array((np.ones(len(places)), np.transpose(places)))
    chosen = milp(
        [cost(case) for case in pool],
        integrality=np.ones(len(pool)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(holds, lb=1),
    )
    cases = (case for case, taken in zip(pool, chosen.x, strict=True) if taken > 0.5)
    return sorted(cases, key=lambda case: case.ranks)


if __name__ == "__main__":
    names = _TABLE.split("\n")[1].split()
    for case in covering_cases():
        values = (getattr(case, name) for name in names)
        print(*(value if isinstance(value, str) else int(value) for value in values))
