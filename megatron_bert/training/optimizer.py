"""AdamW over this rank's share of the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_bert import backends
from megatron_bert.config import OptimizerSettings
from parallel.gradients import raw_local

#: Optimizer state kept for every parameter, as named in checkpoints.
MOMENTS = ("exp_avg", "exp_avg_sq")


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices and embeddings, not to biases and norms."""
    return parameter.dim() > 1 and not name.endswith(".bias")


class ShardedAdamW:
    """AdamW on plain local tensors, one for each parameter of the model.

    Parameters may be DTensors over any mesh axes. An elementwise optimizer does not care, and plain tensors of one
    kind go through one fused kernel: several times cheaper on the host than DTensors of mixed placements. The local
    tensors share memory with the model's parameters, which are the float32 master weights.

    Args:
        parameters: name -> parameter, after wrapping for data parallelism.
        settings: betas, eps and weight decay.
        scale: factor on the learning rate of the parameter of a name; 1 when None.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        settings: OptimizerSettings,
        scale: Callable[[str], float] | None = None,
    ) -> None:
        self.local = {parameter: nn.Parameter(raw_local(parameter)) for parameter in parameters.values()}
        members: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            kind = settings.weight_decay if decays(name, parameter) else 0.0, scale(name) if scale else 1.0
            members.setdefault(kind, []).append(self.local[parameter])
        groups = [
            {"params": params, "weight_decay": decay, "scale": factor} for (decay, factor), params in members.items()
        ]
        betas = (settings.beta1, settings.beta2)
        fused_adam = backends.apex_adam() if any(p.is_cuda for p in self.local.values()) else None
        self.adam: torch.optim.Optimizer
        if fused_adam is not None:
            self.adam = fused_adam(groups, lr=0.0, betas=betas, eps=settings.eps, adam_w_mode=True)
        else:
            self.adam = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=settings.eps, fused=True)
        self._counts_in_group = fused_adam is not None
        self.steps = 0
        for local in self.local.values():
            # Created now rather than at the first step, so that a checkpoint can be loaded in place.
            self.adam.state[local] = {moment: torch.zeros_like(local) for moment in MOMENTS}
        self._set_steps()

    def _set_steps(self) -> None:
        if self._counts_in_group:
            for group in self.adam.param_groups:
                group["step"] = self.steps
        else:
            for local in self.local.values():
                self.adam.state[local]["step"] = torch.tensor(float(self.steps), device=local.device)

    def step(self, learning_rate: float, unless: Tensor | None = None) -> None:
        """Update the parameters from their gradients.

        Args:
            learning_rate: of parameters whose factor is 1.
            unless: float32 scalar on the device; where it is 1, nothing changes.
        """
        for parameter, local in self.local.items():
            local.grad = None if parameter.grad is None else raw_local(parameter.grad)
        for group in self.adam.param_groups:
            group["lr"] = learning_rate * group["scale"]
        if self._counts_in_group:  # apex's kernel takes no such condition
            if unless is None or not unless.item():
                self.adam.step()
        else:
            self.adam.found_inf = unless  # type: ignore[attr-defined]
            self.adam.step()
        self.steps += 1

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter, local in self.local.items():
            parameter.grad = local.grad = None

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """A parameter's state by name, sharded as the parameter is and sharing memory with the optimizer's."""
        state = self.adam.state[self.local[parameter]]
        return {moment: _placed_like(state[moment], parameter) for moment in MOMENTS}

    def state(self) -> dict[str, Any]:
        """What is not a tensor per parameter."""
        return {"steps": self.steps}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`."""
        self.steps = int(state["steps"])
        self._set_steps()


def _placed_like(local: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return local.detach()
    return DTensor.from_local(
        local.detach(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
