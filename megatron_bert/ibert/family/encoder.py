# SPDX-License-Identifier: Apache-2.0
"""IBertModel: the encoder without a head.

Shapes: B sequences, S tokens of each, H hidden size.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from megatron_bert.convert.huggingface_names import IBERT
from megatron_bert.convert.ranges import RANGES_NAME
from megatron_bert.family.arguments import shared_arguments
from megatron_bert.family.encoder import EncoderModel, HeadModel
from megatron_bert.family.files import file_beside, stored_tensors
from megatron_bert.family.pretrained import DocumentedModel
from megatron_bert.ibert.family.configuration import IBertConfig
from megatron_bert.ibert.family.quantized import blank_buffer, follow_training, read_their_ranges, their_ranges
from megatron_bert.ibert.family.ranges import load_ranges, save_ranges
from megatron_bert.ibert.quantization import is_quantized, quantize_model, quantizers
from megatron_bert.ibert.settings import QuantizationConfig


class IBertPreTrainedModel(DocumentedModel):
    """The base of every I-BERT class."""

    base_model_prefix = "ibert"
    config: IBertConfig
    config_class = IBertConfig
    names = IBERT
    layer_norm_placement = "post"
    #: What transformers' quantized layers keep.
    _keys_to_ignore_on_load_unexpected: ClassVar = [
        *DocumentedModel._keys_to_ignore_on_load_unexpected,
        *(rf"\.{name}$" for name in sorted(IBERT.buffers)),
    ]

    @property
    def quant_mode(self) -> bool:
        """Whether the model computes in integers."""
        return is_quantized(self)

    def post_init(self) -> None:
        """Draw initial weights, and quantize them with quant_mode; otherwise a checkpoint comes first."""
        super().post_init()
        if self._initial and self.config.quant_mode and self.device.type != "meta":
            self._quantize()

    def _quantize(self) -> None:
        quantize_model(self, QuantizationConfig(force_dequant=self.config.force_dequant))
        follow_training(self)

    def finish_loading(self, source: Any, arguments: dict[str, Any]) -> None:
        """With quant_mode: as the directory says, or with the ranges that transformers' layers have left there."""
        if not self.config.quant_mode:
            return
        if (found := file_beside(source, RANGES_NAME, arguments)) is not None:
            load_ranges(self, found.parent, force_dequant=self.config.force_dequant)
            follow_training(self)
            return
        self._quantize()
        read_their_ranges(self, stored_tensors(source, arguments))

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the model; its configuration says so if quantize_model has changed it."""
        found = [quantizer.settings for _, quantizer in quantizers(self)]
        before = self.config.quant_mode, self.config.force_dequant
        if found:
            self.config.quant_mode, self.config.force_dequant = True, found[0].force_dequant
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.config.quant_mode, self.config.force_dequant = before

    def save_beside(self, directory: Path) -> None:
        """Write the ranges of a quantized model; an older model's file is removed."""
        if self.quant_mode:
            save_ranges(self, directory)
        else:
            super().save_beside(directory)

    def extra_tensors(self) -> dict[str, Tensor]:
        """The ranges of a quantized model, as transformers' layers have them."""
        return their_ranges(self)

    def transformers_state_dict(self) -> dict[str, Tensor]:
        """What the class of transformers takes by ``load_state_dict``: its buffers too, which share a little memory.

        The ranges of a quantized model are among them; those that are not known are as its layers begin, and what they
        compute again in each pass is 0.
        """
        with torch.device("meta"):
            config = transformers.IBertConfig(**self.config.to_dict())
            theirs = getattr(transformers, type(self).__name__)(config).state_dict()
        blank = {name: torch.tensor(blank_buffer(name)).expand(tensor.shape) for name, tensor in theirs.items()}
        state = self.whole_state_dict() | self.extra_tensors()
        tied = {name: state[kept] for name, kept in self.all_tied_weights_keys.items() if name not in state}
        return blank | state | tied

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take over the ranges in a state of transformers' class; a quantized model keeps those that it has not."""
        theirs = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if any(self.names.is_range(key) for key in theirs):
            read_their_ranges(self, theirs)
            for name, quantizer in quantizers(self):
                state_dict.setdefault(f"{prefix}{name}.range", quantizer.range)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class IBertModel(IBertPreTrainedModel, EncoderModel):
    """Hidden states of every token, and the pooled first token of every sequence; arguments as of EncoderModel."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple[Tensor | None, ...]:
        """Encode a batch.

        Args:
            input_ids: int64 ``[B, S]``; this or ``inputs_embeds``.
            attention_mask: 1 for tokens that count: ``[B, S]``; or for pairs that may attend: ``[B, S, S]``, or
                ``[B, heads, S, S]``, there of floating point also as what is added to scores. B, heads and S may be 1.
            token_type_ids: int64 ``[B, S]`` or ``[1, S]``; 0 by default.
            position_ids: int64 ``[B, S]`` or ``[1, S]``. By default padding (by its id) has the position
                ``pad_token_id``, and other tokens are counted from the next; embeddings are all counted.
            head_mask: ``[heads]`` or ``[layers, heads]``; what the probabilities of a head are multiplied with.
            inputs_embeds: ``[B, S, H]``, in place of word embeddings.
            output_attentions, output_hidden_states, return_dict: by default what ``config`` says.

        Returns:
            The fields of the output; as a tuple without ``return_dict``.

        Raises:
            UserError: an argument of a wrong shape, or out of range.
        """
        return self.output(shared_arguments(locals()), return_dict)


class IBertHeadModel(IBertPreTrainedModel, HeadModel):
    """The base of the classes with a head, on an IBertModel."""

    encoder_class: ClassVar[type[EncoderModel]] = IBertModel
