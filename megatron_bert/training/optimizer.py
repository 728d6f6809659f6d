# SPDX-License-Identifier: Apache-2.0
"""The optimizer of a run, over this rank's share of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from megatron_bert.config_sections import OptimizerSettings
from megatron_bert.tables import OPTIMIZERS, found_at
from megatron_bert.training.update_rules import Kind, UpdateRule
from parallel.data_parallel import flat_buffers
from parallel.errors import UserError
from parallel.mesh import ParallelMesh
from parallel.object_collectives import gather_objects
from parallel.parts import Part
from parallel.process_group import is_simulated
from parallel.runs import Run, lone_run

#: Before the name of the last stage's copy of a parameter.
TIED_PREFIX = "tied."


def decays(name: str, dimensions: int) -> bool:
    """Whether weight decay applies: to matrices and embeddings, not to biases and norms."""
    return dimensions > 1 and not name.endswith(".bias")


def weight_decay_of(name: str, dimensions: int, settings: OptimizerSettings) -> float:
    """The weight decay of a parameter of so many dimensions."""
    for pattern, decay in settings.weight_decay_by_name.items():
        if fnmatchcase(name, pattern):
            return decay
    return settings.weight_decay if decays(name, dimensions) else 0.0


def check_patterns(names: Iterable[str], settings: OptimizerSettings, *, all_here: bool = False) -> None:
    """Refuse patterns that match no parameter; every rank calls.

    Args:
        names: of the parameters of this rank.
        all_here: whether they are those of all ranks.

    Raises:
        UserError: a pattern matches none of any rank.
    """
    patterns = list(settings.weight_decay_by_name)
    if not patterns or (is_simulated() and not all_here):  # other ranks of a simulation cannot say what they have
        return
    mine = list(names)
    matches = [any(fnmatchcase(name, pattern) for name in mine) for pattern in patterns]
    found = [matches] if all_here else gather_objects(matches)
    for pattern, *matched in zip(patterns, *found, strict=True):
        if not any(matched):
            raise UserError(
                f"optimizer.weight_decay_by_name has the pattern {pattern!r}, which matches no parameter: names are "
                f"like {mine[0] if mine else 'those in a checkpoint'}, and * stands for any characters, dots included"
            )


class ShardedOptimizer:
    """An update rule on the master weights of this rank.

    They are plain float32 tensors, whatever the mesh axes that divide the parameters: ranges of flat buffers, or the
    local tensors of parameters that are DTensors. Neighbors in memory that are updated alike count as one tensor.

    Args:
        parameters: name -> parameter, after they have been prepared for data parallelism.
        mesh: where the run is laid out; None for one rank.
        scale: factor on the learning rate of the parameter of a name; 1 when None.
        stages: which have parameters in flat buffers.
        tied: parameters that another rank updates as well, with the same numbers.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        settings: OptimizerSettings,
        mesh: ParallelMesh | None = None,
        scale: Callable[[str], float] | None = None,
        stages: Iterable[nn.Module] = (),
        tied: Iterable[nn.Parameter] = (),
    ) -> None:
        kinds = {
            parameter: Kind(
                weight_decay_of(name.removeprefix(TIED_PREFIX), parameter.dim(), settings),
                scale(name) if scale else 1.0,
            )
            for name, parameter in parameters.items()
        }
        self.buffers = [flat for stage in stages if (flat := flat_buffers(stage)) is not None]
        self.runs: list[Run] = [run for flat in self.buffers for run in flat.runs(kinds.__getitem__)]
        #: The run of every parameter.
        self.run_of = {parameter: run for run in self.runs for parameter in run.members}
        for parameter, kind in kinds.items():
            if parameter not in self.run_of:
                self.run_of[parameter] = lone_run(parameter, kind)
                self.runs.append(self.run_of[parameter])
        rule: type[UpdateRule] = found_at(OPTIMIZERS[settings.name])
        self.rule = rule(self.runs, settings, mesh, list(parameters.values()), frozenset(tied))
        self.steps = 0

    def gradients(self, mesh: ParallelMesh, without: Iterable[nn.Parameter] = ()) -> list[Tensor]:
        """Gradients of this rank that stand for their copies on other ranks.

        Args:
            without: parameters, none or all of a run, that are copies of others.
        """
        copies = set(without)
        counted = (run for run in self.runs if run.counted_here(mesh) and copies.isdisjoint(run.members))
        return [gradient for run in counted if (gradient := run.gradient) is not None]

    def step(self, learning_rate: float, unless: Tensor | None = None, factor: Tensor | None = None) -> None:
        """Update the parameters from their gradients.

        Args:
            learning_rate: of parameters whose factor is 1.
            unless: float32 scalar on the device; where it is 1, nothing changes.
            factor: scalar on the device by which gradients are multiplied first.
        """
        self.rule.step(learning_rate, unless, factor)
        self.steps += 1
        self.publish()

    def publish(self) -> None:
        """Compute with the master weights from now on, after they have changed; every rank calls."""
        for flat in self.buffers:
            flat.publish()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for flat in self.buffers:
            flat.zero()
        for run in self.runs:
            if run.buffer is None:
                for parameter in run.members:
                    parameter.grad = None

    def weights(self, parameter: nn.Parameter) -> Part:
        """What this rank has of a parameter's master weights, sharing memory with them."""
        run = self.run_of[parameter]
        return run.part(parameter, run.values)

    def moments(self, parameter: nn.Parameter) -> dict[str, Part]:
        """A parameter's state by name, divided as its master weights are and sharing memory with the optimizer's."""
        run = self.run_of[parameter]
        return {moment: run.part(parameter, tensor) for moment, tensor in self.rule.moments[run].items()}

    def held_bytes(self) -> dict[str, int]:
        """What tensors of this rank take: ``weights`` that are computed with, ``gradients``, and ``optimizer`` states.

        Master weights count as states where they are others than those computed with.
        """
        alone = sum(run.values.nbytes for run in self.runs if run.buffer is None)
        moments = sum(tensor.nbytes for kept in self.rule.moments.values() for tensor in kept.values())
        return {
            "weights": alone + sum(flat.weights.nbytes for flat in self.buffers),
            "gradients": alone + sum(flat.gradients.nbytes for flat in self.buffers),
            "optimizer": moments + sum(flat.masters.nbytes for flat in self.buffers),
        }

    def state(self) -> dict[str, Any]:
        """What is not a tensor per parameter."""
        return {"steps": self.steps}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`."""
        self.steps = int(state["steps"])
        self.rule.set_steps(self.steps)
