# SPDX-License-Identifier: Apache-2.0
"""transformers' Auto classes, which give the classes of this project on request."""

from __future__ import annotations

import transformers

from megatron_bert.model.task_heads.table import HEADS
from megatron_bert.public import HOMES, public

_FAMILIES = ("MegatronBert", "IBert")
#: Ends of the names of classes without the head of a task.
_ENDINGS = ("ForPreTraining", "ForMaskedLM", "ForCausalLM", "ForNextSentencePrediction")


def register_auto_classes() -> None:
    """Let ``AutoConfig``, ``AutoModel`` and ``AutoModelFor..`` give the classes of this project from now on.

    Without this call they give those of transformers, whatever was imported.
    """
    for family in _FAMILIES:
        config = public(f"{family}Config")
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        transformers.AutoModel.register(config, public(f"{family}Model"), exist_ok=True)
        for ending in (*_ENDINGS, *(kind.class_ending for kind in HEADS.values())):
            if (name := family + ending) in HOMES:
                auto = getattr(transformers, f"AutoModel{ending}")
                auto.register(config, public(name), exist_ok=True)
