"""Which layers of a model compute their forward pass again in the backward pass.

transformers calls it activation checkpointing, and earlier gradient checkpointing; both names are here.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from megatron_bert.family.kinds import checked_switch, told
from megatron_bert.model.layer import TransformerLayer
from parallel.errors import UserError


class Recomputing(nn.Module):
    """A model of transformer layers."""

    def layer_list(self) -> list[TransformerLayer]:
        """The transformer layers, lowest first."""
        raise NotImplementedError

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether layers compute their forward pass again in the backward pass."""
        return any(layer.recompute != "none" for layer in self.layer_list())

    @property
    def is_gradient_checkpointing(self) -> bool:
        """The older name of ``is_activation_checkpointing``."""
        return self.is_activation_checkpointing

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Keep only the input of layers in training, and compute the layers again in the backward pass.

        Args:
            activation_checkpointing_kwargs: how transformers recomputes; ``use_reentrant`` may be False, as it is here.
            every_n_layers: do so in the first layer and each that many after it; the others keep what they need.
            offload: False; what is kept stays where it is.

        Raises:
            UserError: any of them is something else.
        """
        asked = {} if activation_checkpointing_kwargs is None else activation_checkpointing_kwargs
        known = isinstance(asked, dict) and asked.keys() <= {"use_reentrant"}
        if not known or checked_switch("use_reentrant", asked.get("use_reentrant", False)):
            raise UserError(
                f'gradient_checkpointing_kwargs is {told(asked)}: leave it out, or give {{"use_reentrant": False}}'
            )
        if type(every_n_layers) is not int or every_n_layers < 1:
            raise UserError(f"every_n_layers is {told(every_n_layers)}: give a whole number of 1 or more")
        if checked_switch("offload", offload):
            raise UserError("offload is True, but what layers keep is not moved to the host here: leave it at False")
        for number, layer in enumerate(self.layer_list()):
            layer.recompute = "none" if number % every_n_layers else "full"

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """The older name of ``activation_checkpointing_enable``."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, every_n_layers, offload)

    def activation_checkpointing_disable(self) -> None:
        """Keep what the backward pass needs."""
        for layer in self.layer_list():
            layer.recompute = "none"

    def gradient_checkpointing_disable(self) -> None:
        """The older name of ``activation_checkpointing_disable``."""
        self.activation_checkpointing_disable()
