# SPDX-License-Identifier: Apache-2.0
"""Values that are not finite: noticed in the step that makes them, and traced to a rank, a module and samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_bert.model.batch import TokenBatch
from megatron_bert.training.run_state import RunState
from parallel.errors import UserError, first_of
from parallel.hosts import host_name
from parallel.mesh import DATA_AXES
from parallel.object_collectives import gather_objects
from parallel.parts import Part
from parallel.whole_files import reason_of, whole_file

#: Folder of a run directory with the batches of steps that were not finite.
BATCHES_FOLDER = "diverged"
#: A weight is taken for damaged, such as by a flipped bit of its exponent, if it is one of a few that are above both:
#: so many times the median magnitude of their tensor, and this magnitude. Training that diverges moves many.
_OUTLIER_RATIO, _OUTLIER = 1e4, 1e3
_LOWER_RATE = "go on from an earlier checkpoint with a lower learning_rate.peak or a longer warm-up"


class NotReproducedError(RuntimeError):
    """A step was not finite, and computed again it was: another start may help."""


class Watch:
    """Looks at the gradient norm of every step.

    From the first step that is not finite on, no update reaches the weights: the optimizer leaves them out on the
    device. On a GPU the host learns of it a step later, so that it never waits for the device to finish what it does.
    """

    def __init__(self, trainer: RunState) -> None:
        self.trainer = trainer
        self._found: Tensor | None = None
        self._noted: tuple[int, list[TokenBatch], Tensor, Any] | None = None
        # What changes with every step would be other when the step is computed again.
        self.at_once = trainer.world.device.type == "cpu" or trainer.objective.changes_after_step

    def note(self, batches: list[TokenBatch], norm: Tensor) -> Tensor:
        """Take note of the step that is being made.

        Args:
            norm: of its gradient, the same on every rank; not finite where a loss is not.

        Returns:
            A float32 scalar, 1 if this or an earlier step was not finite, for the optimizer.

        Raises:
            UserError: it was not, or the step before was not.
        """
        self.check()
        found = (~norm.isfinite()).float()
        self._found = found if self._found is None else torch.maximum(self._found, found)
        here, event = self._found, None
        if norm.is_cuda:
            here = torch.empty((), pin_memory=True)
            here.copy_(self._found, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._noted = self.trainer.step + 1, batches, here, event
        if self.at_once:
            self.check()
        return self._found

    def check(self) -> None:
        """Wait for the step that was noted; every rank calls.

        Raises:
            UserError: it was not finite.
        """
        if self._noted is None:
            return
        step, batches, found, event = self._noted
        self._noted = None
        if event is not None:
            event.synchronize()
        if found.item():
            raise diagnosed(self.trainer, step, batches)


@dataclass
class _Origin:
    """Where values that are not finite came up first on this rank.

    Attributes:
        order: of the backward pass or not, stage and module, as the computation runs.
        what: for people.
        samples: numbers of the samples it was in.
    """

    order: tuple[int, int, int]
    what: str
    microbatch: int
    samples: list[int]


@dataclass
class _Tracer:
    """Looks at what every module gives, and at the gradients it gets."""

    batches: Sequence[TokenBatch]
    first: _Origin | None = None
    running: tuple[int, int] = (0, 0)
    count: int = 0
    tensor: tuple[int, int] = field(default=(0, 1))

    def begin(self, stage: int, microbatch: int) -> None:
        """A stage's forward pass begins."""
        self.running, self.count = (stage, microbatch), 0

    @contextmanager
    def attached(self, stages: Mapping[int, nn.Module]) -> Iterator[None]:
        """Look while the block lasts."""
        hooks = []
        for stage in stages.values():
            for name, module in stage.named_modules():
                hooks.append(module.register_forward_hook(self._hook(name or "the stage")))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str) -> Callable[[Any, Any, Any], None]:
        def look(module: Any, inputs: Any, output: Any) -> None:  # noqa: ARG001
            self.count += 1
            (stage, microbatch), place = self.running, self.count
            for tensor in output if isinstance(output, tuple) else (output,):
                if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                    continue
                self._see(tensor, (0, stage, place), f"the output of {name}", microbatch)
                if tensor.requires_grad:
                    tensor.register_hook(
                        lambda gradient: self._see(
                            gradient, (1, -stage, -place), f"the gradient of the output of {name}", microbatch
                        )
                    )

        return look

    def _see(self, tensor: Tensor, order: tuple[int, int, int], what: str, microbatch: int) -> None:
        if self.first is not None and self.first.order <= order:
            return
        finite = tensor.detach().isfinite()
        if finite.all():
            return
        self.first = _Origin(order, what, microbatch, self._samples(~finite, self.batches[microbatch]))

    def _samples(self, wrong: Tensor, batch: TokenBatch) -> list[int]:
        """Numbers of the samples whose tokens are in the rows of a mask; all of the micro batch for other shapes."""
        numbers, read = batch.samples, batch.read_by_heads()
        rank, size = self.tensor
        if wrong.dim() and wrong.shape[0] * size == numbers.shape[0]:  # this rank's tokens, in sequence parallelism
            numbers = numbers.chunk(size)[rank]
        elif wrong.dim() and wrong.shape[0] == read.shape[0]:
            numbers = numbers[read]
        if wrong.dim() and wrong.shape[0] == numbers.shape[0]:
            numbers = numbers[wrong.flatten(1).any(1) if wrong.dim() > 1 else wrong]
        return [int(number) for number in numbers.unique().tolist()]


