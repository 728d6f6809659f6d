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
#: model_type in a config.json -> family, of what is trained for tasks.
TRAINED_TYPES = {
    MegatronBertConfig.model_type: MEGATRON,
    **dict.fromkeys((RobertaConfig.model_type, *sorted(RobertaConfig.also_reads)), ROBERTA),
}
#: The same of what is read.
MODEL_TYPES = TRAINED_TYPES | {BertConfig.model_type: BERT}


def family_of(config: MegatronBertConfig) -> Family:
    """The family of an encoder."""
    if isinstance(config, BertConfig):
        return BERT
    return ROBERTA if config.like_roberta else MEGATRON
