# SPDX-License-Identifier: Apache-2.0
"""Initial weights of the documented classes, which are those of the pretraining model."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from transformers import initialization

from megatron_bert.convert.huggingface_names import HuggingFaceNames, separate
from megatron_bert.convert.name_table import Place
from megatron_bert.family.configuration import DocumentedConfig
from megatron_bert.model.configuration import EncoderConfig
from megatron_bert.model.resharding import padded
from parallel.mesh import TensorParallel
from parallel.sharding import copy_whole, local_tensor, name_seed

#: Output projections, whose initial values are smaller.
_OUTPUTS = ("attention.output", "mlp.output", "cross_attention.output")
#: Tables with a row for each word, which are drawn without padding.
_BY_WORD = ("embeddings.word_embeddings", "output_embeddings")


class InitialWeights(transformers.PreTrainedModel):
    """A model whose weights are drawn from torch's generator, by their names in pretraining, if they are ``_initial``.

    They depend on the seed and on names, not on ranks.
    """

    config: DocumentedConfig
    #: Of parameters, in files of pretraining.
    names: ClassVar[HuggingFaceNames]
    sizes: EncoderConfig
    tp: TensorParallel
    _initial: bool
    _seed = 0
    #: The name and the parts of the fused matrix that was drawn last.
    _drawn: tuple[str, tuple[Tensor, ...]] | None = None

    def init_weights(self) -> None:
        """Draw initial weights, if they are wanted."""
        if self._initial:
            super().init_weights()
        else:
            self.tie_weights(recompute_mapping=False)

    def initialize_weights(self) -> None:
        """Draw what no checkpoint has given."""
        seed = self.fresh_seed()
        for name, module in self.named_modules():
            if isinstance(module, InitialWeights):
                module._seed = seed
            module._place = self.names.place(name)
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, InitialWeights):
                module._drawn = None

    def mark_tied_weights_as_initialized(self, loading_info: Any) -> None:
        """As transformers does; a second name without values is a parameter of its own until it is tied again.

        Otherwise the mark of the second name would be one of the first, which then nothing would draw.
        """
        for name in self.all_tied_weights_keys:
            parameter = self.get_parameter(name)
            if parameter.device.type == "meta":
                owner, _, kind = name.rpartition(".")
                own = nn.Parameter(torch.empty_like(parameter), requires_grad=parameter.requires_grad)
                setattr(self.get_submodule(owner), kind, own)
        super().mark_tied_weights_as_initialized(loading_info)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        place: Place | None = getattr(module, "_place", None)
        if place is None:
            super()._init_weights(module)
            return
        for kind, parameter in module.named_parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False):
                self._draw(f"{place.owner}.{kind}", place, parameter)

    def _draw(self, name: str, place: Place, parameter: nn.Parameter) -> None:
        if name.endswith("bias") or "norm" in place.owner:
            initialization.constant_(local_tensor(parameter), float(name.endswith("weight")))
            return
        held = self._drawn
        if held is None or held[0] != name:
            rows = self.config.vocab_size if place.owner in _BY_WORD else parameter.shape[0]
            std = self.sizes.output_init_std if place.owner.endswith(_OUTPUTS) else self.config.initializer_range
            generator = torch.Generator().manual_seed(name_seed(self._seed, name))
            shape = (rows * place.parts, *parameter.shape[1:])
            whole = torch.empty(shape, device="cpu", dtype=torch.float32).normal_(0.0, std, generator=generator)
            self._drawn = held = (name, separate(whole, place.parts, self.sizes.head_dim))
        copy_whole(parameter, padded(held[1][place.part], parameter.shape[0]))

    def fresh_seed(self) -> int:
        """A number from torch's generator, the same on every tensor rank."""
        seed = torch.randint(1 << 62, (1,), device="cpu")
        if self.tp.size > 1:
            assert self.tp.mesh is not None
            seed = seed.to(self.tp.mesh.device_type)
            dist.broadcast(seed, group=self.tp.group, group_src=0)
        return int(seed)
