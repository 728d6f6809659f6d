# SPDX-License-Identifier: Apache-2.0
"""The families of encoders: Megatron's BERT, BERT, and RoBERTa with I-BERT."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bert.convert.huggingface_names import BERT as BERT_NAMES
from megatron_bert.convert.huggingface_names import IBERT as IBERT_NAMES
from megatron_bert.convert.huggingface_names import MEGATRON_BERT, HuggingFaceNames
from megatron_bert.model.configuration import BertConfig, MegatronBertConfig, RobertaConfig


@dataclass(frozen=True)
class Family:
    """What differs between families in files.

    Attributes:
        names: of parameters.
        config: class of the configuration.
        classes: what the names of transformers' classes begin with.
    """

    names: HuggingFaceNames
    config: type[MegatronBertConfig]
    classes: str


MEGATRON = Family(MEGATRON_BERT, MegatronBertConfig, "MegatronBert")
BERT = Family(BERT_NAMES, BertConfig, "Bert")
ROBERTA = Family(IBERT_NAMES, RobertaConfig, "IBert")
#: model_type in a config.json -> family.
MODEL_TYPES = {
    name: family
    for family in (MEGATRON, ROBERTA, BERT)
    for name in (family.config.model_type, *sorted(family.config.also_reads))
}
#: Those of what is trained for tasks.
TRAINED_TYPES = [name for name, family in MODEL_TYPES.items() if family is not BERT]


def family_of(config: MegatronBertConfig) -> Family:
    """The family of an encoder."""
    return MODEL_TYPES[config.model_type]
