"""The encoder (or decoder) of any family of classes, and what heads go on from.

Shapes: B sequences, S tokens of each, T tokens without skipped padding, H hidden size, P cached tokens, E tokens of an
encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert.family.arguments import Arguments, TokenInputs, checked_head_masks, checked_inputs
from megatron_bert.family.cache import KeyValueCache, checked_cache
from megatron_bert.family.kinds import check_device, checked_switch, widened
from megatron_bert.family.losses import blanked
from megatron_bert.family.masks import Mask, causal, read_mask
from megatron_bert.family.outputs import BaseModelOutputWithPoolingAndCrossAttentions, Tensors
from megatron_bert.family.pretrained import PreTrainedModel
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.encoder import BertEmbeddings, Encoder
from megatron_bert.model.heads import Pooler
from megatron_bert.model.requests import AttentionRequest, EncoderOutput, EncoderRequest, EncoderStates
from megatron_bert.model.sequences import SequenceLayout
from parallel.dropout import fold_in
from parallel.errors import UserError
from parallel.mesh import SINGLE, TensorParallel


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What heads go on from.

    Attributes:
        hidden: ``[T, H]`` final hidden states.
        batch, length: B and S.
        kept: int64 ``[T]``, where each token stands in B * S, the longest sequence first; None when all are there.
        first: int64 ``[B]``, where each sequence starts in ``hidden``.
        keys: int64 ``[T]`` dropout keys for the head; None without dropout.
        hidden_states: as asked for, ``[B, S, H]`` each.
        attentions, cross_attentions, past: as asked for.
    """

    hidden: Tensor
    batch: int
    length: int
    kept: Tensor | None
    first: Tensor
    keys: Tensor | None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
    cross_attentions: Tensors | None = None
    past: KeyValueCache | None = None

    def rectangle(self, tokens: Tensor) -> Tensor:
        """``[T, ..]`` as ``[B, S, ..]``, 0 where padding was skipped."""
        return _rectangle(tokens, self.kept, self.batch, self.length)

    def blank(self) -> Encoded:
        """The same with hidden states of 0: see :func:`~megatron_bert.family.losses.blanked`."""
        return replace(self, hidden=blanked(self.hidden))

    def of_tokens(self, rectangle: Tensor) -> Tensor:
        """``[B, S]`` as ``[T]``."""
        flat = rectangle.reshape(-1)
        return flat if self.kept is None else flat.index_select(0, self.kept)


def _rectangle(tokens: Tensor, kept: Tensor | None, batch: int, length: int) -> Tensor:
    if kept is None:
        return tokens.unflatten(0, (batch, length))
    filled = tokens.new_zeros((batch * length, *tokens.shape[1:]))
    return filled.index_copy(0, kept, tokens).unflatten(0, (batch, length))


