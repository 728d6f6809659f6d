"""The class that predicts the next word, and writes text with it."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_bert.family.arguments import shared_arguments
from megatron_bert.family.bert import MegatronBertHeadModel
from megatron_bert.family.cache import KeyValueCache
from megatron_bert.family.generation import Sampling, generate
from megatron_bert.family.kept import check_kept, kept_states
from megatron_bert.family.kinds import checked_switch, told
from megatron_bert.family.language import LanguageModel
from megatron_bert.family.outputs import CausalLMOutputWithCrossAttentions, Tensors
from megatron_bert.model.configuration import MegatronBertConfig
from parallel.cross_entropy import IGNORED
from parallel.errors import UserError
from parallel.mesh import SINGLE, TensorParallel


class MegatronBertForCausalLM(MegatronBertHeadModel, LanguageModel):
    """Logits of the next word after every token; ``config.is_decoder`` makes tokens see only those before them.

    Args:
        config: sizes and options.
        tp, skip_padding, initial, device: as in MegatronBertModel.
    """

    #: transformers' Trainer gives ``num_items_in_batch`` to classes that say so, counted as for this kind of loss.
    accepts_loss_kwargs: ClassVar[bool] = True
    loss_type: ClassVar[str] = "ForCausalLM"

    def __init__(
        self,
        config: MegatronBertConfig,
        *,
        tp: TensorParallel = SINGLE,
        skip_padding: bool | None = None,
        initial: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        if not config.is_decoder:
            warnings.warn("MegatronBertForCausalLM sees the words it predicts unless is_decoder=True", stacklevel=2)
        super().__init__(config, False, tp, skip_padding, device)
        self._begin(initial)

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
        past_key_values: KeyValueCache | tuple[Tensors, ...] | None = None,
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
        encoded = self.base_model.encode(given, needed=self.labelled(given, labels))
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

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float | None = 1.0,
        top_k: int | None = 0,
        top_p: float | None = 1.0,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
        eos_token_id: int | list[int] | Tensor | None = None,
        pad_token_id: int | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Continue texts, word by word.

        Args:
            input_ids: int64 ``[B, S]``; shorter texts have their padding on the left.
            attention_mask: ``[B, S]``, 0 for padding.
            max_new_tokens: most words to write.
            do_sample: draw words by their probability; otherwise the most likely one is taken.
            temperature: the logits are divided by it before drawing; None leaves them.
            top_k: draw from this many most likely words; 0 or None from all.
            top_p: draw from the fewest most likely words whose probability together reaches this; None from all.
            generator: to draw with; torch's own by default.
            use_cache: keep keys and values instead of computing them anew for each word.
            eos_token_id: ids that end a text; those of the configuration by default.
            pad_token_id: what follows the end; that of the configuration by default.
            encoder_hidden_states, encoder_attention_mask: for cross-attention.

        Returns:
            int64 ``[B, S + n]``: the texts given, continued.

        Raises:
            UserError: an argument out of range, padding on the right, or a model that is no decoder.
        """
        ends = _word_ids(self.config.eos_token_id if eos_token_id is None else eos_token_id)
        padding = self.config.pad_token_id if pad_token_id is None else pad_token_id
        if padding is None:
            padding = ends[0] if ends else 0  # nothing follows an end that there is not
        if type(padding) is not int or not 0 <= padding < self.config.vocab_size:
            raise UserError(f"pad_token_id is {told(padding)}: give an id of 0 to {self.config.vocab_size - 1}")
        sampling = Sampling(
            sample=checked_switch("do_sample", do_sample),
            temperature=1.0 if temperature is None else temperature,
            top_k=0 if top_k is None else top_k,
            top_p=1.0 if top_p is None else top_p,
            generator=generator,
        )
        return generate(
            self,
            input_ids,
            attention_mask,
            sampling,
            most=max_new_tokens,
            ends=ends,
            padding=padding,
            cached=checked_switch("use_cache", use_cache),
            encoder={
                "encoder_hidden_states": encoder_hidden_states,
                "encoder_attention_mask": encoder_attention_mask,
            },
        )


def _word_ids(given: Any) -> list[int]:
    """Ids that end a text: one, several or none."""
    ids = given.reshape(-1).tolist() if isinstance(given, Tensor) else given
    ids = [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]
    if not all(type(each) is int for each in ids):
        raise UserError(f"eos_token_id is {told(given)}: give the id that ends a text, or a list of them")
    return ids


def _checked_items(given: Any) -> float | None:
    """The number of words that a sum of losses is divided by, where there is one."""
    if given is None:
        return None
    held = isinstance(given, Tensor) and given.numel() == 1 and given.device.type != "meta"
    number = given.item() if held else given
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < math.inf:
        raise UserError(
            f"num_items_in_batch is {told(given)}: give the number of words that are counted in all batches"
        )
    return number
