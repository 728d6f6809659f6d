# SPDX-License-Identifier: Apache-2.0
"""What a forward pass is given, checked: every mistake is named before anything is computed.

Shapes: B sequences, S tokens of each, P tokens in the cache, E tokens of the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from megatron_bert.family.checks import check_tensor, check_whole, checked_switch, computing_device
from megatron_bert.family.configuration import SWITCHES, DocumentedConfig
from megatron_bert.model.configuration import EncoderConfig
from parallel.errors import UserError
from parallel.recording import values_unknown

_LABELS = ("labels", "next_sentence_label", "start_positions", "end_positions")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The arguments that all classes share, as the caller gives them; see MegatronBertModel.forward."""

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    token_type_ids: Tensor | None = None
    position_ids: Tensor | None = None
    head_mask: Tensor | None = None
    inputs_embeds: Tensor | None = None
    encoder_hidden_states: Tensor | None = None
    encoder_attention_mask: Tensor | None = None
    past_key_values: Any = None
    use_cache: bool | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None

    @property
    def either(self) -> Tensor | None:
        """Token ids, or else embeddings: what says how many sequences and tokens there are."""
        return self.input_ids if self.input_ids is not None else self.inputs_embeds

    @property
    def shape(self) -> tuple[int, int] | None:
        """B and S as they are given; None where they are not."""
        either = self.either
        return None if either is None or either.dim() < 2 else (either.shape[0], either.shape[1])


_SHARED = {field.name for field in fields(Arguments)}
_TENSORS = (_SHARED - {"past_key_values", *SWITCHES}).union(_LABELS)


def shared_arguments(given: dict[str, Any]) -> Arguments:
    """Those of a forward method's arguments that all classes share, once all of its arguments are of the right kind.

    Args:
        given: the arguments by name, and the model as ``self``.

    Raises:
        UserError: one that must be a tensor is none, or a sparse, nested or complex one, or on another device than the
            model; or one that must be true or false is neither.
    """
    device = computing_device(given["self"])
    for name, value in given.items():
        if value is not None and name in _TENSORS:
            check_tensor(name, value, device)
        elif value is not None and name in SWITCHES:
            checked_switch(name, value)
    return Arguments(**{name: value for name, value in given.items() if name in _SHARED})


@dataclass(frozen=True, kw_only=True)
class TokenInputs:
    """Checked inputs on a flat token axis, T = B * S.

    Attributes:
        batch, length: B and S.
        past: P.
        tokens: int64 ``[T]``, or None where embeddings are given.
        embedded: ``[T, H]``, or None where tokens are given.
        positions, types: int64 ``[T]``.
        device: of all of them.
    """

    batch: int
    length: int
    past: int
    tokens: Tensor | None
    embedded: Tensor | None
    positions: Tensor
    types: Tensor
    device: torch.device


def checked_inputs(given: Arguments, config: DocumentedConfig, sizes: EncoderConfig, past: int) -> TokenInputs:
    """Check ids, positions and types, after ``past`` tokens in the cache.

    Raises:
        UserError: a wrong shape or type, an id outside its table, or more positions than there are.
    """
    tokens, embedded = given.input_ids, given.inputs_embeds
    batch, length, device = _batch_shape(tokens, embedded, config)
    if given.position_ids is not None:
        positions = _of_tokens("position_ids", given.position_ids, batch, length)
    elif sizes.padding_position is not None:
        positions = _positions_after_padding(tokens, length, sizes, device)
    else:
        positions = torch.arange(past, past + length, device=device)[None]
    relative = config.position_embedding_type != "absolute"
    if relative or (given.position_ids is None and sizes.padding_position is None):
        _check_length(past + length, config.max_position_embeddings)
    if given.token_type_ids is None:
        types = torch.zeros((batch, length), dtype=torch.int64, device=device)
    else:
        types = _of_tokens("token_type_ids", given.token_type_ids, batch, length)
    tables: tuple[tuple[str, Any, str], ...] = (
        ("token_type_ids", types, "type_vocab_size"),
        ("position_ids", positions, "max_position_embeddings"),
        ("input_ids", tokens, "vocab_size"),
    )
    check_ranges(
        [(name, ids, getattr(config, rows), rows) for name, ids, rows in tables if getattr(given, name) is not None]
    )
    return TokenInputs(
        batch=batch,
        length=length,
        past=past,
        tokens=None if tokens is None else tokens.reshape(-1),
        embedded=None if embedded is None else embedded.flatten(0, 1),
        positions=positions.expand(batch, length).reshape(-1),
        types=types.reshape(-1),
        device=device,
    )


