# SPDX-License-Identifier: Apache-2.0
"""transformers' Auto classes, which give the classes of this project on request."""

from __future__ import annotations

import transformers

from megatron_bert.public import HOMES, public

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
        config = public(f"{family}Config")
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        transformers.AutoModel.register(config, public(f"{family}Model"), exist_ok=True)
        for head in _HEADS:
            name = f"{family}For{head}"
            if name in HOMES:
                auto = getattr(transformers, f"AutoModelFor{head}")
                auto.register(config, public(name), exist_ok=True)
