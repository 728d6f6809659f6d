# SPDX-License-Identifier: Apache-2.0
"""BERT encoders with Megatron parallelism: pretraining, checkpoint conversion, MegatronBERT and I-BERT classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_bert.public import HOMES, public

if TYPE_CHECKING:
    from megatron_bert.family.auto import register_auto_classes
    from megatron_bert.family.bert import MegatronBertModel
    from megatron_bert.family.causal import MegatronBertForCausalLM
    from megatron_bert.family.classification import (
        MegatronBertForMultipleChoice,
        MegatronBertForNextSentencePrediction,
        MegatronBertForQuestionAnswering,
        MegatronBertForSequenceClassification,
        MegatronBertForTokenClassification,
    )
    from megatron_bert.family.configuration import MegatronBertConfig
    from megatron_bert.family.language import MegatronBertForMaskedLM, MegatronBertForPreTraining
    from megatron_bert.family.pretrained import MegatronBertPreTrainedModel
    from megatron_bert.family.tokenizer import AutoTokenizer
    from megatron_bert.ibert.family.configuration import IBertConfig
    from megatron_bert.ibert.family.encoder import IBertModel, IBertPreTrainedModel
    from megatron_bert.ibert.family.heads import (
        IBertForMaskedLM,
        IBertForMultipleChoice,
        IBertForQuestionAnswering,
        IBertForSequenceClassification,
        IBertForTokenClassification,
    )

__version__ = "0.1.0"

__all__ = [
    "AutoTokenizer",
    "IBertConfig",
    "IBertForMaskedLM",
    "IBertForMultipleChoice",
    "IBertForQuestionAnswering",
    "IBertForSequenceClassification",
    "IBertForTokenClassification",
    "IBertModel",
    "IBertPreTrainedModel",
    "MegatronBertConfig",
    "MegatronBertForCausalLM",
    "MegatronBertForMaskedLM",
    "MegatronBertForMultipleChoice",
    "MegatronBertForNextSentencePrediction",
    "MegatronBertForPreTraining",
    "MegatronBertForQuestionAnswering",
    "MegatronBertForSequenceClassification",
    "MegatronBertForTokenClassification",
    "MegatronBertModel",
    "MegatronBertPreTrainedModel",
    "__version__",
    "register_auto_classes",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return public(name)
