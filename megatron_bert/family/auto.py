# SPDX-License-Identifier: Apache-2.0
"""transformers' Auto classes, told on request to make the classes of this project."""

from __future__ import annotations

import transformers

import megatron_bert

_FAMILIES = ("MegatronBert", "IBert")
_HEADS = (
    "PreTraining",
    "MaskedLM",
    "CausalLM",
    "NextSentencePrediction",
    "SequenceClassification",
    "MultipleChoice",
    "TokenClassification",
    "QuestionAnswering",
)


def register_auto_classes() -> None:
    """Let ``AutoConfig``, ``AutoModel`` and ``AutoModelFor..`` give the classes of this project from now on.

    Without this call they give those of transformers, whatever was imported.
    """
    for family in _FAMILIES:
        config = getattr(megatron_bert, f"{family}Config")
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        transformers.AutoModel.register(config, getattr(megatron_bert, f"{family}Model"), exist_ok=True)
        for head in _HEADS:
            name = f"{family}For{head}"
            if name in megatron_bert.__all__:
                auto = getattr(transformers, f"AutoModelFor{head}")
                auto.register(config, getattr(megatron_bert, name), exist_ok=True)
