# SPDX-License-Identifier: Apache-2.0
"""How fast a run trains."""

from __future__ import annotations

import time

import torch

from megatron_bert.model.batch import TokenBatch
from megatron_bert.model.flops import peak_tflops, training_flops
from megatron_bert.training.run_state import RunState
from megatron_bert.training.slow_ranks import RankTimes
from parallel.mesh import DATA_AXES


class Meter:
    """Counts work between two logged steps; reading it waits for the device."""

    def __init__(self, trainer: RunState) -> None:
        self.trainer = trainer
        settings, device = trainer.settings, trainer.world.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.peak = settings.logging.peak_tflops or peak_tflops(name, settings.precision.compute)
        self.ranks = RankTimes(trainer.mesh, trainer.clock)
        self.restart()

    def restart(self) -> None:
        """Start counting from here."""
        self.began, self.first_step = time.perf_counter(), self.trainer.step
        self.tokens = self.squares = self.predictions = self.sequences = 0

    def count(self, batches: list[TokenBatch]) -> None:
        """Micro batches were worked through."""
        for batch in batches:
            self.tokens += sum(batch.lengths)
            self.squares += sum(length * length for length in batch.lengths)
            self.predictions += batch.predictions()
            self.sequences += len(batch.lengths)

    def read(self) -> dict[str, float | str | None]:
        """tokens_per_second, mfu (None without a known peak) and step_seconds since the last reading, and of ranks."""
        seconds = time.perf_counter() - self.began
        steps = max(1, self.trainer.step - self.first_step)
        work = torch.tensor([self.tokens, self.squares, self.predictions, self.sequences], dtype=torch.float64)
        tokens, squares, predictions, sequences = self.trainer.mesh.all_reduce(
            work.to(self.trainer.world.device), DATA_AXES
        ).tolist()
        mfu = None
        if self.peak is not None:
            flops = training_flops(self.trainer.config, tokens, squares, predictions, sequences)
            mfu = flops / seconds / (self.trainer.world.size * self.peak * 1e12)
        speed = {"tokens_per_second": tokens / seconds, "mfu": mfu, "step_seconds": seconds / steps}
        of_ranks = self.ranks.read()
        self.restart()
        return speed | of_ranks