class EncoderModel(PreTrainedModel):
    """Hidden states of every token, and the pooled first token of every sequence.

    Args:
        config: sizes and options; a decoder where it says so.
        add_pooling_layer: whether there is a pooler (dense and tanh on the first token).
        tp: the tensor-parallel handle; every rank gives the same arguments and gets the same results.
        skip_padding: whether tokens that the attention mask leaves out are skipped: their hidden states are then 0, and
            a batch costs what its real tokens cost. None skips them where no output shows them, which changes nothing
            but time, and in training steps of masked words and token classes, whose loss and gradients stay the same;
            False never does.
        initial: draw initial weights, from torch's generator; otherwise they hold no values until a checkpoint gives
            them.
        device: of the parameters.

    Raises:
        UserError: sizes that the tensor-parallel size does not divide.
    """

    own_arguments = ("add_pooling_layer",)

    def __init__(
        self,
        config: MegatronBertConfig,
        add_pooling_layer: bool = True,
        *,
        tp: TensorParallel = SINGLE,
        skip_padding: bool | None = None,
        initial: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config, tp, skip_padding)
        check_device(device)
        self.embeddings = BertEmbeddings(
            config, tp=tp, padding=config.pad_token_id, position_padding=config.padding_position, device=device
        )
        self.encoder = Encoder(config, tp=tp, device=device)
        self.pooler: Pooler | None = None
        if checked_switch("add_pooling_layer", add_pooling_layer):
            size = config.hidden_size
            self.pooler = Pooler(size, size, init_std=config.initializer_range, device=device)
        for layer, heads in (config.pruned_heads or {}).items():
            self.encoder.layer_list()[layer].attention.prune(heads)
        self._begin(checked_switch("initial", initial))

    def output(
        self, given: Arguments, return_dict: bool | None
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple[Tensor | None, ...]:
        """What forward returns for the arguments."""
        encoded = self.encode(given)
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=encoded.rectangle(encoded.hidden),
            pooler_output=None if self.pooler is None else self.pooled(encoded),
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

    def encode(self, given: Arguments, *, shown: bool = True, needed: Tensor | None = None) -> Encoded:
        """Check the arguments and run the encoder.

        Args:
            given: by the caller.
            shown: whether the caller returns something of padding that may be used.
            needed: bool ``[B, S]``, tokens that must not be skipped (they have labels).
        """
        config = self.config
        past = None
        if given.shape is not None:
            past = checked_cache(given.past_key_values, self, given.shape[0])
        inputs = checked_inputs(given, config, 0 if past is None else past.get_seq_length())
        if inputs.embedded is not None:
            inputs = replace(inputs, embedded=widened("inputs_embeds", inputs.embedded, self.dtype))
        total = inputs.past + inputs.length
        mask = read_mask("attention_mask", given.attention_mask, inputs.batch, inputs.length, total)
        request = self._request(given, inputs, mask, past)
        keys = self._dropout_keys(inputs)
        kept = None
        first = torch.arange(0, inputs.batch * inputs.length, inputs.length, device=inputs.device)
        layout = SequenceLayout.rectangle(inputs.batch, inputs.length, mask.keys)
        if request.attention is None and self._skips(mask, shown or request.hidden_states, needed):
            assert mask.keys is not None
            lengths, order = mask.keys.sum(1).sort(descending=True, stable=True)
            row, column = mask.keys[order].nonzero(as_tuple=True)
            kept = order[row] * inputs.length + column
            inputs, keys = _without_padding(inputs, keys, kept)
            layout = SequenceLayout.packed(lengths, int(lengths[0]))
            assert layout.boundaries is not None
            first = torch.empty_like(order).index_copy_(0, order, layout.boundaries[:-1].long())
        hidden = self.embeddings(inputs.tokens, inputs.positions, inputs.types, keys, inputs.embedded)
        plain = request.attention is None and not request.hidden_states
        out = self.encoder(hidden, layout, keys, None if plain else request)
        out = EncoderOutput(hidden=out) if plain else out
        batch, length = inputs.batch, inputs.length
        return Encoded(
            hidden=out.hidden,
            batch=batch,
            length=length,
            kept=kept,
            first=first,
            keys=None if keys is None else fold_in(keys, 1 + self.config.num_hidden_layers),
            hidden_states=tuple(_rectangle(state, kept, batch, length) for state in out.hidden_states) or None,
            attentions=out.attentions or None,
            cross_attentions=out.cross_attentions or None,
            past=KeyValueCache(out.past) if out.past else None,
        )

    def _request(self, given: Arguments, inputs: TokenInputs, mask: Mask, past: KeyValueCache | None) -> EncoderRequest:
        """What the layers are asked; plain attention needs no request of its own."""
        config = self.config
        probabilities = self.wants(given.output_attentions, "output_attentions")
        hidden_states = self.wants(given.output_hidden_states, "output_hidden_states")
        keep = self._keeps_cache(given)
        encoder = self._encoder_states(given, inputs, past)
        attended = {inputs.past + inputs.length} | ({encoder.length} if encoder is not None else set())
        head_masks = checked_head_masks(given.head_mask, config, self.dtype, inputs.batch, inputs.length, attended)
        pairs = given.attention_mask is not None and given.attention_mask.dim() == 3
        plain = not (probabilities or head_masks or config.is_decoder or mask.unattended or pairs)
        if plain:
            return EncoderRequest(hidden_states=hidden_states)
        if config.is_decoder:
            mask = causal(mask, given.attention_mask, inputs.length, inputs.past + inputs.length, inputs.device)
        attention = AttentionRequest(
            mask=mask.full,
            unattended=mask.unattended,
            probabilities=probabilities,
            keep=keep,
            encoder=encoder,
        )
        return EncoderRequest(hidden_states=hidden_states, attention=attention, head_masks=head_masks, past=past)

    def _keeps_cache(self, given: Arguments) -> bool:
        if not self.config.is_decoder:
            if given.use_cache:
                raise UserError("use_cache is given, but only decoders keep keys and values: set is_decoder=True")
            return False
        recomputes = self.is_gradient_checkpointing and self.training and torch.is_grad_enabled()
        if recomputes and given.use_cache:
            raise UserError("use_cache does not go with gradient checkpointing in training: leave one of them out")
        return self.wants(given.use_cache, "use_cache") and not recomputes

    def _encoder_states(
        self, given: Arguments, inputs: TokenInputs, past: KeyValueCache | None
    ) -> EncoderStates | None:
        states = given.encoder_hidden_states
        cached = past is not None and len(past[0]) == 4
        if states is None and not cached:
            if given.encoder_attention_mask is not None:
                raise UserError("encoder_attention_mask is given without encoder_hidden_states, which it is a mask of")
            return None
        if not self.config.add_cross_attention:
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
        length = past[0][2].shape[2] if cached and past is not None else states.shape[1]  # type: ignore[union-attr]
        if self.config.position_embedding_type != "absolute" and length > self.config.max_position_embeddings:
            raise UserError(
                f"encoder_hidden_states has {length} tokens, but there are relative positions for "
                f"{self.config.max_position_embeddings}: shorten it"
            )
        mask = read_mask("encoder_attention_mask", given.encoder_attention_mask, inputs.batch, inputs.length, length)
        return EncoderStates(
            hidden=None
            if cached or states is None
            else widened("encoder_hidden_states", states, self.dtype).flatten(0, 1),
            length=length,
            mask=mask.full,
            unattended=mask.unattended,
        )

    def _skips(self, mask: Mask, shown: bool, needed: Tensor | None) -> bool:
        """Whether padding is skipped."""
        if mask.keys is None or self.skip_padding is False or not (self.embeddings.absolute and mask.starts):
            return False
        if shown and self.skip_padding is None:
            return False
        if needed is not None and bool((needed & ~mask.keys).any()):
            return False
        # Attention probabilities are dropped by the place of the key in its sequence, which must stay what it is.
        keyed = self.training and self.config.attention_probs_dropout_prob > 0.0 and not mask.keys.is_cuda
        return not (keyed and bool((mask.keys[:, 1:] & ~mask.keys[:, :-1]).any()))

    def _dropout_keys(self, inputs: TokenInputs) -> Tensor | None:
        """int64 ``[B * S]``: a key for each token, from a fresh seed and its place in the batch alone."""
        config = self.config
        chances = (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.classifier_dropout)
        if not self.training or not any(chances):
            return None
        seed = torch.randint(1 << 62, (1,), device=inputs.device)
        if self.tp.size > 1:
            dist.broadcast(seed, group=self.tp.group, group_src=0)
        rows = torch.arange(inputs.batch, device=inputs.device)[:, None]
        columns = torch.arange(inputs.past, inputs.past + inputs.length, device=inputs.device)
        return fold_in(fold_in(rows, seed), columns).flatten()


def _without_padding(inputs: TokenInputs, keys: Tensor | None, kept: Tensor) -> tuple[TokenInputs, Tensor | None]:
    take: Callable[[Tensor], Tensor] = lambda tensor: tensor.index_select(0, kept)  # noqa: E731
    packed = replace(
        inputs,
        tokens=None if inputs.tokens is None else take(inputs.tokens),
        embedded=None if inputs.embedded is None else take(inputs.embedded),
        positions=take(inputs.positions),
        types=take(inputs.types),
    )
    return packed, None if keys is None else take(keys)