@dataclass(frozen=True)
class _Finding:
    """What a rank knows of a step that was not finite."""

    rank: int
    host: str
    data_rank: int
    damaged: dict[str, int]
    outliers: list[tuple[str, float, float]]
    origin: _Origin | None

    @property
    def place(self) -> str:
        return f"rank {self.rank} ({self.host})"


def diagnosed(trainer: RunState, step: int, batches: list[TokenBatch]) -> Exception:
    """Find out why a step was not finite, by computing it again; every rank calls, and gets the same error.

    Args:
        trainer: whose weights are still those before the step.
        batches: its micro batches, which are kept in a file.
    """
    damaged, outliers = _damaged(trainer), _outliers(trainer)
    tp = trainer.mesh.tensor_parallel
    tracer = _Tracer(batches, tensor=(tp.rank, tp.size))
    trainer.optimizer.zero_grad()
    trainer.step, now = step - 1, trainer.step
    with tracer.attached(trainer.model.stages):
        sums = trainer.compute_gradients(batches, tracer.begin)
    trainer.step = now
    trainer.optimizer.zero_grad()
    loss = trainer.mesh.all_reduce(sums.losses.clone(), (*DATA_AXES, "pipeline")) / sums.counts
    norm, scale = sums.grad_norm.item(), trainer.loss_scale
    values = f"the loss is {loss.sum().item():.4g} and the gradient norm {norm:.4g}"
    if scale.dynamic:
        values = f"{values}, as in the {scale.skipped_steps} float16 steps up to it, all skipped"
    mine = _Finding(trainer.world.rank, host_name(), trainer.mesh.data_rank, damaged, outliers, tracer.first)
    found = gather_objects(mine)
    traced = ((one.origin.order, one.rank) for one in found if one.origin is not None)
    first = next((found[rank] for _, rank in sorted(traced)), None)
    kept = _kept(trainer, step, batches, None if first is None else first.data_rank)
    damage = _damage(step, values, found, _suspected(trainer))
    if scale.dynamic and scale.value > 1.0:
        cause = damage or (
            f"every float16 step up to step {step} was skipped, since gradients overflow at a loss scale of "
            f"{scale.value:.3g}, so nothing was trained: lower precision.initial_loss_scale, or train more steps"
        )
        return UserError(cause + kept)
    # Weights that are only large do not make a step that is finite when it is computed again.
    if damage and (not math.isfinite(norm) or any(one.damaged for one in found)):
        return UserError(damage + kept)
    if math.isfinite(norm):
        return NotReproducedError(
            f"step {step} was not finite, but computed again it is ({values}): a device or a connection gives wrong "
            f"results at times; `megatron-bert doctor` examines the machines{kept}"
        )
    cause = "every value is finite, but the squares of the gradients are too large to add up"
    if first is not None and (origin := first.origin) is not None:
        cause = (
            f"the first values that are not finite are in {origin.what} on {first.place}, stage {abs(origin.order[1])},"
            f" micro batch {origin.microbatch}, samples {first_of(origin.samples)}"
        )
    remedy = f"set precision.compute=bfloat16, or {_LOWER_RATE}" if scale.dynamic else _LOWER_RATE
    return UserError(f"training diverged: at step {step} {values}; {cause}: {remedy}{kept}")


