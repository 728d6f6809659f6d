# SPDX-License-Identifier: Apache-2.0
"""The stages of a model that a rank holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from megatron_bert.model.batch import TokenBatch
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.stage import ModelStage
from parallel.pipeline.engine import PipelineEngine
from parallel.pipeline.passes import forward_of
from parallel.pipeline.tied import TiedParameter
from parallel.torch_types import is_fsdp_module

#: Global name of the parameter that the first and the last stage both hold.
TIED_NAME = "embeddings.word_embeddings.weight"


@dataclass(frozen=True)
class StagedModel:
    """This rank's stages of the model.

    Attributes:
        stages: by global stage index.
        tied: the word embeddings of the first and last stage; None where the last has no copy.
        notes: what the user should know of the weights they start from.
    """

    stages: dict[int, ModelStage]
    tied: TiedParameter | None
    notes: tuple[str, ...] = ()

    @property
    def config(self) -> MegatronBertConfig:
        """Of the whole model."""
        return next(iter(self.stages.values())).config

    def activation_shape(self, batch: TokenBatch) -> tuple[int, int]:
        """Shape of the hidden states between stages: ``[T, H]``, or ``[T/t, H]`` under sequence parallelism."""
        tp = next(iter(self.stages.values())).tp
        tokens = batch.tokens.shape[0]
        return tokens // tp.size if tp.sequence else tokens, self.config.hidden_size

    def run(
        self,
        engine: PipelineEngine,
        batches: Sequence[TokenBatch],
        at_end: Callable[[int, Any], Tensor | None],
        *,
        seed: int | None = None,
        stages: Mapping[int, ModelStage] | None = None,
        began: Callable[[int, int], None] | None = None,
    ) -> None:
        """Run the stages over the micro batches of one step; see :func:`~parallel.pipeline.passes.forward_of`.

        Args:
            stages: others to run in place of these, with activations of the same shapes.
        """
        forward = forward_of(self.stages if stages is None else stages, batches, at_end, seed=seed, began=began)
        engine.run(forward, lambda index: self.activation_shape(batches[index]))

    @torch.no_grad()
    def infer(
        self,
        engine: PipelineEngine,
        batches: Iterable[TokenBatch],
        at_end: Callable[[int, Any, Any], None] | None = None,
        stages: Mapping[int, ModelStage] | None = None,
    ) -> None:
        """Run the stages over micro batches without dropout and gradients; every rank calls, equally often.

        Args:
            batches: as many as some runs of the schedule take.
            at_end: takes the number of a micro batch, the micro batch, and what the last stage makes of it, where that
                is on this rank.
            stages: others to run in place of these, with activations of the same shapes.
        """
        rest, first, count = iter(batches), 0, engine.schedule.microbatches
        while step := list(islice(rest, count)):
            assert len(step) == count, "micro batches fill every run of the schedule"

            def end(index: int, output: Any, first: int = first, step: list[TokenBatch] = step) -> None:
                if at_end is not None:
                    at_end(first + index, step[index], output)

            self.run(engine, step, end, stages=stages)
            first += count
        for stage in (self.stages if stages is None else stages).values():
            for module in stage.modules():
                if is_fsdp_module(module):
                    module.reshard()  # frees gathered parameters, since no backward pass follows

    def parameters(self) -> dict[str, nn.Parameter]:
        """Global name -> parameter, without the last stage's copy of the word embeddings."""
        return {
            name: parameter
            for stage in self.stages.values()
            for name, parameter in stage.named_parameters()
            if not self._is_copy(parameter)
        }

    def copies(self) -> dict[str, nn.Parameter]:
        """Global name -> the last stage's copy, on its rank, if it is another parameter than the first stage's."""
        copy = None if self.tied is None else self.tied.last
        return {TIED_NAME: copy} if copy is not None and self._is_copy(copy) else {}

    def _is_copy(self, parameter: nn.Parameter) -> bool:
        return self.tied is not None and parameter is self.tied.last and parameter is not self.tied.first
