# SPDX-License-Identifier: Apache-2.0
"""What a model answers, read as the float classes' outputs are; transformers' own would be half of the start."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Answer(dict[str, Any]):
    """Results by name, as attribute, and in their order by number; those that are None are left out.

    Args:
        **results: tensors.
    """

    def __init__(self, **results: Tensor | None) -> None:
        super().__init__({name: result for name, result in results.items() if result is not None})

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name in _NEVER:
            return None
        raise AttributeError(f"the model answers {', '.join(self)}, not {name}")

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Tensor, ...]:
        """The results in their order."""
        return tuple(self.values())


#: What the float classes' outputs may have, and an engine has not.
_NEVER = frozenset({"loss", "pooler_output", "seq_relationship_logits", "hidden_states", "attentions"})
