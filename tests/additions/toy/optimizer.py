# SPDX-License-Identifier: Apache-2.0
"""An optimizer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_bert.training.update_rules import UpdateRule
from parallel.runs import Run


class Lion(UpdateRule):
    """Lion (Chen et al., arXiv 2302.06675): the sign of a mean of the gradients, which is all that it keeps."""

    moment_names = ("exp_avg",)

    def _prepare(self, runs: Sequence[Run]) -> None:
        """Nothing else."""

    def set_steps(self, steps: int) -> None:
        """The update does not depend on them."""

    @torch.no_grad()
    def step(self, learning_rate: float, unless: Tensor | None, factor: Tensor | None) -> None:
        """Update the weights of all runs that have gradients."""
        stays = 1.0 if unless is None else 1.0 - unless
        for run, gradient in self._with_gradients():
            if factor is not None:
                gradient.mul_(factor)
            gradient.nan_to_num_()
            mean = self.moments[run]["exp_avg"]
            update = mean.lerp(gradient, 1 - self.settings.beta1).sign_()
            update.add_(run.values, alpha=run.kind.weight_decay)
            run.values.sub_(update.mul_(stays * (learning_rate * run.kind.rate)))
            mean.add_((gradient - mean).mul_(stays * (1 - self.settings.beta2)))
