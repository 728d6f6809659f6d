# SPDX-License-Identifier: Apache-2.0
"""What an integer plan is, as rows of a table."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_bert.ibert.engine.plan_file import ARITHMETIC, PLAN_NAME, VERSION, is_plan, read_plan


def plan_in(source: Path) -> Path | None:
    """The plan that a path stands for, perhaps a damaged one: a file, or that in a model's directory; or None."""
    path = source / PLAN_NAME if source.is_dir() else source
    named = path.name == PLAN_NAME and path.exists()
    return path if named or (path.is_file() and is_plan(path)) else None


def describe_plan(path: Path) -> str:
    """A table of facts about a plan, which is read and checked whole.

    Raises:
        UserError: it is damaged.
    """
    plan = read_plan(path)
    settings, embeddings, size = plan.settings, plan.embeddings, path.stat().st_size
    numbers = sum(tensor.numel() for tensor in _tensors(plan))
    rows = [
        ("format", f"integer plan, version {VERSION}, arithmetic {ARITHMETIC}"),
        ("task", plan.task),
        ("norms", "after each sum" if plan.layers[0].post_norm else "before each part"),
        ("layers", str(len(plan.layers))),
        ("hidden size", str(plan.hidden_size)),
        ("attention heads", str(plan.layers[0].attention.heads)),
        ("feed-forward size", str(len(plan.layers[0].intermediate.bias))),
        ("positions", f"{embeddings.position.shape[0]}, sequences of at most {plan.longest} tokens"),
        ("vocabulary", f"{embeddings.word.shape[0]} words"),
        ("heads on top", ", ".join(plan.heads.present) or "none"),
        (
            "bits",
            f"weights {settings.get('weight_bits')}, activations {settings.get('activation_bits')}, attention "
            f"{settings.get('attention_bits')}, residual stream {settings.get('residual_bits')}",
        ),
        ("integers", f"{numbers:,} in {size:,} bytes"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join([str(path), *(f"{name:<{width}}  {value}" for name, value in rows)])


def _tensors(part: Any) -> list[Tensor]:
    if isinstance(part, Tensor):
        return [part]
    if is_dataclass(part):
        return [tensor for field in fields(part) for tensor in _tensors(getattr(part, field.name))]
    return [tensor for each in part for tensor in _tensors(each)] if isinstance(part, tuple) else []
