"""The pretraining loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bert import backends
from megatron_bert.config import Settings
from megatron_bert.convert.native import CONFIG_FIELDS, CONFIG_KEY
from megatron_bert.convert.opening import load_into, open_checkpoint
from megatron_bert.data.loader import MicroBatchSource, micro_batches
from megatron_bert.data.tokenizers import Tokenizer
from megatron_bert.model.batch import MicroBatch
from megatron_bert.model.pretraining import PretrainingLogits, loss_sums
from megatron_bert.planning.flops import parameter_count, peak_tflops, training_flops
from megatron_bert.training.build import build_model
from megatron_bert.training.evaluation import evaluate
from megatron_bert.training.learning_rate import learning_rate_at
from megatron_bert.training.metrics import Report
from megatron_bert.training.optimizer import ShardedAdamW
from megatron_bert.training.precision import DTYPES, LossScale
from megatron_bert.training.signals import StopRequest
from megatron_bert.training.timeline import gather_timeline, write_timeline
from parallel.checkpoint import CheckpointWriter, load_tensors, read_state
from parallel.errors import UserError
from parallel.gradients import (
    clip_factor,
    global_gradient_norm,
    raw_local,
    scale_gradients,
    sum_token_partial_gradients,
)
from parallel.mesh import DATA_AXES, ParallelMesh
from parallel.pipeline.actions import Schedule
from parallel.pipeline.engine import PipelineEngine
from parallel.pipeline.p2p import PipelineTransport
from parallel.pipeline.schedules import forward_only
from parallel.process_group import World
from parallel.sharding import name_seed


class StepSums(NamedTuple):
    """What a step did, on the device: this data rank's loss sums, global counts, and the gradient's norm."""

    losses: Tensor
    counts: Tensor
    grad_norm: Tensor


class Trainer:
    """Everything a pretraining run keeps between steps.

    Args:
        settings: of the run, checked.
        tokenizer: of the run.
        mesh: where the run is laid out.
        world: the processes of the run.
        resume_from: checkpoint to go on from, or None for a new run.
    """

    def __init__(
        self, settings: Settings, tokenizer: Tokenizer, mesh: ParallelMesh, world: World, resume_from: Path | None
    ) -> None:
        self.settings, self.tokenizer, self.mesh, self.world = settings, tokenizer, mesh, world
        self.config = settings.model_config_for(tokenizer.vocab_size, tokenizer.pad_id)
        self.dropout_seed = name_seed(settings.training.seed, "dropout")
        self.step, self.consumed_samples = 0, 0
        #: What the user should know before the first step.
        self.notes: list[str] = []
        schedule = settings.schedule(mesh.layout)
        self.model = build_model(settings, self.config, schedule, mesh, draw=resume_from is None)
        self.parameters, self.copies = self.model.parameters(), self.model.copies()
        self.optimizer = ShardedAdamW(
            {**self.parameters, **{f"tied.{name}": copy for name, copy in self.copies.items()}}, settings.optimizer
        )
        self.transport = PipelineTransport.create(mesh)
        self.engine = self._engine(schedule, record=settings.logging.trace)
        self.evaluation_engine = self._engine(
            forward_only(schedule.ranks, schedule.microbatches, schedule.chunks, schedule.placement)
        )
        self.loss_scale = LossScale(settings.precision)
        self.checkpoints = CheckpointWriter(
            settings.training.run_dir / "checkpoints",
            keep=settings.checkpoint.keep,
            asynchronous=settings.checkpoint.asynchronous,
        )
        if resume_from is not None:
            self._resume(resume_from)
        elif settings.model.from_ is not None:
            self._start_from(settings.model.from_)

    # ---------------------------------------------------------------- the loop

    def run(self, stop: StopRequest, report: Report) -> str | None:
        """Train to the last step, or until asked to stop; returns why it stopped early, None at the end."""
        settings = self.settings
        total, every = settings.training.steps, settings.logging.every
        source = self._source("train", self.consumed_samples)
        batches = micro_batches(source, total - self.step, self.world.device)
        meter = _Meter(self)
        reason: str | None = None
        while self.step < total and reason is None:
            step_batches = [next(batches) for _ in range(source.micro_batches_per_step)]
            sums = self.train_step(step_batches)
            meter.count(step_batches)
            report.advance()
            if self.step % every == 0 or self.step == total:
                self._log(sums, meter, report)
                if settings.logging.trace:
                    self._write_timeline()
            reason = stop.agreed()
            if self._due(settings.training.evaluate_every) or (self.step == total and reason is None):
                report.evaluation(self.step, self.evaluate())
                meter.restart()
            if reason or self.step == total or self._due(settings.checkpoint.every):
                self._save(sums)
        self.checkpoints.finish()
        return reason

    def train_step(self, batches: list[MicroBatch]) -> StepSums:
        """One optimizer step on this data rank's micro batches of the global batch."""
        training = self.settings.training
        counts = self._global_counts(batches)
        if self.world.device.type == "cuda":
            # Fused attention draws its dropout from torch's generator: seeded by step and place, so resuming is exact.
            torch.cuda.manual_seed(name_seed(training.seed, f"step {self.step} rank {self.world.rank}"))
        losses = torch.zeros(2, device=self.world.device)

        def forward(stage: int, received: Tensor | None, index: int) -> Tensor:
            output = self.model.stages[stage](batches[index], self.dropout_seed, received)
            if not isinstance(output, PretrainingLogits):
                return output
            sums = torch.stack(loss_sums(output, batches[index], self.config.vocab_size, self.mesh.tensor_parallel))
            losses.add_(sums.detach())
            return (sums / counts).sum() * self.loss_scale.value

        self.engine.run(forward, lambda index: self.model.activation_shape(batches[index]))
        grad_norm = self._finish_gradients()
        overflow = self.loss_scale.dynamic and not math.isfinite(grad_norm.item())
        if not overflow:
            rate = learning_rate_at(self.optimizer.steps + 1, self.settings.learning_rate, training.steps)
            self.optimizer.step(rate)
        self.loss_scale.update(overflow)
        self.optimizer.zero_grad()
        self.step += 1
        self.consumed_samples += training.global_batch_size
        return StepSums(losses, counts, grad_norm)

    def evaluate(self) -> dict[str, float]:
        """Held-out scores."""
        rounds = self.settings.training.evaluate_batches
        return evaluate(self.model, self.evaluation_engine, self._held_out(), rounds, self.mesh)

    def _engine(self, schedule: Schedule, record: bool = False) -> PipelineEngine:
        return PipelineEngine(
            schedule,
            self.mesh.coordinate["pipeline"],
            self.model.stages,
            self.transport,
            dtype=DTYPES[self.settings.precision.compute],
            device=self.world.device,
            record=record,
        )

    def _global_counts(self, batches: list[MicroBatch]) -> Tensor:
        """Masked tokens and sentence pairs of the whole global batch, at least 1 each: ``[2]`` float32."""
        masked = torch.stack([(batch.slot_labels >= 0).sum() for batch in batches]).sum()
        pairs = torch.stack([(batch.pair_labels >= 0).sum() for batch in batches]).sum()
        return self.mesh.all_reduce(torch.stack((masked, pairs)), DATA_AXES).clamp(min=1).float()

    def _finish_gradients(self) -> Tensor:
        """Complete, unscale and clip the gradients; returns their norm before clipping."""
        self.model.tied.sum_gradients()
        for stage in self.model.stages.values():
            sum_token_partial_gradients(stage, self.mesh.tensor_parallel)
        norm = global_gradient_norm(self.parameters.values(), self.mesh) / self.loss_scale.value
        maximum = self.settings.optimizer.clip_grad_norm
        factor = clip_factor(norm, maximum) if maximum > 0 else torch.ones_like(norm)
        if maximum > 0 or self.loss_scale.value != 1.0:
            everything = [*self.parameters.values(), *self.copies.values()]
            scale_gradients(everything, factor / self.loss_scale.value)
        return norm

    # ---------------------------------------------------------------- data

    def _source(self, part: Any, first_sample: int) -> MicroBatchSource:
        return MicroBatchSource(
            self.settings,
            part,
            data_rank=self.mesh.data_rank,
            data_size=self.mesh.layout.data,
            first_sample=first_sample,
            token_multiple=self.mesh.layout.tensor,
        )

    def prepare_data(self) -> None:
        """Build the sample indices once, on rank 0, and let every rank open the data before the first step."""
        for part in ("train", "valid"):
            source = self._source(part, 0)
            if self.world.is_first:
                source.open()
            dist.barrier()
            if not self.world.is_first:
                source.open()

    def _held_out(self) -> Iterator[MicroBatch]:
        # Few batches, the same every time: not worth starting loader processes for.
        quiet = self.settings.data.model_copy(update={"workers": 0})
        source = self._source("valid", 0)
        source.settings = self.settings.model_copy(update={"data": quiet})
        return micro_batches(source, self.settings.training.evaluate_batches, self.world.device)

    # ---------------------------------------------------------------- reporting

    def _log(self, sums: StepSums, meter: _Meter, report: Report) -> None:
        losses = self.mesh.all_reduce(sums.losses.clone(), (*DATA_AXES, "pipeline")) / sums.counts
        mlm, pair = losses.tolist()
        grad_norm = sums.grad_norm.item()
        if not math.isfinite(mlm + pair) or not (math.isfinite(grad_norm) or self.loss_scale.dynamic):
            raise UserError(
                f"training diverged: at step {self.step} the loss is {mlm + pair} and the gradient norm {grad_norm}; "
                "go on from an earlier checkpoint with a lower learning_rate.peak or a longer warm-up"
            )
        report.step(
            {
                "step": self.step,
                "loss": mlm + pair,
                "mlm_loss": mlm,
                "sop_loss": pair if self.config.binary_head else None,
                "learning_rate": learning_rate_at(
                    self.optimizer.steps, self.settings.learning_rate, self.settings.training.steps
                ),
                "grad_norm": grad_norm,
                "loss_scale": self.loss_scale.value if self.loss_scale.dynamic else None,
                "consumed_samples": self.consumed_samples,
                **meter.read(),
            }
        )

    def _write_timeline(self) -> None:
        timeline = gather_timeline(self.engine, self.mesh)
        if self.world.is_first:
            write_timeline(timeline, self.engine, self.settings.training.run_dir / "traces", self.step)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    # ---------------------------------------------------------------- checkpoints

    def _tensors(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Everything sharded, by global name: ``model.<name>`` and ``optimizer.<moment>.<name>``."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            tensors[f"model.{name}"] = parameter.detach()
            for moment, tensor in self.optimizer.moments(parameter).items():
                tensors[f"optimizer.{moment}.{name}"] = tensor
        return tensors

    def _save(self, sums: StepSums) -> None:
        if not self.loss_scale.dynamic and not math.isfinite(sums.grad_norm.item()):
            raise UserError(
                f"training diverged: the gradient norm at step {self.step} is not finite, so no checkpoint was "
                "written; go on from an earlier one with a lower learning_rate.peak or a longer warm-up"
            )
        state = {
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "optimizer": self.optimizer.state(),
            "loss_scale": self.loss_scale.state(),
            "tokenizer": self.tokenizer.fingerprint,
            CONFIG_KEY: {name: getattr(self.config, name) for name in CONFIG_FIELDS},
            "settings": self.settings.model_dump(mode="json", by_alias=True),
        }
        self.checkpoints.save(self.step, self._tensors(self.parameters), state)

    def _start_from(self, path: Path) -> None:
        """Take the weights of a checkpoint of any format; what it lacks (a new head) keeps its initial values."""
        warnings: set[str] = set()
        with open_checkpoint(path) as checkpoint:
            for stage in self.model.stages.values():
                report = load_into(stage, checkpoint)
                warnings.update(report.warnings)
                self.notes += [f"{name} is not in {path} and starts anew" for name in report.missing]
        self.notes += sorted(warnings)

    def _resume(self, path: Path) -> None:
        state = read_state(path)
        if state["tokenizer"] != self.tokenizer.fingerprint:
            raise UserError(
                f"checkpoint {path} was trained with another tokenizer than "
                f"{self.settings.tokenizer.path}: use the same"
            )
        # On a stage of its own, the second copy of the tied embeddings is loaded by their name as well.
        load_tensors(path, self._tensors({**self.copies, **self.parameters}), self.checkpoints.group)
        for name, copy in self.copies.items():
            if name in self.parameters:
                self._copy_state(self.parameters[name], copy)
        self.step, self.consumed_samples = state["step"], state["consumed_samples"]
        self.optimizer.load_state(state["optimizer"])
        self.loss_scale.load_state(state["loss_scale"])

    @torch.no_grad()
    def _copy_state(self, source: nn.Parameter, target: nn.Parameter) -> None:
        raw_local(target).copy_(raw_local(source))
        for moment, tensor in self.optimizer.moments(source).items():
            raw_local(self.optimizer.moments(target)[moment]).copy_(raw_local(tensor))

    def describe(self) -> str:
        """What is about to be trained, where and how."""
        layout, schedule = self.mesh.layout, self.engine.schedule
        count = parameter_count(self.config)
        kernels = ", ".join(f"{part} by {name}" for part, name in backends.report(self.world.device).items())
        return (
            f"{count:,} parameters on {self.world.size} x {self.world.device.type}: tensor {layout.tensor}"
            f"{' (sequence parallel)' if layout.sequence else ''}, pipeline {layout.pipeline} ({schedule.name}, "
            f"{schedule.microbatches} micro batches, {schedule.chunks} a rank), data {layout.data} "
            f"(sharding {self.settings.parallel.sharding}), {self.settings.precision.compute}; {kernels}"
        )


class _Meter:
    """Counts work between two logged steps; reading it waits for the device."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        settings, device = trainer.settings, trainer.world.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.peak = settings.logging.peak_tflops or peak_tflops(name, settings.precision.compute)
        self.restart()

    def restart(self) -> None:
        """Start counting from here."""
        self.began, self.first_step = time.perf_counter(), self.trainer.step
        self.tokens = self.squares = self.slots = self.pairs = 0

    def count(self, batches: list[MicroBatch]) -> None:
        """Micro batches were worked through."""
        for batch in batches:
            self.tokens += sum(batch.lengths)
            self.squares += sum(length * length for length in batch.lengths)
            self.slots += batch.slots.shape[0]
            self.pairs += len(batch.lengths)

    def read(self) -> dict[str, float | None]:
        """tokens_per_second, mfu (None without a known peak) and step_seconds since the last reading."""
        seconds = time.perf_counter() - self.began
        steps = max(1, self.trainer.step - self.first_step)
        work = torch.tensor([self.tokens, self.squares, self.slots, self.pairs], dtype=torch.float64)
        tokens, squares, slots, pairs = self.trainer.mesh.all_reduce(
            work.to(self.trainer.world.device), DATA_AXES
        ).tolist()
        mfu = None
        if self.peak is not None:
            flops = training_flops(self.trainer.config, tokens, squares, slots, pairs)
            mfu = flops / seconds / (self.trainer.world.size * self.peak * 1e12)
        self.restart()
        return {"tokens_per_second": tokens / seconds, "mfu": mfu, "step_seconds": seconds / steps}