def _suspected(trainer: RunState) -> str:
    """What may be damaged beside memory, and what to do."""
    again = "without that host if it happens there again"
    if trainer.resumed is not None:
        checkpoint = f"the checkpoint it went on from ({trainer.resumed})"
        return f"memory or {checkpoint} is damaged: go on from an earlier one, and {again}"
    source = trainer.objective.starts_from
    if source is not None:
        return f"memory or model.from ({source}) is damaged: start from another copy of it, and {again}"
    return f"memory is damaged: start the same command again, {again}"


def _damage(step: int, values: str, found: list[_Finding], suspected: str) -> str:
    """The cause in a sentence, if it is a weight that was damaged; empty otherwise."""
    broken = [
        f"{count} of the values of {name} on {one.place} are NaN or infinite"
        for one in found
        for name, count in one.damaged.items()
    ]
    if broken:
        return f"step {step} is not finite because values were damaged before it: {first_of(broken)}; {suspected}"
    huge = [
        f"{name} on {one.place} holds {largest:.3g}, {ratio:.1g} times its median magnitude"
        for one in found
        for name, largest, ratio in one.outliers
    ]
    if huge:
        return f"at step {step} {values} because of weights out of all proportion: {first_of(huge)}; {suspected}"
    return ""


def _damaged(trainer: RunState) -> dict[str, int]:
    """Weights and optimizer states of this rank that are not finite: name -> how many values."""
    found = {}
    for parameters in (trainer.parameters, trainer.copies):
        for name, tensor in trainer.tensors(parameters).items():
            count = int((~Part.of(tensor).values.isfinite()).sum())
            if count:
                found[name] = count
    return found


def _outliers(trainer: RunState) -> list[tuple[str, float, float]]:
    """Weights of this rank far from the rest of their tensor: name, largest magnitude, its ratio to the median."""
    found = []
    for name, parameter in {**trainer.copies, **trainer.parameters}.items():
        values = trainer.optimizer.weights(parameter).values.abs().flatten()
        largest = values.max().item() if values.numel() else 0.0
        if not math.isfinite(largest) or largest < _OUTLIER:
            continue
        median = max(values.median().item(), 1e-30)
        few = int((values > max(_OUTLIER, _OUTLIER_RATIO * median)).sum())
        if 0 < few <= max(8, values.numel() // 10_000):
            found.append((f"model.{name}", largest, largest / median))
    return found


def _kept(trainer: RunState, step: int, batches: list[TokenBatch], data_rank: int | None) -> str:
    """Keep the micro batches of a data rank, or of all, in a file each; where they are, for people."""
    folder = trainer.settings.training.run_dir / BATCHES_FOLDER
    mesh, failure = trainer.mesh, ""
    if mesh.coordinate["tensor"] == mesh.coordinate["pipeline"] == 0 and data_rank in (None, mesh.data_rank):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_batches(folder / f"step_{step:08d}_data_{mesh.data_rank:04d}.npz", step, batches)
        except OSError as error:
            failure = reason_of(error)
    if failed := next(filter(None, gather_objects(failure)), None):
        return f"; the batch could not be kept in {folder} ({failed})"
    ranks = "*" if data_rank is None else f"{data_rank:04d}"
    return f"; the batch is kept in {folder / f'step_{step:08d}_data_{ranks}.npz'}"


def write_batches(path: Path, step: int, batches: Sequence[TokenBatch]) -> None:
    """Write micro batches as arrays, which ``numpy.load`` reads: ``step``, and ``<number>.tokens`` and so on of each.

    Raises:
        OSError: the file cannot be written.
    """
    arrays = {
        f"{number}.{name}": tensor.cpu().numpy()
        for number, batch in enumerate(batches)
        for name, tensor in batch.tensors().items()
    }
    arrays |= {f"{number}.lengths": np.array(batch.lengths) for number, batch in enumerate(batches)}
    with whole_file(path, "wb") as file:
        np.savez_compressed(file, step=np.array(step), **arrays)