def _batch_shape(
    tokens: Tensor | None, embedded: Tensor | None, config: DocumentedConfig
) -> tuple[int, int, torch.device]:
    """B, S and the device of what is given, of which there must be one."""
    if tokens is not None and embedded is None:
        check_whole("input_ids", tokens)
        if tokens.dim() != 2:
            raise UserError(f"input_ids has shape {list(tokens.shape)}, expected [batch, tokens]")
        batch, length = tokens.shape
        device = tokens.device
    elif embedded is not None and tokens is None:
        if embedded.dim() != 3 or embedded.shape[2] != config.hidden_size:
            raise UserError(
                f"inputs_embeds has shape {list(embedded.shape)}, expected [batch, tokens, {config.hidden_size}]"
            )
        batch, length, _ = embedded.shape
        device = embedded.device
    else:
        both = "both are" if tokens is not None else "neither is"
        raise UserError(f"a forward pass takes either input_ids or inputs_embeds, but {both} given")
    if batch == 0 or length == 0:
        raise UserError(f"the batch is empty ({batch} sequences of {length} tokens): give at least one token")
    return batch, length, device


def _of_tokens(name: str, given: Tensor, batch: int, length: int) -> Tensor:
    """Numbers of tokens, ``[B, S]`` or what broadcasts to it, as ``[B, S]``."""
    check_whole(name, given)
    try:
        return given.expand(batch, length)
    except RuntimeError:
        raise UserError(
            f"{name} has shape {list(given.shape)}, expected [{batch}, {length}] or [1, {length}]"
        ) from None


def _positions_after_padding(tokens: Tensor | None, length: int, sizes: EncoderConfig, device: torch.device) -> Tensor:
    """Each real token's place among the real tokens, after the position of padding, where padding stays.

    Embeddings do not tell which are padding: they count all.
    """
    places, first = sizes.longest_sequence, sizes.first_position
    if tokens is None:
        _check_length(length, places)
        return torch.arange(first, first + length, device=device)[None]
    real = tokens != sizes.pad_token_id
    counts = real.cumsum(dim=1)
    if length > places and not values_unknown():
        _check_length(int(counts[:, -1].max()), places)
    return counts * real + (first - 1)


def _check_length(tokens: int, positions: int) -> None:
    if tokens > positions:
        raise UserError(f"the sequences have {tokens} tokens, but the model has {positions} positions: shorten them")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape.

    Raises:
        UserError: it has another.
    """
    if tuple(tensor.shape) != shape:
        raise UserError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")


def check_ranges(limits: list[tuple[str, Tensor, int, str]]) -> None:
    """Check that ids lie in their tables, waiting for the device once for all of them.

    Args:
        limits: name, ids, number of rows, and the name of the setting that says how many.

    Raises:
        UserError: one lies outside.
    """
    if not limits or values_unknown():
        return
    bounds = torch.stack([bound for _, ids, _, _ in limits for bound in ids.aminmax()]).tolist()
    for (name, _, rows, setting), least, most in zip(limits, bounds[::2], bounds[1::2], strict=True):
        if least < 0 or most >= rows:
            wrong = least if least < 0 else most
            raise UserError(f"{name} holds {wrong}, outside 0 to {rows - 1} ({setting} is {rows})")


def check_labels(name: str, labels: Tensor, shape: tuple[int, ...], classes: int, ignored: int | None = None) -> None:
    """Check class labels.

    Args:
        ignored: label that is not one of them, and allowed.

    Raises:
        UserError: wrong shape, type or range.
    """
    check_shape(name, labels, shape)
    check_whole(name, labels)
    counted = labels if ignored is None else labels.masked_fill(labels == ignored, 0)
    if labels.numel():
        check_ranges([(name, counted, classes, "the number of classes")])


def checked_head_masks(
    head_mask: Tensor, config: DocumentedConfig, dtype: torch.dtype, batch: int, queries: int, keys: set[int]
) -> tuple[Tensor, ...]:
    """A head mask for each layer, broadcastable to ``[B, heads, Q, K]``.

    Args:
        head_mask: ``[heads]``, ``[layers, heads]``, or ``[layers, 1 or B, heads, 1 or Q, 1 or K]``; 1 keeps a head.
        dtype: of the computation.
        keys: every K that heads attend to: the tokens, and those of an encoder.

    Raises:
        UserError: another shape.
    """
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    shape = tuple(head_mask.shape)
    allowed = ({layers}, {1, batch}, {heads}, {1, queries}, {1} | (keys if len(keys) == 1 else set()))
    if shape == (heads,):
        masks = head_mask[None, None, :, None, None].expand(layers, 1, heads, 1, 1)
    elif shape == (layers, heads):
        masks = head_mask[:, None, :, None, None]
    elif len(shape) == 5 and all(size in sizes for size, sizes in zip(shape, allowed, strict=True)):
        masks = head_mask
    else:
        attended = f"{min(keys)} or 1" if len(keys) == 1 else "1"
        raise UserError(
            f"head_mask has shape {list(shape)}, expected [{heads}] or [{layers}, {heads}] (layers, heads), or with "
            f"sequences, queries and keys [{layers}, {batch} or 1, {heads}, {queries} or 1, {attended}]"
        )
    return tuple(masks.to(dtype).unbind(0))
