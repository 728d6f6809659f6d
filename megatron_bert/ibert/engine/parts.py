# SPDX-License-Identifier: Apache-2.0
"""The quantized modules of a model of any class, by their names in a pretraining checkpoint."""

from __future__ import annotations

from typing import Any

from torch import nn

from megatron_bert.ibert.activations import INTEGER_ACTIVATIONS
from megatron_bert.ibert.engine.compile import Parts, compile_plan
from megatron_bert.ibert.engine.plan import Plan
from megatron_bert.model.encoder import Encoder
from megatron_bert.model.finetuning import BertForTask
from megatron_bert.model.heads import SequenceHead
from megatron_bert.model.task_heads.table import HEADS, head_of_class
from parallel.errors import UserError, brief

#: Ends of the names of public classes without the head of a task.
_OF_CLASSES = {
    "ForMaskedLM": "masked",
    "ForPreTraining": "pretraining",
    "ForPretraining": "pretraining",
    "ForNextSentencePrediction": "pair",
    "BertModel": "encoder",
    "IBertModel": "encoder",
}


def plan_of(model: nn.Module) -> Plan:
    """Compile a quantized model: of a public class, of a task, or of pretraining.

    Args:
        model: whole and on the CPU, with ranges, in evaluation mode or not: dropout is not part of a plan.

    Raises:
        UserError: it is of another kind, in floating point, a decoder, or has no ranges.
    """
    return compile_plan(parts_of(model))


def _task(model: nn.Module) -> str | None:
    if isinstance(model, BertForTask):
        return model.head_kind.name
    name = type(model).__name__
    return head_of_class(name) or next((task for end, task in _OF_CLASSES.items() if name.endswith(end)), None)


def parts_of(model: nn.Module) -> Parts:
    """Find them.

    Raises:
        UserError: see :func:`plan_of`.
    """
    config: Any = getattr(model, "config", None)
    task = _task(model)
    if config is None or task is None:
        raise UserError(f"{type(model).__name__} has no integer plan: give an encoder of a public class or of a task")
    if getattr(config, "is_decoder", False):
        raise UserError("the model is a decoder, which no integer engine runs: give an encoder")
    if (act := config.hidden_act) not in INTEGER_ACTIVATIONS or not INTEGER_ACTIVATIONS[act].in_engines:
        raise UserError(f"the model has hidden_act {brief(act)}, which integer engines do not have: run it without one")
    if task in HEADS and not HEADS[task].in_engines:
        raise UserError(f"the model has the head of a {task}, which integer engines do not have: run it without one")
    if (canonical := getattr(model, "canonical_modules", None)) is not None:
        config, found = config.encoder_config(), canonical()
    else:
        found = {name: module for name, module in model.named_modules() if name}
    encoder = found.get("encoder")
    if not isinstance(encoder, Encoder) or "embeddings" not in found:
        raise UserError(f"{type(model).__name__} holds no whole encoder: give a model that is not divided")
    head = found.get(HEADS[task].module) if task in HEADS else None
    pooler = found.get("pair_head.pooler")
    if isinstance(head, SequenceHead):
        pooler, head = head.dense, head.out_proj
    output = None if config.tie_word_embeddings else found.get("output_embeddings")
    return Parts(
        config=config,
        task=task,
        embeddings=found["embeddings"],
        layers=list(encoder.layers.values()),
        final_norm=encoder.final_norm,
        pooler=pooler,
        classifier=head,
        pair=found.get("pair_head.classifier"),
        masked=found.get("masked_head"),
        output=None if output is None else output.weight,
    )
