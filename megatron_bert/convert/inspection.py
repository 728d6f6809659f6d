# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint is, without reading its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_bert.convert.opening import open_checkpoint
from megatron_bert.convert.options import ReadOptions
from megatron_bert.convert.state import CanonicalState
from megatron_bert.model.activations import GELU_APPROXIMATIONS
from megatron_bert.model.task_heads.table import HEADS
from parallel.errors import first_of

_ORDERS = {0.0: "[3, heads, head_dim]", 1.0: "[heads, head_dim, 3]", 2.0: "[heads, 3, head_dim]"}
#: Most names of classes that are shown.
_SHOWN = 8


@dataclass(frozen=True)
class Inspection:
    """Facts about a checkpoint, as rows of a table, and what of it a user should look at."""

    source: str
    rows: tuple[tuple[str, str], ...]
    suspicious: tuple[str, ...]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows)
        lines = [f"{name:<{width}}  {value}" for name, value in self.rows]
        return "\n".join([self.source, *lines, *(f"note: {text}" for text in self.suspicious)])


def inspect(source: str | Path, options: ReadOptions | None = None) -> Inspection:
    """Facts about a checkpoint of any format.

    Raises:
        UserError: it is none, is damaged, or contradicts itself.
    """
    with open_checkpoint(source, options or ReadOptions()) as state:
        return inspection_of(state, str(source))


def inspection_of(state: CanonicalState, source: str) -> Inspection:
    """Facts about an open checkpoint."""
    facts, config = state.facts, state.config
    gelu = GELU_APPROXIMATIONS.get(config.hidden_act)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})
    rows = [
        ("format", facts.format),
        ("variant", facts.variant),
        ("layout", _layout(state)),
        ("model type", config.model_type),
        ("layers", str(config.num_hidden_layers)),
        ("hidden size", str(config.hidden_size)),
        ("attention heads", f"{config.num_attention_heads} of {config.head_dim}"),
        ("feed-forward size", str(config.intermediate_size)),
        ("positions", str(config.max_position_embeddings)),
        ("token types", str(config.type_vocab_size)),
        ("vocabulary", _vocabulary(state)),
        ("layer norm epsilon", f"{config.layer_norm_eps:g}"),
        ("activation", config.hidden_act) if gelu is None else ("GELU", "tanh" if gelu == "tanh" else "erf"),
        ("heads on top", _heads(state)),
        ("number format", ", ".join(dtypes)),
        ("parameters", f"{state.parameters:,}"),
    ]
    if facts.checkpoint_version is not None:
        version = facts.checkpoint_version
        order = _ORDERS[min(version, 2.0)]
        rows.insert(2, ("checkpoint version", f"{version:g}, query, key and value rows {order}"))
    if facts.iteration is not None:
        rows.append(("step", str(facts.iteration)))
    if state.ranges is not None:
        bits = [state.ranges.settings.get(f"{what}_bits") for what in ("weight", "activation")]
        said = f"weights {bits[0]} bits, activations {bits[1]} bits, {len(state.ranges.limits)} ranges"
        rows.append(("quantized model", said))
    if state.optimizer:
        rows.append(("optimizer", f"{len(state.optimizer)} tensors"))
    return Inspection(source, tuple(rows), (*facts.assumptions, *dict.fromkeys(state.warnings)))


def _layout(state: CanonicalState) -> str:
    facts = state.facts
    files = f"{facts.files} file{'s' if facts.files > 1 else ''}"
    if not facts.format.startswith("megatron"):
        return files
    virtual = f" x virtual {facts.virtual_stages}" if facts.virtual_stages > 1 else ""
    return f"tensor {facts.tensor} x pipeline {facts.pipeline}{virtual}, {files}"


def _vocabulary(state: CanonicalState) -> str:
    facts = state.facts
    if facts.true_vocab_size is None:
        return f"{facts.stored_rows} rows, all taken as words (the true number is not stored)"
    return f"{facts.true_vocab_size} words in {facts.stored_rows} rows"


def _heads(state: CanonicalState) -> str:
    there = {
        "masked language": state.has_masked_head,
        "pooler": state.has_pooler,
        "sentence pairs": state.has_pair_head,
    }
    parts = [name for name, held in there.items() if held]
    if state.head is not None:
        kind, names = HEADS[state.head], (state.config.id2label or {}).values()
        parts.append(kind.title if kind.outputs is not None else f"{kind.title} ({first_of(names, _SHOWN)})")
    return ", ".join(parts) or "none"
