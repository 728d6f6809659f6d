"""The class that predicts the next word, and writes text with it."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from megatron_bert.family.arguments import shared_arguments
from megatron_bert.family.bert import MegatronBertHeadModel
from megatron_bert.family.cache import KeyValueCache
from megatron_bert.family.generation import Sampling, generate
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
    ) -> CausalLMOutputWithCrossAttentions | tuple[Tensor, ...]:
        """Predict next words.

        ``labels`` int64 ``[B, S]`` are the ids of the text itself (they are shifted here), -100 where nothing is to be
        predicted; no cache is returned with them. ``logits_to_keep`` gives the logits of the last tokens only, or of
        those at an int64 tensor of places; 0 gives all. The other arguments are those of MegatronBertModel.
        """
        given = shared_arguments(locals())
        if labels is not None:
            given = replace(given, use_cache=False)
        encoded = self.base_model.encode(given, needed=self.labelled(given, labels))
        loss = None
        hidden = encoded.rectangle(encoded.hidden)
        if labels is not None:
            following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
            loss = self.language_loss(hidden.flatten(0, 1), following.reshape(-1))
        _check_kept(logits_to_keep, hidden.shape[1])
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        output = CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=self.logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2]),
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
        temperature: float = 1.0,
        top_k: int | None = 0,
        top_p: float = 1.0,
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
            temperature: the logits are divided by it before drawing.
            top_k: draw from this many most likely words; 0 or None from all.
            top_p: draw from the fewest most likely words whose probability together reaches this.
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
        ends = self.config.eos_token_id if eos_token_id is None else eos_token_id
        if isinstance(ends, Tensor):
            ends = ends.reshape(-1).tolist()
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        padding = self.config.pad_token_id if pad_token_id is None else pad_token_id
        if padding is None:
            padding = ends[0] if ends else 0  # nothing follows an end that there is not
        return generate(
            self,
            input_ids,
            attention_mask,
            Sampling(sample=do_sample, temperature=temperature, top_k=top_k or 0, top_p=top_p, generator=generator),
            most=max_new_tokens,
            ends=ends,
            padding=padding,
            cached=use_cache,
            encoder={
                "encoder_hidden_states": encoder_hidden_states,
                "encoder_attention_mask": encoder_attention_mask,
            },
        )


def _check_kept(kept: int | Tensor, length: int) -> None:
    """Refuse places beyond the tokens, and negative numbers of them."""
    if isinstance(kept, Tensor):
        if kept.numel() and not torch.compiler.is_compiling() and not 0 <= int(kept.min()) <= int(kept.max()) < length:
            raise UserError(f"logits_to_keep holds places outside of {length} tokens: give 0 to {length - 1}")
    elif kept < 0:
        raise UserError(f"logits_to_keep is {kept}: give how many tokens at the end to keep, or 0 for all")
