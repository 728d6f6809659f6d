# SPDX-License-Identifier: Apache-2.0
"""The encoder (or decoder) of any family of classes, and what heads go on from.

Shapes: B sequences, S tokens of each, T tokens without skipped padding, H hidden size, P cached tokens, E tokens of an
encoder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from megatron_bert.family.arguments import Arguments, TokenInputs, checked_head_masks, checked_inputs
from megatron_bert.family.cache import CachedLayer, encoder_length, new_cache, opened_cache
from megatron_bert.family.checks import checked_switch, promoted
from megatron_bert.family.configuration import DocumentedConfig
from megatron_bert.family.losses import blanked
from megatron_bert.family.masks import Mask, causal, read_mask, with_room
from megatron_bert.family.modules import Embeddings, LayerStack, PoolerLayer, dropout_prob
from megatron_bert.family.pretrained import DocumentedModel
from megatron_bert.model.requests import AttentionRequest, EncoderRequest, EncoderStates
from megatron_bert.model.sequences import SequenceLayout
from parallel.dropout import fold_in
from parallel.errors import UserError
from parallel.recording import values_unknown

Tensors = tuple[Tensor, ...]

#: Hooks of transformers and PEFT that let gradients reach adapters, whatever the shape.
_BLIND_HOOKS = {"make_inputs_require_grads", "make_inputs_require_grad"}


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What heads go on from.

    Attributes:
        hidden: ``[T, H]`` final hidden states.
        batch, length: B and S.
        kept: int64 ``[T]``, where each token stands in B * S, the longest sequence first; None when all are there.
        first: int64 ``[B]``, where each sequence starts in ``hidden``.
        dropout_keys: int64 ``[T]`` dropout keys for the head; None without dropout.
        hidden_states: as asked for, ``[B, S, H]`` each.
        attentions, cross_attentions, past: as asked for.
    """

    hidden: Tensor
    batch: int
    length: int
    kept: Tensor | None
    first: Tensor
    dropout_keys: Tensor | None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
    cross_attentions: Tensors | None = None
    past: Cache | None = None

    def rectangle(self, tokens: Tensor) -> Tensor:
        """``[T, ..]`` as ``[B, S, ..]``, 0 where padding was skipped."""
        return _rectangle(tokens, self.kept, self.batch, self.length)

    def blank(self) -> Encoded:
        """The same with hidden states of 0: see :func:`~megatron_bert.family.losses.blanked`."""
        return replace(self, hidden=blanked(self.hidden))

    def of_tokens(self, rectangle: Tensor) -> Tensor:
        """``[B, S]`` as ``[T]``."""
        flat = rectangle.reshape(-1)
        return flat if self.kept is None else flat.index_select(0, self.kept.to(flat.device))


def _rectangle(tokens: Tensor, kept: Tensor | None, batch: int, length: int) -> Tensor:
    if kept is None:
        return tokens.unflatten(0, (batch, length))
    filled = tokens.new_zeros((batch * length, *tokens.shape[1:]))
    return filled.index_copy(0, kept.to(tokens.device), tokens).unflatten(0, (batch, length))


