# SPDX-License-Identifier: Apache-2.0
"""Launches of small batches as CUDA graphs: where kernels take less time than their launches, those are the latency.

Recording has not run on a GPU yet; what is around it runs in tests with another recorder.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

#: Tokens of a batch up to which launches are recorded: about where kernels are expected to outlast them.
MOST_REPLAYED = 2048
#: Recordings that are kept, one for each size of a batch.
_MOST_RECORDINGS = 64

#: From launches to what launches them again, and where their result then is.
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
#: Ids and blocks that it reads, what starts it, and its result.
_Recording = tuple[Tensor, Tensor, Callable[[], None], Tensor]


def recorder() -> Recorder:
    """Recorder of CUDA graphs, which share their memory: one runs at a time."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        run()  # compiles the kernels, which a recording cannot
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            out = run()
        return graph.replay, out

    return record


class Replay:
    """Small batches: the launches of a size are recorded once, and replayed for each batch that it can hold.

    A size is a number of tokens and of blocks of queries. A batch is filled up with tokens of no sequence, and blocks
    without tokens, that no result depends on.

    Args:
        encode: ids ``[3, T]`` and blocks ``[n, 3]`` on the device to ``[T, H]``.
        device: of both.
        record: see :func:`recorder`.
    """

    def __init__(self, encode: Callable[[Tensor, Tensor], Tensor], device: torch.device, record: Recorder) -> None:
        self._encode, self._device, self._record = encode, device, record
        self._recordings: OrderedDict[tuple[int, int], _Recording] = OrderedDict()
        self._lock = threading.Lock()  # a recording's memory is one batch's at a time

    def __call__(self, ids: Tensor, blocks: Tensor) -> Tensor:
        """The result of ``encode`` for ids and blocks on the CPU."""
        tokens = ids.shape[1]
        size = (_next_size(tokens), _next_size(len(blocks)))
        filled = pad(ids, (0, size[0] - tokens))
        filled_blocks = pad(blocks, (0, 0, 0, size[1] - len(blocks)))
        with self._lock:
            if size not in self._recordings:
                here, own = filled.to(self._device), filled_blocks.to(self._device)
                self._recordings[size] = (here, own, *self._record(lambda: self._encode(here, own)))
                if len(self._recordings) > _MOST_RECORDINGS:
                    self._recordings.popitem(last=False)
            self._recordings.move_to_end(size)
            here, own, replay, out = self._recordings[size]
            here.copy_(filled)
            own.copy_(filled_blocks)
            replay()
            return out[:tokens].clone()


def _next_size(count: int) -> int:
    """The least of 1 .. 8, 10, 12, 14, 16, 20, 24 .. that is not smaller: at most a quarter is filled up."""
    step = 1 << max(count.bit_length() - 3, 0)
    return -(-count // step) * step
