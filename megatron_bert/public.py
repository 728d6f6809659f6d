# SPDX-License-Identifier: Apache-2.0
"""Where the public classes live."""

from __future__ import annotations

from importlib import import_module
from typing import Any

#: Name -> module. They are imported on first use: the command line needs none of them.
HOMES = {
    "AutoTokenizer": "family.tokenizer",
    "IBertConfig": "ibert.family.configuration",
    "IBertForMaskedLM": "ibert.family.heads",
    "IBertForMultipleChoice": "ibert.family.heads",
    "IBertForQuestionAnswering": "ibert.family.heads",
    "IBertForSequenceClassification": "ibert.family.heads",
    "IBertForTokenClassification": "ibert.family.heads",
    "IBertModel": "ibert.family.encoder",
    "IBertPreTrainedModel": "ibert.family.encoder",
    "MegatronBertConfig": "family.configuration",
    "MegatronBertForCausalLM": "family.causal",
    "MegatronBertForMaskedLM": "family.language",
    "MegatronBertForMultipleChoice": "family.classification",
    "MegatronBertForNextSentencePrediction": "family.classification",
    "MegatronBertForPreTraining": "family.language",
    "MegatronBertForQuestionAnswering": "family.classification",
    "MegatronBertForSequenceClassification": "family.classification",
    "MegatronBertForTokenClassification": "family.classification",
    "MegatronBertModel": "family.bert",
    "MegatronBertPreTrainedModel": "family.pretrained",
    "register_auto_classes": "family.auto",
}


def public(name: str) -> Any:
    """The class or function of a name of :data:`HOMES`."""
    return getattr(import_module(f"megatron_bert.{HOMES[name]}"), name)
