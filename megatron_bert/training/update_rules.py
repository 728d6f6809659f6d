# SPDX-License-Identifier: Apache-2.0
"""How weights follow from gradients: optimizers, each on runs of master weights.

Their table is in :mod:`megatron_bert.tables`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import chain
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from megatron_bert import backends
from megatron_bert.config_sections import OptimizerSettings
from parallel.gradients import sums_of_squares
from parallel.huge_pages import large_zeros
from parallel.mesh import ParallelMesh
from parallel.runs import Run
from parallel.simulated_device import has_numbers

#: Running means kept for every parameter, as named in checkpoints.
MOMENTS = ("exp_avg", "exp_avg_sq")


class Kind(NamedTuple):
    """What parameters updated alike have in common.

    Attributes:
        rate: factor on the learning rate.
    """

    weight_decay: float
    rate: float


class UpdateRule(ABC):
    """An update of weights, with running means of every weight's gradient.

    Args:
        runs: of one :class:`Kind` each; those that have no values on this rank have members that others have.
        mesh: where the run is laid out; None for one rank.
        order: of all parameters of the runs, the same on every rank that has the stage.
        tied: parameters that another stage updates as well, with the same numbers.
    """

    #: What it keeps for every weight, as named in checkpoints.
    moment_names: ClassVar[tuple[str, ...]] = MOMENTS

    def __init__(
        self,
        runs: Sequence[Run],
        settings: OptimizerSettings,
        mesh: ParallelMesh | None,
        order: Sequence[nn.Parameter],
        tied: frozenset[nn.Parameter],
    ) -> None:
        self.settings, self.mesh, self.order, self.tied = settings, mesh, order, tied
        # Created now rather than at the first step, so that a checkpoint can be loaded in place.
        self.moments = {run: {name: _zeros_like(run.values) for name in self.moment_names} for run in runs}
        self.runs = [run for run in runs if run.values.numel()]
        self._prepare(runs)
        self.set_steps(0)

    @classmethod
    def sums(cls, weight_decays: Sequence[float], tied: Sequence[bool]) -> list[int]:  # noqa: ARG003
        """Float32 numbers of every sum over the ranks that divide parameters, in a step.

        Args:
            weight_decays: of all parameters of a rank, in their order.
            tied: whether another stage updates them as well.
        """
        return []

    @abstractmethod
    def _prepare(self, runs: Sequence[Run]) -> None:
        """What the rule keeps beside the moments."""

    @abstractmethod
    def set_steps(self, steps: int) -> None:
        """Go on after so many steps."""

    @abstractmethod
    def step(self, learning_rate: float, unless: Tensor | None, factor: Tensor | None) -> None:
        """Update the weights of all runs that have gradients.

        Args:
            learning_rate: of parameters whose factor is 1.
            unless: float32 scalar on the device; where it is 1, nothing changes.
            factor: scalar on the device by which gradients are multiplied first; gradients may be overwritten.
        """

    def _with_gradients(self) -> list[tuple[Run, Tensor]]:
        return [(run, gradient) for run in self.runs if (gradient := run.gradient) is not None]


def _zeros_like(values: Tensor) -> Tensor:
    if not has_numbers(values):
        return torch.zeros_like(values)
    return large_zeros(values.numel(), dtype=values.dtype, device=values.device).view(values.shape)


class AdamW(UpdateRule):
    """AdamW with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), fused by torch or apex."""

    def _prepare(self, runs: Sequence[Run]) -> None:  # noqa: ARG002
        self.alike: dict[Kind, list[Run]] = {}
        for run in self.runs:
            self.alike.setdefault(run.kind, []).append(run)
        fused_adam = backends.apex_adam() if any(run.values.is_cuda for run in self.runs) else None
        self.apex = None if fused_adam is None else self._by_apex(fused_adam)

    def _by_apex(self, fused_adam: Callable[..., torch.optim.Optimizer]) -> torch.optim.Optimizer:
        settings = self.settings
        self.local = {run: nn.Parameter(run.values) for run in self.runs}
        groups = [
            {"params": [self.local[run] for run in runs], "weight_decay": kind.weight_decay, "scale": kind.rate}
            for kind, runs in self.alike.items()
        ]
        betas = (settings.beta1, settings.beta2)
        adam = fused_adam(groups, lr=0.0, betas=betas, eps=settings.eps, adam_w_mode=True)
        for run, local in self.local.items():
            adam.state[local] = dict(self.moments[run])
        return adam

    def set_steps(self, steps: int) -> None:
        """Go on after so many steps."""
        self.steps = {run: torch.tensor(float(steps), device=run.values.device) for run in self.runs}
        for group in [] if self.apex is None else self.apex.param_groups:
            group["step"] = steps

    @torch.no_grad()
    def step(self, learning_rate: float, unless: Tensor | None, factor: Tensor | None) -> None:
        """Update the weights of all runs that have gradients."""
        if self.apex is not None:
            self._step_by_apex(self.apex, learning_rate, unless, factor)
            return
        # The kernel divides by this while it reads the gradients.
        scale = None if factor is None else factor.reciprocal()
        settings, gradients = self.settings, dict(self._with_gradients())
        for kind, runs in self.alike.items():
            found = [run for run in runs if run in gradients]
            # The function itself: torch's class loads the compiler, a sixth of the time that a run takes to start.
            adamw(
                [run.values for run in found],
                [gradients[run] for run in found],
                [self.moments[run]["exp_avg"] for run in found],
                [self.moments[run]["exp_avg_sq"] for run in found],
                [],
                [self.steps[run] for run in found],
                fused=True,
                grad_scale=scale,
                found_inf=unless,
                amsgrad=False,
                beta1=settings.beta1,
                beta2=settings.beta2,
                lr=learning_rate * kind.rate,
                weight_decay=kind.weight_decay,
                eps=settings.eps,
                maximize=False,
            )

    def _step_by_apex(
        self, apex: torch.optim.Optimizer, learning_rate: float, unless: Tensor | None, factor: Tensor | None
    ) -> None:
        """Apex's kernel takes neither a condition nor a factor."""
        for run, local in self.local.items():
            local.grad = run.gradient
        for group in apex.param_groups:
            group["lr"] = learning_rate * group["scale"]
        gradients = [local.grad for local in self.local.values() if local.grad is not None]
        if factor is not None:
            torch._foreach_mul_(gradients, factor)
        if unless is None or not unless.item():
            apex.step()


