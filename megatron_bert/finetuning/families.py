"""The families of encoders that are fine-tuned: Megatron's BERT, and RoBERTa with I-BERT; and BERT, which is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_bert.family.classification import (
    MegatronBertForMultipleChoice,
    MegatronBertForQuestionAnswering,
    MegatronBertForSequenceClassification,
    MegatronBertForTokenClassification,
)
from megatron_bert.family.names import BERT as BERT_NAMES
from megatron_bert.family.names import MEGATRON_BERT, Names
from megatron_bert.ibert.configuration import IBertConfig
from megatron_bert.ibert.family.heads import (
    IBertForMultipleChoice,
    IBertForQuestionAnswering,
    IBertForSequenceClassification,
    IBertForTokenClassification,
)
from megatron_bert.ibert.family.names import IBERT
from megatron_bert.model.configuration import MegatronBertConfig, explaining_names
from megatron_bert.model.finetuning import HeadKind


@explaining_names
@dataclass(kw_only=True)
class BertConfig(MegatronBertConfig):
    """Sizes and constants of a BERT: post-layer-norm, all else as MegatronBERT has it."""

    model_type = "bert"
    layer_norm_placement: str = "post"


@dataclass(frozen=True)
class Family:
    """What differs between families in files.

    Attributes:
        names: of parameters.
        config: class of the configuration.
        classes: the public class with a head of each kind, in which a fine-tuned model is saved.
        floating: fields of the configuration that say that weights are those of a float model.
    """

    names: Names
    config: type[MegatronBertConfig]
    classes: Mapping[HeadKind, Any]
    floating: Mapping[str, Any] = field(default_factory=dict)


MEGATRON = Family(
    names=MEGATRON_BERT,
    config=MegatronBertConfig,
    classes={
        "sequence": MegatronBertForSequenceClassification,
        "choice": MegatronBertForMultipleChoice,
        "token": MegatronBertForTokenClassification,
        "span": MegatronBertForQuestionAnswering,
    },
)
ROBERTA = Family(
    names=IBERT,
    config=IBertConfig,
    classes={
        "sequence": IBertForSequenceClassification,
        "choice": IBertForMultipleChoice,
        "token": IBertForTokenClassification,
        "span": IBertForQuestionAnswering,
    },
    floating={"quant_mode": False, "force_dequant": "none"},
)
#: Models of transformers' Bert classes: scored and asked as they are, not trained.
BERT = Family(names=BERT_NAMES, config=BertConfig, classes={})
#: model_type in a config.json -> family, of what is fine-tuned.
MODEL_TYPES = {
    MegatronBertConfig.model_type: MEGATRON,
    **dict.fromkeys((IBertConfig.model_type, *sorted(IBertConfig.also_reads)), ROBERTA),
}
#: The same of what is used.
USED_TYPES = MODEL_TYPES | {BertConfig.model_type: BERT}


def family_of(config: MegatronBertConfig) -> Family:
    """The family of an encoder."""
    if isinstance(config, BertConfig):
        return BERT
    return ROBERTA if config.like_roberta else MEGATRON