def _shown(kept: Tensor | None, batch: int, length: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states as they are returned, and from these the hidden states to go on from."""
    shown = _rectangle(hidden, kept, batch, length)
    flat = shown.flatten(0, 1)
    return shown, flat if kept is None else flat.index_select(0, kept.to(flat.device))


class EncoderModel(DocumentedModel):
    """Hidden states of every token, and the pooled first token of every sequence.

    Args:
        config: sizes and options; a decoder where it says so.
        add_pooling_layer: whether there is a pooler (dense and tanh on the first token).
        skip_padding: whether tokens that the attention mask leaves out are skipped: their hidden states are then 0, and
            a batch costs what its real tokens cost. None skips them where no output shows them, which changes nothing
            but time, and in training steps of masked words and token classes, whose loss and gradients stay the same;
            False never does.
        **options: as of DocumentedModel.

    Raises:
        UserError: sizes that the tensor-parallel size does not divide.
    """

    def __init__(self, config: DocumentedConfig, add_pooling_layer: bool = True, **options: Any) -> None:
        super().__init__(config, pooled=checked_switch("add_pooling_layer", add_pooling_layer), **options)

    def build(self, **parts: Any) -> None:
        """Make the modules."""
        self.embeddings = Embeddings(self.sizes, self.tp)
        self.encoder = LayerStack(self.sizes, self.config.hidden_act, self.tp)
        self.pooler = PoolerLayer(self.sizes) if parts["pooled"] else None

    def output(
        self, given: Arguments, return_dict: bool | None
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple[Tensor | None, ...]:
        """What forward returns for the arguments."""
        encoded = self.encode(given)
        last = encoded.hidden_states[-1] if encoded.hidden_states else encoded.rectangle(encoded.hidden)
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=last,
            pooler_output=None if self.pooler is None else self.pooler(last[:, 0]),
            past_key_values=encoded.past,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            cross_attentions=encoded.cross_attentions,
        )
        if self.wants(return_dict, "return_dict"):
            return output
        # The second place is the pooler's, whether there is one or not; in a tuple the cache comes before the states.
        rest: tuple[Any, ...] = (encoded.past, encoded.hidden_states, encoded.attentions, encoded.cross_attentions)
        return (output.last_hidden_state, output.pooler_output, *(part for part in rest if part is not None))

    def pooled(self, encoded: Encoded) -> Tensor:
        """``[B, H]`` of the first tokens."""
        assert self.pooler is not None, "a class with a pooled head has a pooler"
        return self.pooler(encoded.hidden.index_select(0, encoded.first))

    def encode(
        self, given: Arguments, *, shown: bool = True, needed: Tensor | None = None, dropout: nn.Module | None = None
    ) -> Encoded:
        """Check the arguments and run the encoder.

        Args:
            shown: whether the caller returns something of padding that may be used.
            needed: bool ``[B, S]``, tokens that must not be skipped (they have labels).
            dropout: the dropout module of a head.
        """
        config = self.config
        cache = None if given.shape is None else opened_cache(given.past_key_values, self, given.shape[0])
        keeps = self._keeps_cache(given, cache)
        past = 0 if cache is None else int(cache.get_seq_length())
        inputs = checked_inputs(given, config, self.sizes, past)
        if inputs.embedded is not None:
            inputs = replace(inputs, embedded=promoted("inputs_embeds", inputs.embedded, self.dtype))
        if cache is None and keeps:
            cache = new_cache(self)
        total = past + inputs.length
        room = total if cache is None else cache.get_mask_sizes(inputs.length, 0)[0]
        given = replace(given, attention_mask=with_room(given.attention_mask, inputs.batch, total, room, inputs.device))
        mask = read_mask(
            "attention_mask", given.attention_mask, (inputs.batch, config.num_attention_heads, inputs.length, room)
        )
        asked = self._asked(given, inputs, mask, room, cache)
        hidden_states = self.wants(given.output_hidden_states, "output_hidden_states")
        dropout_keys = self._dropout_keys(inputs, dropout)
        kept = None
        first = torch.arange(inputs.batch, device=inputs.device) * inputs.length
        layout = SequenceLayout.rectangle(inputs.batch, inputs.length, mask.keys)
        drops = dropout_keys is not None
        if asked is None and self._skips(mask, shown or hidden_states, needed, drops):
            assert mask.keys is not None
            lengths, order = mask.keys.sum(1).sort(descending=True, stable=True)
            row, column = mask.keys[order].nonzero(as_tuple=True)
            kept = order[row] * inputs.length + column
            inputs = _without_padding(inputs, kept)
            dropout_keys = None if dropout_keys is None else dropout_keys.index_select(0, kept)
            layout = SequenceLayout.packed(lengths, int(lengths[0]))
            assert layout.boundaries is not None
            first = torch.empty_like(order).index_copy_(0, order, layout.boundaries[:-1].long())
        if kept is None and inputs.tokens is not None:  # hooks on word embeddings see sequences
            inputs = replace(inputs, tokens=inputs.tokens.unflatten(0, (inputs.batch, inputs.length)))
        hidden = self.embeddings(inputs.tokens, inputs.positions, inputs.types, dropout_keys, inputs.embedded)
        batch, length = inputs.batch, inputs.length
        show = partial(_shown, kept, batch, length) if hidden_states else None
        out = self.encoder(hidden, layout, dropout_keys, EncoderRequest(layers=asked, shown=show))
        device = out.hidden.device  # of the last layer, where a device map divides the layers
        return Encoded(
            hidden=out.hidden,
            batch=batch,
            length=length,
            kept=None if kept is None else kept.to(device),
            first=first.to(device),
            dropout_keys=None
            if dropout_keys is None
            else fold_in(dropout_keys, 1 + self.config.num_hidden_layers).to(device),
            hidden_states=out.hidden_states or None,
            attentions=out.attentions or None,
            cross_attentions=out.cross_attentions or None,
            past=cache,
        )

    def _asked(
        self, given: Arguments, inputs: TokenInputs, mask: Mask, room: int, cache: Cache | None
    ) -> tuple[AttentionRequest, ...] | None:
        """What each layer is asked; None where their attention is plain."""
        config = self.config
        probabilities = self.wants(given.output_attentions, "output_attentions")
        encoder = self._encoder_states(given, inputs, cache)
        head_masks = None
        if given.head_mask is not None:
            attended = {room} | ({encoder.length} if encoder is not None else set())
            head_masks = checked_head_masks(given.head_mask, config, self.dtype, inputs.batch, inputs.length, attended)
        pairs = given.attention_mask is not None and given.attention_mask.dim() > 2
        decoder = getattr(config, "is_decoder", False)
        written = config._attn_implementation == "eager"
        if not (probabilities or head_masks or decoder or cache or mask.unattended or pairs or written):
            return None
        if decoder:
            mask = causal(mask, given.attention_mask, inputs.past, inputs.length, room, inputs.device)
        attention = AttentionRequest(
            mask=mask.full,
            unattended=mask.unattended or written,
            probabilities=probabilities,
            first=inputs.past,
            encoder=encoder,
        )
        layers = [attention] * config.num_hidden_layers
        if head_masks is not None:
            layers = [replace(asked, head_mask=own) for asked, own in zip(layers, head_masks, strict=True)]
        if cache is not None:
            layers = [replace(asked, memory=CachedLayer(cache, number)) for number, asked in enumerate(layers)]
        return tuple(layers)

    def _keeps_cache(self, given: Arguments, cache: Cache | None) -> bool:
        for name, value in (("use_cache", given.use_cache), ("past_key_values", cache)):
            if value and self._recomputes():
                raise UserError(f"{name} does not go with gradient checkpointing in training: leave one of them out")
        if not getattr(self.config, "is_decoder", False):
            if given.use_cache:
                raise UserError("use_cache is given, but only decoders keep keys and values: set is_decoder=True")
            return False
        return self.wants(given.use_cache, "use_cache") and not self._recomputes()

    def _recomputes(self) -> bool:
        """Whether layers are computed again in the backward pass; the last question goes to every module."""
        return self.training and torch.is_grad_enabled() and self.is_activation_checkpointing

    def _encoder_states(self, given: Arguments, inputs: TokenInputs, cache: Cache | None) -> EncoderStates | None:
        states = given.encoder_hidden_states
        length = encoder_length(cache)
        if states is None and length is None:
            if given.encoder_attention_mask is not None:
                raise UserError("encoder_attention_mask is given without encoder_hidden_states, which it is a mask of")
            return None
        if not getattr(self.config, "add_cross_attention", False):
            raise UserError(
                "encoder_hidden_states is given, but the model has no cross-attention: set add_cross_attention"
            )
        if states is not None and (states.dim() != 3 or states.shape[::2] != (inputs.batch, self.config.hidden_size)):
            raise UserError(
                f"encoder_hidden_states has shape {list(states.shape)}, expected [{inputs.batch}, tokens, "
                f"{self.config.hidden_size}]"
            )
        if states is not None and states.shape[1] == 0:
            raise UserError("encoder_hidden_states has no tokens: give at least one to attend to")
        if states is not None and length is None:
            hidden, length = promoted("encoder_hidden_states", states, self.dtype).flatten(0, 1), states.shape[1]
        else:
            hidden = None
        assert length is not None
        if self.config.position_embedding_type != "absolute" and length > self.config.max_position_embeddings:
            raise UserError(
                f"encoder_hidden_states has {length} tokens, but there are relative positions for "
                f"{self.config.max_position_embeddings}: shorten it"
            )
        shape = (inputs.batch, self.config.num_attention_heads, inputs.length, length)
        mask = read_mask("encoder_attention_mask", given.encoder_attention_mask, shape)
        return EncoderStates(hidden=hidden, length=length, mask=mask.full, unattended=mask.unattended)

    def _skips(self, mask: Mask, shown: bool, needed: Tensor | None, drops: bool) -> bool:
        """Whether padding is skipped."""
        if values_unknown():  # how many tokens count is not known
            return False
        if mask.keys is None or self.skip_padding is False or not (self.embeddings.absolute and mask.starts):
            return False
        if (shown and self.skip_padding is None) or _sees_sequences(self.embeddings.word_embeddings):
            return False
        if needed is not None and bool((needed & ~mask.keys).any()):
            return False
        # Attention probabilities are dropped by the place of the key in its sequence, which must stay what it is.
        drops = drops and not mask.keys.is_cuda and any(layer.attention.dropout_prob for layer in self.layer_list())
        return not (drops and bool((mask.keys[:, 1:] & ~mask.keys[:, :-1]).any()))

    def _dropout_keys(self, inputs: TokenInputs, dropout: nn.Module | None) -> Tensor | None:
        """int64 ``[B * S]``: a key for each token, from a fresh seed and its place in the batch alone."""
        of_head = 0.0 if dropout is None else dropout_prob(dropout)
        if not (of_head or self.embeddings.dropout_prob or any(layer.drops() for layer in self.layer_list())):
            return None
        seed = torch.randint(1 << 62, (1,), device=inputs.device)
        if self.tp.size > 1:
            dist.broadcast(seed, group=self.tp.group, group_src=0)
        rows = torch.arange(inputs.batch, device=inputs.device)[:, None]
        columns = torch.arange(inputs.past, inputs.past + inputs.length, device=inputs.device)
        return fold_in(fold_in(rows, seed), columns).flatten()


class HeadModel(DocumentedModel):
    """An encoder under the family's name for it, for a head to go on from; arguments as of DocumentedModel."""

    encoder_class: ClassVar[type[EncoderModel]]
    #: Whether the encoder has a pooler.
    pooled: ClassVar[bool] = True

    def build(self, **parts: Any) -> None:
        """Make the encoder."""
        pooled = parts.get("pooled", self.pooled)
        encoder = self.encoder_class(
            self.config, pooled, tp=self.tp, skip_padding=self._skip_padding, initial=False, device=None
        )
        self.add_module(self.base_model_prefix, encoder)

    def learns_from(self, labels: Tensor | None) -> bool:
        """Whether this is a training step, of which only the loss is of use, not what the head gives at padding."""
        return self.training and labels is not None


def _sees_sequences(words: nn.Module) -> bool:
    """Whether word embeddings have hooks, which expect a rectangle; those that do not look at what passes aside."""
    of_modules = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = (hook for part in words.modules() for kind in of_modules for hook in getattr(part, kind).values())
    return any(
        getattr(hook, "__name__", "") not in _BLIND_HOOKS
        and not str(getattr(hook, "__module__", "")).startswith("torch.distributed.")
        for hook in hooks
    )


def _without_padding(inputs: TokenInputs, kept: Tensor) -> TokenInputs:
    given = {name: getattr(inputs, name) for name in ("tokens", "embedded", "positions", "types")}
    packed: Any = {name: t.index_select(0, kept) for name, t in given.items() if t is not None}
    return replace(inputs, **packed)