class Lamb(UpdateRule):
    """LAMB (You et al., arXiv 1904.00962), as MLPerf trains BERT with it.

    The step of Adam with weight decay, of each parameter as long as a share of the parameter itself: times the ratio of
    the norm of the weights to the norm of the step. Parameters without weight decay (biases and norms) have no ratio.
    Norms are those of whole parameters, whatever ranks hold them.
    """

    @classmethod
    def sums(cls, weight_decays: Sequence[float], tied: Sequence[bool]) -> list[int]:
        """Of the squares of weights and steps, a number of each for every adapted parameter."""
        return [2 * len(section) for section in cls._sections(weight_decays, tied)]

    @staticmethod
    def _sections(weight_decays: Sequence[float], tied: Sequence[bool]) -> list[list[int]]:
        """Adapted parameters whose norms are summed at once, by their places in the order of all."""
        adapted = [place for place, decay in enumerate(weight_decays) if decay > 0]
        # Copies on two stages must come out alike bit for bit: sums of theirs alone add up in the same order.
        sections = [[place for place in adapted if not tied[place]], *([place] for place in adapted if tied[place])]
        return [section for section in sections if section]

    def _prepare(self, runs: Sequence[Run]) -> None:
        run_of = {parameter: run for run in runs for parameter in run.members}
        self.sections = self._sections(
            [run_of[parameter].kind.weight_decay for parameter in self.order], [p in self.tied for p in self.order]
        )
        number = {self.order[place]: index for index, place in enumerate(chain.from_iterable(self.sections))}
        #: Of every adapted parameter that has values here: its run and number.
        self.adapted = [
            (parameter, run, number[parameter]) for run in self.runs for parameter in run.members if parameter in number
        ]
        device = runs[0].values.device if runs else None
        counted = [entry for entry in self.adapted if self._counted(entry[1])]
        self.counted = counted, torch.tensor([index for _, _, index in counted], dtype=torch.int64, device=device)

    def _counted(self, run: Run) -> bool:
        """Whether a norm takes this rank's values, which tensor ranks may hold alike."""
        return self.mesh is None or "tensor" not in run.axes or self.mesh.coordinate["tensor"] == 0

    def set_steps(self, steps: int) -> None:
        """Go on after so many steps."""
        self.steps = steps

    @torch.no_grad()
    def step(self, learning_rate: float, unless: Tensor | None, factor: Tensor | None) -> None:
        """Update the weights of all runs that have gradients."""
        self.steps += 1
        found = self._with_gradients()
        # In the memory of the gradients.
        updates = {run: self._adam(run, gradient, unless, factor) for run, gradient in found}
        ratios = self._ratios(updates)
        for parameter, run, index in self.adapted:
            if run in updates:
                run.own(parameter, updates[run]).mul_(ratios[index])
        stays = 1.0 if unless is None else 1.0 - unless
        for run, update in updates.items():
            run.values.sub_(update.mul_(stays * (learning_rate * run.kind.rate)))

    def _adam(self, run: Run, gradient: Tensor, unless: Tensor | None, factor: Tensor | None) -> Tensor:
        """Adam's step with weight decay, at a learning rate of 1."""
        beta1, beta2 = self.settings.beta1, self.settings.beta2
        keep1: float | Tensor = beta1
        keep2: float | Tensor = beta2
        if factor is not None:
            gradient.mul_(factor)
        if unless is not None:
            gradient.masked_fill_(unless > 0, 0.0)
            keep1, keep2 = torch.where(unless > 0, 1.0, beta1), torch.where(unless > 0, 1.0, beta2)
        mean, square = self.moments[run]["exp_avg"], self.moments[run]["exp_avg_sq"]
        mean.mul_(keep1).add_(gradient, alpha=1 - beta1)
        square.mul_(keep2).addcmul_(gradient, gradient, value=1 - beta2)
        torch.sqrt(square, out=gradient)
        gradient.div_(math.sqrt(1 - beta2**self.steps)).add_(self.settings.eps)
        torch.div(mean, gradient, out=gradient)
        return gradient.div_(1 - beta1**self.steps).add_(run.values, alpha=run.kind.weight_decay)

    def _ratios(self, updates: dict[Run, Tensor]) -> Tensor:
        """Norm of the weights over norm of the step, of every adapted parameter; 1 where either is 0."""
        counted, numbers = self.counted
        total = sum(map(len, self.sections))
        sums = torch.zeros(2, total, device=numbers.device)
        taken = [(run.own(p, run.values), run.own(p, updates[run])) for p, run, _ in counted if run in updates]
        if taken:
            values = [value for pair in zip(*taken, strict=True) for value in pair]
            present = [run in updates for _, run, _ in counted]
            where = numbers if all(present) else numbers[torch.tensor(present, device=numbers.device)]
            sums[:, where] = sums_of_squares(values).view(2, -1)
        if self.mesh is not None:
            for part in sums.split([len(section) for section in self.sections], dim=1):
                part.copy_(self.mesh.all_reduce(part.contiguous(), ("tensor", "data_shard")))
        weights, steps = sums.sqrt()
        return torch.where((weights > 0) & (steps > 0), weights / steps, 1.0)
