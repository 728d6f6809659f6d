# SPDX-License-Identifier: Apache-2.0
"""Recognizes query, key and value rows that were read in a wrong order, from the weights themselves.

A wrong order gives no error of shape. But training leaves a mark that only the right order shows. Scaling a query row
by any number and the key row beside it by its inverse changes nothing in the scores, and so, in general, does any
change of basis of a head; along such directions a gradient is zero, which keeps (under gradient descent exactly, under
Adam roughly) the difference of the Gram matrices Q Qᵀ - K Kᵀ of every head as it started. What training adds to the one
is added to the other: their off-diagonal elements correlate. The same holds for the values of a head and its columns of
the output projection, V Vᵀ and Oᵀ O, and the order of those columns is known. In a wrong order rows of different heads
or roles are paired, and the correlation is gone. Untrained weights correlate in no order, and then there is no verdict.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_bert.convert.divisions import from_canonical, to_canonical
from megatron_bert.convert.state import CanonicalState

#: Layers that are looked at, spread over the stack.
_LAYERS = 4
#: Heads of a layer that are looked at.
_HEADS = 16
#: Standard deviations by which an order must stand out before it says anything.
_CLEAR = 10.0
#: How many times higher than that of the order that was read its score must be. Even in a wrong order a trained matrix
#: correlates a little; measured, the right one scored five times higher and more.
_RATIO = 2.0
#: One version for each order; 2.0 has that of 3.0.
ORDERS = (0.0, 1.0, 3.0)


@torch.no_grad()
def layout_warning(state: CanonicalState) -> str | None:
    """What to tell the user when the weights look as if their rows were read in a wrong order; None if they do not."""
    version, config = state.facts.checkpoint_version, state.config
    # Without a version it is not known what an earlier converter took the rows for, so all mistakes are possible.
    taken = [3.0 if version == 2.0 else version] if version is not None else list(ORDERS)
    found: dict[tuple[float, float], list[Tensor]] = {(t, m): [] for t in taken for m in ORDERS}
    count, heads = config.num_hidden_layers, config.num_attention_heads
    for layer in sorted({round(i * (count - 1) / max(1, _LAYERS - 1)) for i in range(_LAYERS)}):
        prefix = f"encoder.layers.{layer}.attention"
        fused = state[f"{prefix}.query_key_value.weight"].load().float()
        output = state[f"{prefix}.output.weight"].load().float()
        if torch.isfinite(fused).all() and torch.isfinite(output).all():
            for (take, mean), terms in found.items():
                terms += _correlations(reread(fused, take, mean, heads, state.facts.tensor), output, heads)
    # In standard deviations of what unrelated weights give.
    scores = {pair: float(sum(terms)) / math.sqrt(max(1, len(terms))) for pair, terms in found.items()}
    own = max(score for (take, mean), score in scores.items() if take == mean)
    (take, mean), best = max(scores.items(), key=lambda entry: entry[1])
    if best < _CLEAR or best < _RATIO * own:
        return None
    if version is None:
        return (
            "the query, key and value weights look shuffled: they fit together only when rows taken in the order of "
            f"checkpoint version {take:g} are read as version {mean:g}; the checkpoint was probably made by a "
            "converter that mistook the version: convert from the original again"
        )
    return (
        f"the query, key and value rows look as if they were in the order of checkpoint version {mean:g}, not of "
        f"{take:g} (evidence {best:.0f} against {own:.0f} standard deviations): compare the result with "
        f"--source-checkpoint-version {mean:g}"
    )


def reread(fused: Tensor, taken: float, meant: float, heads: int, ranks: int) -> Tensor:
    """Canonical rows that were taken for one version, read again as another.

    Args:
        fused: weight ``[3H, H]`` or bias ``[3H]``.
        ranks: tensor-parallel size of the source; rows were reordered in each rank's part.
    """
    if taken == meant:
        return fused
    share = heads // ranks
    return torch.cat([to_canonical(from_canonical(part, taken, share), meant, share) for part in fused.chunk(ranks)])


def _correlations(fused: Tensor, output: Tensor, heads: int) -> list[Tensor]:
    """Correlation of off-diagonal Gram elements, of queries with keys and of values with outputs, for each head.

    In standard deviations, from canonical rows ``[3H, H]`` and the output projection ``[H, H]``.
    """
    query, key, value = fused.unflatten(0, (heads, 3, -1)).unbind(1)  # [A, D, H]
    out = output.unflatten(1, (heads, -1)).permute(1, 2, 0)  # [A, D, H]
    found: list[Tensor] = []
    for first, second in ((query, key), (value, out)):
        left, right = _off_diagonal(first[:_HEADS]), _off_diagonal(second[:_HEADS])
        # One head at a time is normalized, so that no large head speaks for all.
        correlation = (left * right).sum(1) / (left.norm(dim=1) * right.norm(dim=1)).clamp(min=1e-30)
        found += correlation * math.sqrt(left.shape[1])
    return found


def _off_diagonal(rows: Tensor) -> Tensor:
    """Elements above the diagonal of each head's Gram matrix: ``[A, D, H]`` to ``[A, D (D - 1) / 2]``."""
    gram = rows @ rows.transpose(1, 2)
    above = torch.triu_indices(gram.shape[1], gram.shape[1], offset=1)
    return gram[:, above[0], above[1]]
