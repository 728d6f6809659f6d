"""Fixtures of every test: the same random numbers each time, and no GPU tests without a GPU."""

from __future__ import annotations

import os

# Tests run several processes at once, their own and those they start: threads of one get in the way of the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest first: workers then share out the short ones until the end, and none waits for another's long one.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
