# SPDX-License-Identifier: Apache-2.0
"""A fine-tuning task as an objective."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from megatron_bert.convert.state import CanonicalState
from megatron_bert.data.sampling import BatchShare
from megatron_bert.finetuning.batches import bounds_of, collate_instances, stream_instances
from megatron_bert.finetuning.instances import TaskInstances
from megatron_bert.finetuning.scoring import score_instances
from megatron_bert.finetuning.settings import FinetuneSettings
from megatron_bert.finetuning.weights import load_encoder, load_finetuned
from megatron_bert.model.batch import TaskBatch, TokenBatch
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.finetuning import BertForTask
from megatron_bert.model.sequences import Bounds
from megatron_bert.model.task_heads.table import HEADS
from megatron_bert.tasks.task import Instance, Prediction
from megatron_bert.training.objective import Objective
from megatron_bert.training.staged_model import StagedModel
from parallel.errors import UserError
from parallel.mesh import ParallelMesh, TensorParallel
from parallel.object_collectives import on_first_rank
from parallel.pipeline.actions import Schedule
from parallel.pipeline.engine import PipelineEngine
from parallel.pipeline.stage import StagePart
from parallel.process_group import World
from parallel.recompute import Recompute
from parallel.sharding import name_seed


class SplitResult(NamedTuple):
    """What a model does on one split.

    Attributes:
        logits: of each instance, on rank 0; empty on others.
        predictions: of each example, on rank 0; empty on others.
        scores: ``loss`` and the task's metrics, the same on every rank; {} where nothing is labeled.
    """

    examples: list[Any]
    instances: list[Instance]
    logits: list[np.ndarray]
    predictions: list[Prediction]
    scores: dict[str, float]


class Finetuning(Objective[BertForTask]):
    """Training and scoring of a task.

    Args:
        config: of the encoder, with the task's classes.
        seed: of the order of the instances.
        source: ``model.from``, open while the run starts.
    """

    tied = False
    loss_names = ("loss",)
    fixed_settings: ClassVar[tuple[str, ...]] = ("model.from", "model.keep_head")

    def __init__(
        self,
        settings: FinetuneSettings,
        config: MegatronBertConfig,
        data: TaskInstances,
        seed: int,
        source: CanonicalState,
    ) -> None:
        self.source = source
        self.settings, self.config, self.data, self.task = settings, config, data, data.task
        self.head_kind = HEADS[self.task.head.kind]
        self.order_seed = name_seed(seed, "order of the training instances")
        training, self.starts_from = settings.training, settings.model.from_
        self.instances: list[Instance] = data.train
        weights = self.task.class_weights(self.instances)
        self.class_weights = None if weights is None else torch.from_numpy(weights)
        self.most_features = max(len(instance.features) for instance in self.instances)
        epoch = math.ceil(len(self.instances) / training.global_batch_size)
        self.total_steps = training.steps or math.ceil(
            training.epochs * len(self.instances) / training.global_batch_size
        )
        self.evaluate_every = epoch if training.evaluate_every is None else training.evaluate_every
        self.evaluates = bool(self.task.valid_splits)
        self.metric = self.task.metric if self.evaluates else None
        self.patience = training.patience
        if self.patience and self.evaluate_every == 0:
            raise UserError(
                f"training.patience is {self.patience} evaluations, but with training.evaluate_every 0 there is none "
                "before the end: leave one of them out"
            )
        for name, value in (("patience", training.patience or None), ("evaluate_every", training.evaluate_every)):
            if value is not None and not self.evaluates:
                raise UserError(
                    f"training.{name} is {value}, but there is nothing to evaluate on: set data.valid or "
                    f"data.valid_fraction, or leave training.{name} out"
                )

    def stage_parts(self, schedule: Schedule) -> list[StagePart]:
        """Layers in equal parts, or as the settings say: the head costs almost nothing."""
        return self.settings.divide_layers(self.config.num_hidden_layers, schedule.stages)

    def make_stage(
        self, part: StagePart, tp: TensorParallel, recompute: Recompute, device: torch.device
    ) -> BertForTask:
        """The encoder's part with the task's head."""
        head = self.task.head
        return BertForTask(self.config, head.kind, head.outputs, tp=tp, part=part, recompute=recompute, device=device)

    def fill(self, stage: BertForTask) -> list[str]:
        """With the weights of ``model.from``."""
        return (load_finetuned if self.settings.model.keep_head else load_encoder)(stage, self.source)

    def prepare(self, mesh: ParallelMesh, world: World) -> None:
        """Nothing: the constructor has read the data."""

    def describe_data(self, first_step: int) -> list[str]:  # noqa: ARG002
        """How many sequences, what classes weigh, and how many rows were skipped."""
        task, lines = self.task, []
        lines.append(f"{task.settings.name}: {len(self.instances):,} training sequences, {self.total_steps:,} steps")
        if self.weight_of_class is not None:
            weights = ", ".join(f"{label} {weight:.4g}" for label, weight in self.weight_of_class.items())
            lines.append(f"class weights: {weights}")
        if task.bad_rows.count:
            lines.append(f"skipped {task.bad_rows.count} bad rows, such as {task.bad_rows.reasons[0]}")
        return lines

    def training_batches(
        self, mesh: ParallelMesh, first_sample: int, steps: int, device: torch.device
    ) -> Iterator[TokenBatch]:
        """Instances in an order that is new every epoch."""
        training, multiple = self.settings.training, mesh.layout.split_tokens
        bounds = self.bounds(multiple)
        share = BatchShare(
            global_batch=training.global_batch_size,
            micro_batch=training.micro_batch_size,
            data_rank=mesh.data_rank,
            data_size=mesh.layout.data,
            first_sample=first_sample,
        )
        for places in map(share.samples, range(steps * share.micro_batches_per_step)):
            chosen = stream_instances(places, len(self.instances), self.order_seed)
            yield collate_instances(
                [self.instances[index] for index in chosen],
                list(places),
                self.task.head,
                most_features=self.most_features,
                multiple=multiple,
                bounds=bounds,
            ).to(device)

    def bounds(self, multiple: int) -> Bounds | None:
        """Bounds of training's micro batches for compiled code, which is to see few shapes; None without compilation.

        Args:
            multiple: of which their number of tokens is.
        """
        training = self.settings.training
        return bounds_of(self.instances, training.micro_batch_size, multiple) if training.compile else None

    def counts(self, batches: list[TokenBatch]) -> Tensor:
        """Labeled instances, or tokens, each as often as its class weighs."""
        found = []
        for batch in cast(list[TaskBatch], batches):
            found.append(self.head_kind.label_weights(batch.labels, self._class_weights(batch)).double().sum())
        return torch.stack(found).sum()[None]

    @property
    def weight_of_class(self) -> dict[str, float] | None:
        """By label, how much it counts in the loss; None where all count alike."""
        if self.class_weights is None:
            return None
        return dict(zip(self.task.labels, self.class_weights.tolist(), strict=True))

    def _class_weights(self, batch: TaskBatch) -> Tensor | None:
        """On the device of a batch."""
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(batch.labels.device)
        return self.class_weights

    def loss_sums(self, output: Tensor, batch: TokenBatch, tp: TensorParallel) -> Tensor:
        """The task's loss."""
        del tp
        batch = cast(TaskBatch, batch)
        return self.head_kind.loss_sum(output, batch, self.task.head.problem, self._class_weights(batch))[None]

    def evaluate(self, model: StagedModel, engine: PipelineEngine, mesh: ParallelMesh) -> dict[str, float]:
        """Scores on the validation splits; the first one's under the metrics' own names."""
        scores: dict[str, float] = {}
        for number, split in enumerate(self.task.valid_splits):
            found = self.run_split(split, model, engine, mesh).scores
            prefix = f"{split.removeprefix('valid').strip('_')}_" if number else ""
            scores |= {prefix + name: value for name, value in found.items()}
        if self.metric is not None and self.metric not in scores:
            raise UserError(
                f"task.metric is {self.metric}, which the validation data do not yield: choose one of those that they "
                f"do, {', '.join(scores)}"
            )
        return scores

    def run_split(self, split: str, model: StagedModel, engine: PipelineEngine, mesh: ParallelMesh) -> SplitResult:
        """Predict a split; every rank calls."""
        examples, instances = self.task.examples(split), self.data.of(split)
        scored = score_instances(
            model,
            engine,
            mesh,
            instances,
            self.task.head,
            batch_size=self.settings.training.evaluate_batch_size,
            few_shapes=bool(self.settings.training.compile),
        )
        predictions: list[Prediction] = []

        def measure() -> dict[str, float]:
            predictions.extend(self.task.predictions(examples, instances, scored.logits))
            return self.task.metrics(examples, predictions)

        metrics = on_first_rank(measure)
        loss = {} if scored.loss is None else {"loss": scored.loss}
        return SplitResult(examples, instances, scored.logits, predictions, loss | metrics)

    def identity(self) -> dict[str, Any]:
        """The vocabulary, the task and the training data."""
        task = self.task
        described = {"tokenizer": task.tokenizer.fingerprint, "task": task.describe(), "head": task.head.kind}
        return described | {"data": self.data.identity}

    def check_identity(self, stored: dict[str, Any], path: str) -> None:
        """Vocabulary, task and training data must be the same."""
        mine = self.identity()
        for name, what in (("tokenizer", "tokenizer"), ("task", "task settings or labels"), ("data", "training data")):
            if stored.get(name) != mine[name]:
                raise UserError(
                    f"checkpoint {path} was trained with other {what}: use the same, or another training.run_dir"
                )
