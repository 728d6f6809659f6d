# SPDX-License-Identifier: Apache-2.0
"""The training loop, of pretraining and of fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from megatron_bert.config import RunSettings, Settings
from megatron_bert.convert.native import CONFIG_KEY
from megatron_bert.model.batch import TokenBatch
from megatron_bert.training.build import build_model
from megatron_bert.training.divergence import Watch, diagnosed
from megatron_bert.training.graphs import StepGraphs
from megatron_bert.training.learning_rate import layer_scale, learning_rate_at
from megatron_bert.training.memory import MemoryMeter
from megatron_bert.training.meter import Meter
from megatron_bert.training.metrics import Report
from megatron_bert.training.objective import Objective
from megatron_bert.training.optimizer import TIED_PREFIX, ShardedOptimizer, check_patterns
from megatron_bert.training.precision import DTYPES, LossScale
from megatron_bert.training.profiling import StepProfiler
from megatron_bert.training.replica_check import check_replicas
from megatron_bert.training.run_lock import RunLock
from megatron_bert.training.run_state import StepSums
from megatron_bert.training.saving import Saving
from megatron_bert.training.selection import Selection
from megatron_bert.training.signals import StopRequest
from megatron_bert.training.spikes import Spikes, go_back_after_spike
from megatron_bert.training.step_report import log_step, write_trace
from parallel.captured import on_own_stream
from parallel.checkpoint import read_state
from parallel.checkpoint_reader import load_tensors
from parallel.checkpoint_writer import CheckpointWriter
from parallel.data_parallel import finish_gradients
from parallel.first_order import first_order
from parallel.gradients import clip_factor, global_gradient_norm, sum_token_partial_gradients
from parallel.mesh import DATA_AXES, ParallelMesh
from parallel.object_collectives import on_first_rank
from parallel.parts import Part
from parallel.pipeline.actions import Schedule
from parallel.pipeline.engine import PipelineEngine
from parallel.pipeline.p2p import PipelineTransport
from parallel.pipeline.schedules import forward_only
from parallel.presence import sign
from parallel.process_group import World
from parallel.sharding import name_seed
from parallel.step_clock import StepClock


class Trainer:
    """Everything a run keeps between steps; see :class:`~megatron_bert.training.run_state.RunState`.

    Args:
        resume_from: checkpoint of this run to go on from, or None.
        lock: of the run directory, which must be this run's still when it writes a checkpoint.
    """

    def __init__(
        self,
        settings: RunSettings,
        objective: Objective,
        mesh: ParallelMesh,
        world: World,
        resume_from: Path | None,
        lock: RunLock | None = None,
    ) -> None:
        self.lock = lock
        self.settings, self.objective, self.mesh, self.world = settings, objective, mesh, world
        self.config = objective.config
        self.dropout_seed = name_seed(settings.training.seed, "dropout")
        self.step, self.consumed_samples = 0, 0
        self.resumed: Path | None = None
        self.skipped_samples = 0
        #: The last step whose weights were evaluated.
        self.evaluated_step = 0
        schedule = settings.schedule(mesh.layout)
        captures = isinstance(settings, Settings) and settings.training.cuda_graphs
        if captures:
            on_own_stream(world.device)
        self.model = build_model(settings, objective, schedule, mesh, draw=resume_from is None)
        self.parameters, self.copies = self.model.parameters(), self.model.copies()
        check_patterns(self.parameters, settings.optimizer)
        layers = self.config.num_hidden_layers
        self.optimizer = ShardedOptimizer(
            {**self.parameters, **{f"{TIED_PREFIX}{name}": copy for name, copy in self.copies.items()}},
            settings.optimizer,
            mesh,
            lambda name: layer_scale(name.removeprefix(TIED_PREFIX), layers, settings.learning_rate.layer_decay),
            stages=self.model.stages.values(),
            tied=() if self.model.tied is None else self.model.tied.copies(),
        )
        self.transport = PipelineTransport.create(mesh)
        self.clock = StepClock(world.device)
        self.engine = self._engine(schedule, record=settings.logging.trace, clock=self.clock)
        self.evaluation_engine = self._engine(
            forward_only(schedule.ranks, schedule.microbatches, schedule.chunks, schedule.placement)
        )
        self.loss_scale = LossScale(settings.precision)
        self.selection = Selection(
            objective.metric,
            objective.patience,
            settings.checkpoint.keep_best,
            lower_is_better=objective.lower_is_better,
        )
        self.checkpoints = CheckpointWriter(
            settings.training.run_dir / "checkpoints",
            keep=settings.checkpoint.keep,
            asynchronous=settings.checkpoint.asynchronous,
            timeout_seconds=settings.checkpoint.timeout_seconds,
            keep_every=settings.checkpoint.keep_every,
        )
        self.memory = MemoryMeter(self)
        self.graphs = StepGraphs(self) if captures else None
        self.watch, self.spikes = Watch(self), Spikes(settings.training)
        self.saving = Saving(self.checkpoints, self.selection)
        if resume_from is not None:
            self.resume(resume_from)

    # ---------------------------------------------------------------- the loop

    def run(self, stop: StopRequest, report: Report) -> str | None:
        """Train to the last step, or until asked to stop; returns why it stopped early, None at the end.

        A run that follows a score also ends when that has not improved for long enough. An error carries its step.
        """
        try:
            return self._run(stop, report)
        except Exception as error:
            error.add_note(f"in step {self.step + 1}")
            raise

    def _run(self, stop: StopRequest, report: Report) -> str | None:
        settings, total = self.settings, self.objective.total_steps
        if not total:
            self._evaluate(report)
            return None
        self.checkpoints.prepare()  # not before: a start that is refused leaves nothing behind
        batches = self._batches()
        meter, profiler = Meter(self), StepProfiler(self, self.settings.logging.profiled_steps)
        reason: str | None = None
        if self.step > 0 and self._evaluation_due() and self.evaluated_step != self.step and self._evaluate(report):
            self.save()  # the run was stopped before it could evaluate this step
        while self.step < total and reason is None and not self.selection.exhausted:
            sign(f"step {self.step + 1}")
            profiler.before(self.step + 1)
            self.clock.begin_step()
            with self.clock.on_host():
                step_batches = [next(batches) for _ in range(self.engine.schedule.microbatches)]
            with self.memory.measuring(self._logs(self.step + 1) or self.step + 1 in profiler.steps):
                sums = self.train_step(step_batches)
            meter.count(step_batches)
            stop.save_failed = self.checkpoints.failed
            reason = stop.agreed()
            profiler.after(self.step, self.memory.parts, report, last=reason is not None or self.step == total)
            report.advance()
            self.saving.report(report)
            if stop.save_failed:
                self.saving.settle(report)
            logs, watches = self._logs(self.step), self.spikes.settings is not None
            losses = self.losses(sums) if logs or watches else []
            if logs:
                log_step(self, losses, sums.grad_norm.item(), meter, self.memory, report)
                if settings.logging.trace:
                    write_trace(self, report)
            if watches and go_back_after_spike(self, self.spikes, sum(losses), self.saving, report):
                batches = self._batches()
                meter.restart()
                continue
            if self._due(settings.checkpoint.compare_replicas_every or 0):
                check_replicas(self)
            better = False
            if reason is None and self._evaluation_due():
                better = self._evaluate(report)
                meter.restart()
            due = self._due(settings.checkpoint.every) and not self.spikes.above
            if reason or better or self.step == total or due:
                self._save_sound(report, last=reason is not None or self.step == total)
        self.checkpoints.finish()
        self.saving.report(report)
        report.stopped = reason is not None
        return reason

    def _batches(self) -> Iterator[TokenBatch]:
        """The micro batches of the steps to come."""
        first, steps = self.consumed_samples + self.skipped_samples, self.objective.total_steps - self.step
        return self.objective.training_batches(self.mesh, first, steps, self.world.device)

    def _evaluate(self, report: Report) -> bool:
        """Report held-out scores; whether they are the best of a run that follows one."""
        report.doing("evaluating")
        sign(f"the evaluation of step {self.step}")
        scores = self.evaluate()
        self.evaluated_step = self.step
        report.evaluation(self.step, scores)
        better = self.saving.evaluated(self.step, scores)
        if not better and self.selection.exhausted:
            report.say(
                f"{self.selection.metric} has not improved on step {self.selection.best_step} in "
                f"{self.selection.patience} evaluations: the run ends early"
            )
        return better

    def train_step(self, batches: list[TokenBatch]) -> StepSums:
        """One optimizer step on this data rank's micro batches of the global batch.

        Raises:
            UserError: it is not finite, or on a GPU the step before it was not; the weights are those before it.
        """
        sums = self.compute_gradients(batches)
        self.checkpoints.copied()  # weights and moments have been as they are being saved until here
        overflow = self.loss_scale.overflowed(sums.grad_norm)
        if not overflow:
            rate = learning_rate_at(self.optimizer.steps + 1, self.settings.learning_rate, self.objective.total_steps)
            self.optimizer.step(rate, self.watch.note(batches, sums.grad_norm), self._factor(sums.grad_norm))
        self.loss_scale.update(overflow)
        if self.loss_scale.exhausted or (overflow and self.loss_scale.skipped_steps == self.objective.total_steps):
            raise diagnosed(self, self.step + 1, batches)
        self.optimizer.zero_grad()
        self.objective.after_step(self.model, self.mesh)
        self.step += 1
        self.consumed_samples += batches[0].step_samples or self.settings.training.global_batch_size
        return sums

    @first_order()
    def compute_gradients(self, batches: list[TokenBatch], began: Callable[[int, int], None] | None = None) -> StepSums:
        """The gradients of a step, complete; the optimizer unscales and clips them as it reads them."""
        batches = self.objective.before_step(self.model, batches)
        counts = self._global_counts(batches)
        if self.world.device.type == "cuda":
            # Fused attention draws its dropout from torch's generator: seeded by step and place, so resuming is exact.
            torch.cuda.manual_seed(name_seed(self.settings.training.seed, f"step {self.step} rank {self.world.rank}"))
        losses = torch.zeros(len(self.objective.loss_names), device=self.world.device)

        def loss_of(index: int, output: Any) -> Tensor:
            sums = self.objective.loss_sums(output, batches[index], self.mesh.tensor_parallel)
            losses.add_(sums.detach())
            return (sums / counts).sum() * self.loss_scale.value

        def plain() -> None:
            self.model.run(self.engine, batches, loss_of, seed=self.dropout_seed, began=began)

        if self.graphs is not None and began is None:
            self.graphs.run(batches, counts, losses, self.loss_scale.value, plain)
        else:
            plain()
        return StepSums(losses, counts, self._finish_gradients(losses))

    def evaluate(self) -> dict[str, float]:
        """Held-out scores."""
        return self.objective.evaluate(self.model, self.evaluation_engine, self.mesh)

    def _engine(self, schedule: Schedule, record: bool = False, clock: StepClock | None = None) -> PipelineEngine:
        return PipelineEngine(
            schedule,
            self.mesh.coordinate["pipeline"],
            self.model.stages,
            self.transport,
            dtype=torch.float32 if self.objective.float32_activations else DTYPES[self.settings.precision.compute],
            device=self.world.device,
            record=record,
            clock=clock,
        )

    def _global_counts(self, batches: list[TokenBatch]) -> Tensor:
        """What each loss sum of the global batch is divided by; 1 where it has no terms: ``[losses]`` float32."""
        counts = self.mesh.all_reduce(self.objective.counts(batches), DATA_AXES).float()
        return torch.where(counts > 0, counts, 1.0)

    def _finish_gradients(self, losses: Tensor) -> Tensor:
        """Complete the gradients; returns their norm, unscaled, and not finite if a loss is not."""
        for stage in self.model.stages.values():
            finish_gradients(stage)
        if self.model.tied is not None:
            self.model.tied.sum_gradients()
        for stage in self.model.stages.values():
            sum_token_partial_gradients(stage, self.mesh.tensor_parallel)
        gradients = self.optimizer.gradients(self.mesh, without=self.copies.values())
        return global_gradient_norm(gradients, self.mesh, losses) / self.loss_scale.value

    def _factor(self, norm: Tensor) -> Tensor | None:
        """By which the gradients of the step are unscaled and clipped, given their norm; None leaves them."""
        maximum = self.settings.optimizer.clip_grad_norm
        if maximum > 0:
            return clip_factor(norm, maximum) / self.loss_scale.value
        return torch.full_like(norm, 1.0 / self.loss_scale.value) if self.loss_scale.value != 1.0 else None

    def losses(self, sums: StepSums) -> list[float]:
        """The losses of a step, of the whole global batch; every rank calls, and waits for the device."""
        self.watch.check()
        total = self.mesh.all_reduce(sums.losses.clone(), (*DATA_AXES, "pipeline"))
        return cast(list[float], (total / sums.counts).tolist())

    def _evaluation_due(self) -> bool:
        last = self.step == self.objective.total_steps
        return self.objective.evaluates and (last or self._due(self.objective.evaluate_every))

    def _logs(self, step: int) -> bool:
        return step % self.settings.logging.every == 0 or step == self.objective.total_steps

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    # ---------------------------------------------------------------- checkpoints

    def tensors(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor | Part]:
        """Everything sharded, by global name: ``model.<name>`` and ``optimizer.<moment>.<name>``."""
        return {**self._parts(parameters), **self.extra_tensors()}

    def _parts(self, parameters: dict[str, nn.Parameter], *, moments: bool = True) -> dict[str, Part]:
        """Weights and optimizer states of parameters."""
        parts: dict[str, Part] = {}
        for name, parameter in parameters.items():
            parts[f"model.{name}"] = self.optimizer.weights(parameter)
            if moments:
                states = self.optimizer.moments(parameter)
                parts |= {f"optimizer.{moment}.{name}": part for moment, part in states.items()}
        return parts

    def extra_tensors(self) -> dict[str, Tensor]:
        """What the objective adds to them."""
        stages = self.model.stages.values()
        return {f"model.{name}": t for stage in stages for name, t in self.objective.extra_tensors(stage).items()}

    def _save_sound(self, report: Report, *, last: bool) -> None:
        settings = self.settings.checkpoint
        self.watch.check()
        if settings.compare_replicas_every != 0 and not self._due(settings.compare_replicas_every or 0):
            check_replicas(self)
        report.doing("saving")
        sign(f"the checkpoint of step {self.step}")
        self.saving.save(self.step, self.save, report, last=last)

    def save(self) -> None:
        """Write a checkpoint of this step.

        Raises:
            UserError: another process has taken the run directory over.
        """
        if self.lock is not None:
            on_first_rank(self.lock.verify)
        state = {
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "skipped_samples": self.skipped_samples,
            "evaluated_step": self.evaluated_step,
            "optimizer": self.optimizer.state(),
            "loss_scale": self.loss_scale.state(),
            "data_size": self.mesh.layout.data,
            **self.objective.identity(),
            CONFIG_KEY: self.config.to_dict(),
            "settings": self.settings.as_json(),
        }
        if self.selection.metric is not None:
            state["selection"] = self.selection.state()
        if self.spikes.settings is not None:
            state["spikes"] = self.spikes.state()
        # What an objective adds may change already in the forward pass, as the ranges of quantization do.
        frozen = not self.extra_tensors()
        self.checkpoints.save(self.step, self.tensors(self.parameters), state, frozen=frozen)

    def load_weights(self, path: Path) -> None:
        """Take the weights of another checkpoint of the run, to evaluate them."""
        self._load(path, moments=False)

    def resume(self, path: Path) -> None:
        """Take everything from a checkpoint of the run; every rank calls."""
        state = read_state(path)
        self._load(path, moments=True)
        self.resumed = path
        self.step, self.consumed_samples = state["step"], state["consumed_samples"]
        self.skipped_samples = state.get("skipped_samples", 0)
        self.spikes.load_state(state.get("spikes") or Spikes(self.settings.training).state())
        self.evaluated_step = state.get("evaluated_step", self.step)
        self.optimizer.load_state(state["optimizer"])
        self.loss_scale.load_state(state["loss_scale"])
        # The best checkpoint of another run is not in this one's directory: its scores do not count here.
        if self.selection.metric is not None and path.resolve().parent == self.checkpoints.root.resolve():
            if "selection" in state:  # a run may begin to keep the best ones on its way
                self.selection.load_state(state["selection"])
            self.checkpoints.protected = self.selection.protected

    def _load(self, path: Path, *, moments: bool) -> None:
        self.checkpoints.copied()
        own, copies = (self._parts(found, moments=moments) for found in (self.parameters, self.copies))
        # On a stage of its own, the second copy of the tied embeddings is loaded by their name as well.
        load_tensors(path, {**copies, **own, **self.extra_tensors()}, self.checkpoints.group)
        for name in copies.keys() & own.keys():
            copies[name].values.copy_(own[name].values)
        self.optimizer.publish()

    def close(self) -> None:
        """Destroy the process groups of the run, before another one begins; every rank calls."""
        self.checkpoints.close()
        if self.transport is not None:
            self.transport.close()
