# SPDX-License-Identifier: Apache-2.0
"""The stages of a model that a rank holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from megatron_bert.model.batch import TokenBatch
from megatron_bert.model.configuration import MegatronBertConfig
from parallel.pipeline.engine import PipelineEngine
from parallel.pipeline.tied import TiedParameter

#: Global name of the parameter that the first and the last stage both hold.
TIED_NAME = "embeddings.word_embeddings.weight"


@dataclass(frozen=True)
class StagedModel:
    """This rank's stages of the model.

    Attributes:
        stages: by global stage index; see ``Objective.make_stage``.
        tied: the word embeddings of the first and last stage; None where the last has no copy.
        notes: what the user should know of the weights they start from.
    """

    stages: dict[int, Any]
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

    def run_forward(
        self,
        engine: PipelineEngine,
        batches: Sequence[TokenBatch],
        at_end: Callable[[int, Any], None] | None = None,
        stages: Mapping[int, Any] | None = None,
    ) -> None:
        """Run the stages over micro batches, without a backward pass.

        Args:
            engine: runs a forward-only schedule.
            batches: one for each micro batch of it.
            at_end: takes the number of a micro batch and what the last stage makes of it, where that is on this rank.
            stages: others to run in place of these, with activations of the same shapes.
        """
        running = self.stages if stages is None else stages

        def forward(stage: int, received: Tensor | None, index: int) -> Tensor:
            module = running[stage]
            output: Tensor = module(batches[index], None, received)
            if at_end is not None and module.part.last:
                at_end(index, output)
            return output

        engine.run(forward, lambda index: self.activation_shape(batches[index]))

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

    def copied(self) -> list[nn.Parameter]:
        """The parameters of this rank that two stages hold."""
        return [] if self.tied is None else self.tied.copies()

    def sum_tied_gradients(self) -> None:
        """Give both copies of the word embeddings the sum of their gradients."""
        if self.tied is not None:
            self.tied.sum_gradients()

    def reshard(self) -> None:
        """Give gathered parameters back after a forward pass that no backward pass follows."""
        for stage in self.stages.values():
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def _is_copy(self, parameter: nn.Parameter) -> bool:
        return self.tied is not None and parameter is self.tied.last and parameter is not self.tied.first
