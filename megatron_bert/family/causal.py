# SPDX-License-Identifier: Apache-2.0
"""The class that predicts the next word, and writes text with it."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from megatron_bert.family.arguments import shared_arguments
from megatron_bert.family.checks import described
from megatron_bert.family.configuration import MegatronBertConfig
from megatron_bert.family.encoder import Tensors
from megatron_bert.family.language import MegatronBertLanguageModel
from megatron_bert.family.logits_to_keep import check_kept, kept_states
from megatron_bert.model.configuration_checks import is_number
from parallel.cross_entropy import IGNORED
from parallel.errors import UserError


class MegatronBertForCausalLM(MegatronBertLanguageModel, GenerationMixin):
    """Logits of the next word after every token; ``config.is_decoder`` makes tokens see only those before them.

    Args:
        config: sizes and options.
        **options: as of DocumentedModel.
    """

    #: The cache of ours grows; nothing of a step is compiled in advance.
    _can_compile_fullgraph = False

    def __init__(self, config: MegatronBertConfig, **options: Any) -> None:
        if isinstance(config, MegatronBertConfig) and not config.is_decoder:
            warnings.warn("MegatronBertForCausalLM sees the words it predicts unless is_decoder=True", stacklevel=2)
        super().__init__(config, **options)
        #: transformers' Trainer gives ``num_items_in_batch`` to classes that say so, counted as for this kind of loss.
        self.accepts_loss_kwargs, self.loss_type = True, "ForCausalLM"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Cache | tuple[Tensors, ...] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: float | Tensor | None = None,
    ) -> CausalLMOutputWithCrossAttentions | tuple[Tensor, ...]:
        """Predict next words.

        ``labels`` int64 ``[B, S]`` are the ids of the text itself (they are shifted here), -100 where nothing is to be
        predicted; no cache is returned with them. The loss is the sum over words divided by ``num_items_in_batch``, a
        number or tensor of one, where a step has several batches; by default their mean.

        ``logits_to_keep`` gives the logits of so many tokens at the end, all with 0, or all but so many at the start
        with less; or of the places in an int64 tensor ``[n]``, ``[]`` or ``[B, n]``; or of those that a bool tensor
        ``[S]`` or ``[B, S]`` marks, in the latter case as ``[n, V]``. The other arguments are those of
        MegatronBertModel.
        """
        given = shared_arguments(locals())
        if labels is not None:
            given = replace(given, use_cache=False)
        if given.shape is not None:
            check_kept(logits_to_keep, *given.shape)
        items = _checked_items(num_items_in_batch)
        encoded = self.base_model.encode(given, needed=self.labeled(given, labels))
        loss = None
        hidden = encoded.rectangle(encoded.hidden)
        if labels is not None:
            following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
            loss = self.language_loss(hidden.flatten(0, 1), following.reshape(-1), items)
        kept = kept_states(hidden, logits_to_keep)
        output = CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=self.logits(kept.reshape(-1, kept.shape[-1])).unflatten(0, kept.shape[:-1]),
            past_key_values=encoded.past,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            cross_attentions=encoded.cross_attentions,
        )
        return self.returned(output, return_dict)

    def generate(self, *inputs: Any, **arguments: Any) -> Any:
        """Continue texts; arguments as of transformers' method.

        Raises:
            UserError: the model is not a decoder.
        """
        if not self.config.is_decoder:
            raise UserError("only decoders write text: set is_decoder=True in the configuration")
        if self.tp.size > 1:  # the first tensor rank's random numbers are those of all
            with torch.random.fork_rng():
                self._draw_alike()
                return super().generate(*inputs, **arguments)
        return super().generate(*inputs, **arguments)

    def _draw_alike(self) -> None:
        """Give every tensor rank the state of the first one's generator; on an accelerator, a seed from there."""
        assert self.tp.mesh is not None
        state = torch.get_rng_state().to(self.tp.mesh.device_type)
        dist.broadcast(state, group=self.tp.group, group_src=0)
        torch.set_rng_state(state.cpu())
        if self.device.type == "cuda":
            torch.cuda.manual_seed(self.fresh_seed())


def _checked_items(given: Any) -> float | None:
    """The number of words that a sum of losses is divided by, where there is one."""
    if given is None:
        return None
    held = isinstance(given, Tensor) and given.numel() == 1 and given.device.type != "meta"
    number = given.item() if held else given
    if not is_number(number) or not 0 <= number < math.inf:
        raise UserError(
            f"num_items_in_batch is {described(given)}: give the number of words that are counted in all batches"
        )
    return number
