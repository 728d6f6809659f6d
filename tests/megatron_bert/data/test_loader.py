# SPDX-License-Identifier: Apache-2.0
"""Which samples a data rank reads, and in which order."""

from __future__ import annotations

from dataclasses import fields
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

from megatron_bert.config import Settings
from megatron_bert.data.loader import MicroBatchSource, micro_batches
from megatron_bert.model.batch import MicroBatch
from tests.megatron_bert.training.layouts import make_data
from tests.megatron_bert.training.runs import run_settings
from tests.worlds import CPU, run_world

GLOBAL = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


def settings(folder: Path, micro: int = 4, workers: int = 0, packed: bool = False) -> Settings:
    return run_settings(
        folder,
        folder / "run",
        training__global_batch_size=GLOBAL,
        training__micro_batch_size=micro,
        data__workers=workers,
        data__packed=packed,
    )


def source(wanted: Settings, rank: int = 0, size: int = 1, first: int = 0) -> MicroBatchSource:
    return MicroBatchSource(wanted, "train", data_rank=rank, data_size=size, first_sample=first)


LAYOUTS = [
    (size, micro) for size in range(1, GLOBAL + 1) for micro in range(1, GLOBAL + 1) if GLOBAL % (size * micro) == 0
]


@pytest.mark.parametrize(("size", "micro"), LAYOUTS)
def test_ranks_share_every_global_batch(size: int, micro: int) -> None:
    wanted = settings(Path("unused"), micro)
    sources = [source(wanted, rank, size, first=2 * GLOBAL) for rank in range(size)]
    per_step = sources[0].share.micro_batches_per_step
    assert per_step * micro * size == GLOBAL
    for step in range(2):
        # Micro batch by micro batch, the ranks take turns; together they read the step's samples in order.
        numbers = [
            number
            for index in range(step * per_step, (step + 1) * per_step)
            for one in sources
            for number in one.share.samples(index)
        ]
        assert numbers == list(range((2 + step) * GLOBAL, (3 + step) * GLOBAL))


def assert_equal(mine: list, theirs: list) -> None:
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        for field in fields(one):
            left, right = getattr(one, field.name), getattr(other, field.name)
            if isinstance(left, torch.Tensor):
                assert torch.equal(left, right), field.name
        assert one.lengths == other.lengths


@pytest.mark.parametrize("packed", [False, True])
def test_loader_processes_change_nothing(data: Path, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run_world(1, id, None)  # starts the server that loader processes come from, with torch loaded
    loaded_once: list[list[str]] = []
    monkeypatch.setattr(forkserver, "set_forkserver_preload", loaded_once.append)
    found = {
        workers: list(micro_batches(source(settings(data, workers=workers, packed=packed)), 2, CPU))
        for workers in (0, 2)
    }
    assert len(found[0]) == 2 * GLOBAL // 4
    assert_equal(found[2], found[0])
    assert loaded_once == [[micro_batches.__module__]]


@pytest.mark.parametrize("packed", [False, True])
def test_going_on_from_a_later_step(data: Path, packed: bool) -> None:
    wanted = settings(data, packed=packed)
    three = list(micro_batches(source(wanted), 3, CPU))
    consumed = three[0].step_samples or GLOBAL
    rest = list(micro_batches(source(wanted, first=consumed), 2, CPU))
    assert_equal(rest, three[GLOBAL // 4 :])


def of_samples(batches: list[MicroBatch]) -> dict[int, tuple[list[int], ...]]:
    """Sample number -> its tokens, types and labels, wherever they are."""
    found = {}
    for batch in batches:
        real = batch.layout.real_tokens()
        numbers = batch.samples if real is None else torch.where(real, batch.samples, -1)
        for number in set(numbers.tolist()) - {-1}:
            here = numbers == number
            labels = batch.slot_labels[(batch.slot_labels >= 0) & here[batch.slots]]
            found[number] = batch.tokens[here].tolist(), batch.types[here].tolist(), labels.tolist()
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_hold_the_same_samples_at_any_size(data: Path, packed: bool) -> None:
    large = [source(settings(data, micro=GLOBAL, packed=packed))[index] for index in range(3)]
    small = [source(settings(data, micro=4, packed=packed), rank, 2)[index] for index in range(9) for rank in range(2)]
    for step, batch in enumerate(large):
        parts = small[6 * step : 6 * step + 6]
        assert of_samples(parts) == of_samples([batch])
        assert len(of_samples(parts)) == len(batch.lengths) == (batch.step_samples or GLOBAL)
        assert {part.step_samples for part in parts} == {batch.step_samples}
        if not packed:
            for name in ("tokens", "types", "samples", "slot_labels", "pair_labels"):
                assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name)), name
