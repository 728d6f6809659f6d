# SPDX-License-Identifier: Apache-2.0
"""The table of the kinds of heads. Adding one is a file with a :class:`HeadKind`, and a line here."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_bert.model.task_heads.choice import ChoiceKind
from megatron_bert.model.task_heads.kind import HeadKind
from megatron_bert.model.task_heads.sequence import SequenceKind
from megatron_bert.model.task_heads.span import SpanKind
from megatron_bert.model.task_heads.token import TokenKind

#: By name, in the order in which parameters without a description are asked for what they belong to.
HEADS: dict[str, HeadKind] = {kind.name: kind for kind in (SequenceKind(), ChoiceKind(), TokenKind(), SpanKind())}


def head_of_class(name: str) -> str | None:
    """The kind of head that a class of transformers has; None for a class without the head of a task."""
    return next((kind.name for kind in HEADS.values() if name.endswith(kind.class_ending)), None)


def head_of_parameters(names: Iterable[str], *, like_roberta: bool) -> str | None:
    """The kind of head that a model with parameters of these names has; None where there is none.

    A head of choices has the names of one of sequences, unless sequences have RoBERTa's head of two layers.
    """
    found = set(names)
    for kind in HEADS.values():
        needed = {f"{layer}.weight" for layer in kind.layers(like_roberta=like_roberta)}
        if kind.has_pooler(like_roberta=like_roberta):
            needed.add("pair_head.pooler.weight")
        if needed <= found:
            return kind.name
    return None


def head_layers(*, like_roberta: bool) -> frozenset[str]:
    """Names of the layers of all heads of a family, the same in its public classes."""
    return frozenset(layer for kind in HEADS.values() for layer in kind.layers(like_roberta=like_roberta))


def of_head(name: str) -> bool:
    """Whether a parameter is of a head, without its pooler."""
    return name.partition(".")[0] in {kind.module for kind in HEADS.values()}
