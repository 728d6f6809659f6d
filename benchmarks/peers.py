# SPDX-License-Identifier: Apache-2.0
"""transformers, the library that benchmarks compare with; training and serving do without it."""

from __future__ import annotations

import sys
from typing import Any

from megatron_bert.model.configuration import MegatronBertConfig

try:
    import transformers
except ModuleNotFoundError as error:
    print(
        f"this benchmark compares with transformers, and {error.name} is not installed: run "
        "`bash launch/setup.sh --test`, or pip install '.[test]' in the checkout",
        file=sys.stderr,
    )
    raise SystemExit(2) from None

__all__ = ["their_model", "transformers"]


def their_model(config: MegatronBertConfig) -> Any:
    """Transformers' model for pretraining, of the sizes and dropout of ours, on the CPU."""
    return transformers.MegatronBertForPreTraining(
        transformers.MegatronBertConfig(
            vocab_size=config.padded_vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            layer_norm_eps=config.layer_norm_eps,
            max_position_embeddings=config.max_position_embeddings,
            hidden_dropout_prob=config.hidden_dropout_prob,
            attention_probs_dropout_prob=config.attention_probs_dropout_prob,
        )
    )
