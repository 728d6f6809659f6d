# SPDX-License-Identifier: Apache-2.0
"""Micro batches: what one forward pass takes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from megatron_bert.model.movable import Movable
from megatron_bert.model.sequences import SequenceLayout
from parallel.cross_entropy import IGNORED
from parallel.dropout import fold_in


@dataclass(frozen=True, kw_only=True)
class TokenBatch(Movable):
    """Sequences on a flat token axis.

    Attributes:
        tokens, positions, types: int64 ``[T]``.
        samples: int64 ``[T]``, number in the training stream of the sample each token belongs to.
        layout: which tokens belong together.
        first_tokens: int64 ``[B]``, where each sequence starts.
        lengths: number of tokens of each sequence, without padding.
        step_samples: samples of the training stream in the step's global batch, of which this is a part; None where
            that is the settings' global batch size.
    """

    tokens: Tensor
    positions: Tensor
    types: Tensor
    samples: Tensor
    layout: SequenceLayout
    first_tokens: Tensor
    lengths: tuple[int, ...]
    step_samples: int | None = None

    def to(self, device: torch.device | str, **how: Any) -> Self:
        """The same batch on ``device``; to a GPU by way of page-locked memory, so that the host does not wait."""
        if torch.device(device).type == "cuda" and self.tokens.device.type == "cpu" and not self.tokens.is_pinned():
            return self.pin_memory().to(device, **how)
        return super().to(device, non_blocking=True, **how)

    def read_by_heads(self) -> Tensor:
        """int64 ``[R]``, indices on the token axis of the tokens whose last hidden states heads read."""
        return self.first_tokens

    def predictions(self) -> int:
        """Positions whose words the masked-language head predicts, for counting operations."""
        return 0

    def tensors(self) -> dict[str, Any]:
        """The fields that are tensors, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def token_keys(samples: Tensor, positions: Tensor, seed: int) -> Tensor:
    """A dropout key for each token that depends on (seed, sample, position) alone: int64 ``[T]``, as its arguments."""
    return fold_in(fold_in(samples, seed), positions)


@dataclass(frozen=True, kw_only=True)
class MicroBatch(TokenBatch):
    """Sequences with what pretraining is to predict from them.

    Attributes:
        slots: int64 ``[K]``, indices on the token axis of the masked tokens; unused slots point at token 0.
        slot_labels: int64 ``[K]``, their true ids; -100 for unused slots.
        pair_labels: int64 ``[B]``, 0 in order / next, 1 swapped / random; -100 without a pair objective.

    In rows, B is the most that there may be: sequences that there are not start at token 0 and have no label.
    """

    slots: Tensor
    slot_labels: Tensor
    pair_labels: Tensor

    @classmethod
    def of_one(cls, tokens: Tensor, slots: Tensor, labels: Tensor | None = None) -> Self:
        """One sequence, of one segment.

        Args:
            tokens: int64 ``[T]``, masked where words are to be predicted.
            slots: int64 ``[K]``, the places there.
            labels: int64 ``[K]``, the true ids; None where they are not known.
        """
        count = tokens.shape[0]
        zeros = torch.zeros(count, dtype=torch.int64)
        return cls(
            tokens=tokens,
            positions=torch.arange(count),
            types=zeros,
            samples=zeros,
            layout=SequenceLayout.rectangle(1, count),
            slots=slots,
            slot_labels=torch.full_like(slots, IGNORED) if labels is None else labels,
            first_tokens=zeros[:1],
            pair_labels=torch.full((1,), IGNORED),
            lengths=(count,),
        )

    def read_by_heads(self) -> Tensor:
        """The slots, and the first tokens."""
        return torch.cat((self.slots, self.first_tokens))

    def predictions(self) -> int:
        """Slots, in use or not: the head works on all of them."""
        return self.slots.shape[0]


@dataclass(frozen=True, kw_only=True)
class TaskBatch(TokenBatch):
    """Sequences with what a task asks of them. Instances are what a loss term belongs to: a sequence, or some choices.

    Attributes:
        rows: int64 ``[R]``, indices on the token axis of the tokens whose logits are asked for, instance by instance.
        owners: int64 ``[R]``, the instance each row belongs to, 0 to U - 1.
        places: int64 ``[R]``, its number among the rows of its instance.
        widest: most rows of an instance.
        instances: number of instances, U.
        labels: int64 or float32, as the kind of head has them: ``[U]``, ``[U, C]`` or ``[R]``.
        taught: ``[R, outputs]``, what a teacher says of the rows; None without one, and before the last stage.
    """

    rows: Tensor
    owners: Tensor
    places: Tensor
    widest: int
    instances: int
    labels: Tensor
    taught: Tensor | None = None

    def read_by_heads(self) -> Tensor:
        """The rows."""
        return self.rows

    def by_instance(self, values: Tensor) -> Tensor:
        """Scores of the rows, ``[R]``, as ``[U, widest]`` with -inf where an instance has fewer rows."""
        table = values.new_full((self.instances * self.widest,), -torch.inf)
        return table.index_copy(0, self.owners * self.widest + self.places, values).view(self.instances, self.widest)
