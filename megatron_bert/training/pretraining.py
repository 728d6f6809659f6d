# SPDX-License-Identifier: Apache-2.0
"""Pretraining as an objective: masked words, and the order of sentences."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert.config import Settings
from megatron_bert.convert.opening import load_into
from megatron_bert.convert.state import CanonicalState
from megatron_bert.data.corpora import Part, cache_directory, holds_out
from megatron_bert.data.loader import MicroBatchSource, micro_batches
from megatron_bert.data.sampling import BlendedCorpus
from megatron_bert.data.tokenizers import Tokenizer
from megatron_bert.model.batch import MicroBatch, TokenBatch
from megatron_bert.model.flops import head_in_layers
from megatron_bert.model.pretraining import BertForPretraining, PretrainingLogits, cross_entropies
from megatron_bert.training.data_report import describe_held_out_data, describe_training_data
from megatron_bert.training.evaluation import evaluate
from megatron_bert.training.objective import Objective
from megatron_bert.training.staged_model import StagedModel
from parallel.errors import UserError
from parallel.mesh import ParallelMesh, TensorParallel
from parallel.pipeline.actions import Schedule
from parallel.pipeline.engine import PipelineEngine
from parallel.pipeline.stage import StagePart
from parallel.process_group import World
from parallel.recompute import Recompute


class Pretraining(Objective[BertForPretraining]):
    """Masked language modelling with sentence order (or next sentence) prediction.

    Args:
        source: ``model.from``, open while the run starts; None where it is not set.
    """

    tied = True
    lower_is_better = True

    def __init__(self, settings: Settings, tokenizer: Tokenizer, source: CanonicalState | None = None) -> None:
        self.settings, self.tokenizer, self.source = settings, tokenizer, source
        self.config = settings.model_config_for(tokenizer.vocab_size, tokenizer.pad_id)
        self.starts_from = settings.model.from_
        self.total_steps = settings.training.steps
        self.evaluate_every = settings.training.evaluate_every
        self._cross_entropies = cross_entropies
        self._corpora: dict[Part, BlendedCorpus] = {}
        self.evaluates = holds_out(settings.data)
        if not self.total_steps and not self.evaluates:
            raise UserError(
                "training.steps is 0, which evaluates alone, but no data are held out: set data.valid or data.split"
            )
        if settings.checkpoint.keep_best:
            if not self.evaluates:
                raise UserError(
                    f"checkpoint.keep_best is {settings.checkpoint.keep_best}, but no data are held out to choose by: "
                    "set data.valid or data.split, or checkpoint.keep_best=0"
                )
            self.metric = "loss"

    @property
    def loss_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Both losses; the second only with a sentence-pair head."""
        return ("mlm_loss", "sop_loss") if self.config.binary_head else ("mlm_loss",)

    def stage_parts(self, schedule: Schedule) -> list[StagePart]:
        """Layers balanced by the cost of the heads, or as the settings say."""
        head = head_in_layers(self.config, self.settings.data.seq_length, self.settings.max_predictions)
        return self.settings.divide_layers(self.config.num_hidden_layers, schedule.stages, head)

    def make_stage(
        self, part: StagePart, tp: TensorParallel, recompute: Recompute, device: torch.device
    ) -> BertForPretraining:
        """The encoder's part with its pretraining heads."""
        return BertForPretraining(self.config, tp=tp, part=part, recompute=recompute, device=device)

    def fill(self, stage: BertForPretraining) -> list[str]:
        """With the weights of ``model.from``, where it is set."""
        state, source = self.source, self.starts_from
        if state is None:
            return []
        report = load_into(stage, state)
        notes = [f"{name} is not in {source} and is initialized from scratch" for name in report.missing]
        notes += report.warnings
        if left := [*state.task_head, *(["the ranges of its quantizers"] if state.ranges else [])]:
            notes.append(f"{', '.join(left)} of {source} are left behind: pretraining has no use for them")
        return notes

    def prepare(self, mesh: ParallelMesh, world: World) -> None:
        """Build the sample indices once, on rank 0, and let every rank open the data."""
        parts: dict[Part, bool] = {"train": self.total_steps > 0, "valid": self.evaluates}
        cache = cache_directory(self.settings)
        new = self.settings.data.cache_dir is None and not cache.exists()
        for part in (part for part, needed in parts.items() if needed):
            source = self._source(mesh, part, 0)
            if world.is_first:
                try:
                    _, self._corpora[part] = source.open()
                except UserError:
                    if new:  # a run that is refused leaves nothing behind
                        shutil.rmtree(cache, ignore_errors=True)
                    raise
            dist.barrier()
            if not world.is_first:
                source.open()

    def describe_data(self, first_step: int) -> list[str]:
        """Epochs and sizes; rank 0 alone has opened the corpora."""
        lines = []
        if "train" in self._corpora:
            lines += describe_training_data(self.settings, self._corpora["train"], first_step)
        if "valid" in self._corpora:
            lines += describe_held_out_data(self.settings, self._corpora["valid"])
        if not self.evaluates:
            lines.append(f"note: data.split {self.settings.data.split} leaves nothing to evaluate on")
        return lines

    def training_batches(
        self, mesh: ParallelMesh, first_sample: int, steps: int, device: torch.device
    ) -> Iterator[TokenBatch]:
        """Loaded in the background."""
        return micro_batches(self._source(mesh, "train", first_sample), steps, device)

    def counts(self, batches: list[TokenBatch]) -> Tensor:
        """Masked tokens, and sentence pairs."""
        given = [cast(MicroBatch, batch) for batch in batches]
        masked = torch.stack([(batch.slot_labels >= 0).sum() for batch in given]).sum()
        pairs = torch.stack([(batch.pair_labels >= 0).sum() for batch in given]).sum()
        return torch.stack((masked, pairs)[: len(self.loss_names)])

    def loss_sums(self, output: PretrainingLogits, batch: TokenBatch, tp: TensorParallel) -> Tensor:
        """Cross entropies of masked tokens, and of sentence pairs."""
        given = cast(MicroBatch, batch)
        sums = self._cross_entropies(
            output.masked, output.pair, given.slot_labels, given.pair_labels, self.config.vocab_size, tp
        )
        return torch.stack(sums[: len(self.loss_names)])

    def compile_loss(self) -> None:
        """Compile the cross entropies."""
        self._cross_entropies = torch.compile(cross_entropies, fullgraph=True)

    def evaluate(self, model: StagedModel, engine: PipelineEngine, mesh: ParallelMesh) -> dict[str, float]:
        """Loss, perplexity and accuracy on held-out samples, the same every time."""
        scores = evaluate(model, engine, self.held_out_batches(mesh), mesh)
        if self.metric is None:
            return scores
        return scores | {"loss": sum(scores.get(name, 0.0) for name in self.loss_names)}

    def held_out_batches(self, mesh: ParallelMesh) -> Iterator[MicroBatch]:
        """The micro batches of an evaluation on this data rank."""
        # Few batches: not worth starting loader processes for.
        batches = self.settings.training.evaluate_batches
        return micro_batches(self._source(mesh, "valid", 0), batches, mesh.device, workers=0)

    def identity(self) -> dict[str, Any]:
        """The vocabulary."""
        return {"tokenizer": self.tokenizer.fingerprint}

    def check_identity(self, stored: dict[str, Any], path: str) -> None:
        """The vocabulary must be the same."""
        if stored["tokenizer"] != self.tokenizer.fingerprint:
            raise UserError(
                f"checkpoint {path} was trained with another tokenizer than "
                f"{self.settings.tokenizer.path}: use the same"
            )

    def _source(self, mesh: ParallelMesh, part: Part, first_sample: int) -> MicroBatchSource:
        return MicroBatchSource(
            self.settings,
            part,
            data_rank=mesh.data_rank,
            data_size=mesh.layout.data,
            first_sample=first_sample,
        )
