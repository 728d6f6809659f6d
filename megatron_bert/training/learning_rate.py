# SPDX-License-Identifier: Apache-2.0
"""Learning rate as a pure function of the step."""

from __future__ import annotations

from megatron_bert.config_sections import LearningRateSettings
from megatron_bert.tables import DECAYS


def learning_rate_at(step: int, rate: LearningRateSettings, total_steps: int) -> float:
    """The learning rate of one optimizer step.

    The decay counts the steps before this one, as Megatron's does: the first step after the warm-up still has the peak,
    and the last one of the run not yet the minimum, which may be 0 and would make it a step that changes nothing. The
    warm-up counts this one too, for the same reason; Megatron's first step has the rate 0.

    Args:
        step: number of the step, from 1.
        rate: the schedule; its decay ends at ``decay_steps``, or at ``total_steps`` when that is unset.
    """
    end = rate.decay_steps or total_steps
    warmup = rate.warmup(total_steps)
    if step <= warmup:
        return rate.peak * step / warmup
    if rate.schedule == "constant":
        return rate.peak
    start = warmup
    if rate.schedule == "wsd":
        start = end - (rate.wsd_decay_steps or max(1, (end - warmup) // 10))
    progress = min(1.0, max(0.0, (step - 1 - start) / (end - start)))
    share = DECAYS[rate.wsd_decay_shape if rate.schedule == "wsd" else rate.schedule](progress)
    return rate.minimum + (rate.peak - rate.minimum) * share


def layer_scale(name: str, layers: int, decay: float) -> float:
    """Factor on the learning rate of a parameter under layer-wise decay (Howard and Ruder, arXiv 1801.06146).

    Args:
        layers: number of layers of the encoder, L.
        decay: factor from each layer to the one below it.

    Returns:
        1 for what comes after the layers, ``decay ** (L - i)`` for layer i, ``decay ** (L + 1)`` for the embeddings.
    """
    parts = name.split(".")
    if parts[0] == "embeddings":
        return decay ** (layers + 1)
    if parts[:2] == ["encoder", "layers"]:
        return decay ** (layers - int(parts[2]))
    return 1.0
