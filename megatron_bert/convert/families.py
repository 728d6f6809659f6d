# SPDX-License-Identifier: Apache-2.0
"""The families of encoders: Megatron's BERT, BERT, and RoBERTa with I-BERT."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bert.convert.huggingface_names import BERT as BERT_NAMES
from megatron_bert.convert.huggingface_names import IBERT as IBERT_NAMES
from megatron_bert.convert.huggingface_names import MEGATRON_BERT, HuggingFaceNames
from megatron_bert.model.configuration import MegatronBertConfig, explaining_names
from megatron_bert.model.finetuning import HeadKind
from parallel.errors import UserError

#: What the name of a class of transformers ends in, by the kind of its head.
CLASS_ENDINGS: dict[HeadKind, str] = {
    "sequence": "ForSequenceClassification",
    "choice": "ForMultipleChoice",
    "token": "ForTokenClassification",
    "span": "ForQuestionAnswering",
}


@explaining_names
@dataclass(kw_only=True)
class BertConfig(MegatronBertConfig):
    """Sizes and constants of a BERT: post-layer-norm, all else as MegatronBERT has it."""

    model_type = "bert"
    layer_norm_placement: str = "post"


@explaining_names
@dataclass(kw_only=True)
class RobertaConfig(MegatronBertConfig):
    """Sizes and constants of a RoBERTa, XLM-RoBERTa or I-BERT: post-layer-norm, positions counted after padding's."""

    model_type = "ibert"  # whose classes compute in integers too
    also_reads = frozenset({"roberta", "xlm-roberta"})
    like_roberta = True
    pad_token_id: int = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    scaled_output_init: bool = False
    layer_norm_placement: str = "post"

    def check(self) -> None:
        """Check every field.

        Raises:
            UserError: for the first that is wrong, with what it may be.
        """
        super().check()
        if self.hidden_act != "gelu":
            raise UserError(
                f"model.hidden_act is {self.hidden_act!r}, but the integer function of I-BERT is made for the exact "
                "GELU: use a model with 'gelu'"
            )
        if self.pad_token_id is None:
            raise UserError("model.pad_token_id is None, but positions are counted after it: give the id of padding")
        if self.longest_sequence < 1:
            raise UserError(
                f"model.max_position_embeddings is {self.max_position_embeddings}, but positions start after "
                f"model.pad_token_id {self.pad_token_id}: give at least {self.pad_token_id + 2}"
            )


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
