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
from megatron_bert.family.checks import check_tensor, described
from megatron_bert.family.configuration import MegatronBertConfig
from megatron_bert.family.encoder import Tensors
from megatron_bert.family.language import MegatronBertLanguageModel
from megatron_bert.model.configuration_checks import is_number
from parallel.cross_entropy import IGNORED
from parallel.errors import UserError
from parallel.recording import values_unknown


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
            _check_kept(logits_to_keep, *given.shape)
        items = _checked_items(num_items_in_batch)
        encoded = self.base_model.encode(given, needed=self.labeled(given, labels))
        loss = None
        hidden = encoded.rectangle(encoded.hidden)
        if labels is not None:
            following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
            loss = self.language_loss(hidden.flatten(0, 1), following.reshape(-1), items)
        kept = _kept_states(hidden, logits_to_keep)
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


def _check_kept(kept: int | Tensor, batch: int, length: int) -> None:
    """Check what says which tokens' hidden states are kept; see :func:`_kept_states`.

    Raises:
        UserError: another kind of thing or shape, or places beyond the tokens.
    """
    if not isinstance(kept, Tensor):
        if not isinstance(kept, int):
            raise UserError(
                f"logits_to_keep is {described(kept)}: give a number of tokens, 0 for all, or a tensor of places"
            )
        return
    check_tensor("logits_to_keep", kept)
    shape = list(kept.shape)
    if kept.dtype == torch.bool:
        if shape not in ([length], [batch, length]):
            raise UserError(
                f"logits_to_keep has shape {shape} and type torch.bool, expected [{length}] or [{batch}, {length}]: "
                "say of every token whether it is kept"
            )
        return
    if kept.dtype not in (torch.int64, torch.int32) or kept.device.type == "meta":
        raise UserError(
            f"logits_to_keep is of type {kept.dtype} on {kept.device}: give int64 places, or bool for every token"
        )
    if len(shape) > 2 or (len(shape) == 2 and shape[0] != batch):
        raise UserError(f"logits_to_keep has shape {shape}, expected [places] or [{batch}, places]")
    if not values_unknown() and kept.numel():
        least, most = torch.stack(kept.aminmax()).tolist()
        if least < -length or most >= length:
            raise UserError(
                f"logits_to_keep holds places outside of {length} tokens: give 0 to {length - 1}, or -{length} to -1 "
                "counted from the end"
            )


def _kept_states(hidden: Tensor, kept: int | Tensor) -> Tensor:
    """The hidden states of some of the tokens.

    Args:
        hidden: ``[B, S, H]``.
        kept: how many tokens at the end, 0 for all, or less for all but so many at the start; or a tensor: places
            ``[n]`` in every sequence, ``[]`` the only one, ``[B, n]`` of each; or bool ``[S]`` or ``[B, S]``.

    Returns:
        ``[B, n, H]``; ``[B, H]`` of the only place; ``[n, H]`` of all tokens that bool ``[B, S]`` marks.
    """
    if not isinstance(kept, Tensor):
        return hidden[:, -kept:]
    if kept.dim() < 2:
        return hidden[:, kept]
    if kept.dtype == torch.bool:
        return hidden[kept]
    places = kept.to(hidden.device, torch.int64) % hidden.shape[1]
    return hidden.take_along_dim(places[..., None], dim=1)
