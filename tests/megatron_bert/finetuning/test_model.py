# SPDX-License-Identifier: Apache-2.0
"""The task model and its losses beside transformers' classes, on the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import megatron_bert
from megatron_bert.convert.huggingface_names import family_of, fuse
from megatron_bert.finetuning.batches import collate_instances
from megatron_bert.finetuning.weights import load_finetuned
from megatron_bert.model.configuration import RobertaConfig, numbered_labels
from megatron_bert.model.finetuning import BertForTask
from megatron_bert.model.task_heads.table import HEADS as HEAD_KINDS
from megatron_bert.tasks.task import Instance
from tests.megatron_bert.finetuning.roberta_support import ROBERTA_SIZES
from tests.megatron_bert.finetuning.support import CONFIG, HEADS, random_instances

THEIRS = {"sequence": "SequenceClassification", "choice": "MultipleChoice", "token": "TokenClassification"}


def megatron(kind: str, folder: Path) -> tuple[BertForTask, Any]:
    """Ours, and transformers' MegatronBERT with the weights of our public class."""
    head = HEADS[kind]
    name = f"MegatronBertFor{THEIRS.get(head.kind, 'QuestionAnswering')}"
    config = replace(CONFIG, id2label=numbered_labels(head.outputs), problem_type=head.problem)
    torch.manual_seed(3)
    kind_of = getattr(megatron_bert, name)
    kind_of(kind_of.config_class.from_dict(config.to_dict())).save_pretrained(folder)
    theirs = getattr(transformers, name).from_pretrained(folder).eval()
    ours = BertForTask(config, head.kind, head.outputs)
    load_finetuned(ours, folder)
    return ours, theirs


def roberta(kind: str, folder: Path) -> tuple[BertForTask, Any]:
    """transformers' RoBERTa of random weights, biases and norms included, and ours with them."""
    head = HEADS[kind]
    torch.manual_seed(3)
    config = transformers.RobertaConfig(
        **ROBERTA_SIZES, vocab_size=95, num_labels=head.outputs, problem_type=head.problem
    )
    theirs = getattr(transformers, f"RobertaFor{THEIRS.get(head.kind, 'QuestionAnswering')}")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    theirs.save_pretrained(folder)
    sizes = RobertaConfig(
        **ROBERTA_SIZES, vocab_size=95, id2label=numbered_labels(head.outputs), problem_type=head.problem
    )
    ours = BertForTask(sizes, head.kind, head.outputs)
    load_finetuned(ours, folder)
    return ours, theirs


FAMILIES = {"megatron": megatron, "roberta": roberta}


def instances_for(family: str, kind: str) -> list[Instance]:
    """Six instances; RoBERTa has one token type."""
    instances = random_instances(kind, 6)
    if family == "megatron":
        return instances
    typeless = [tuple(replace(f, types=np.zeros_like(f.types)) for f in instance.features) for instance in instances]
    return [replace(instance, features=features) for instance, features in zip(instances, typeless, strict=True)]


def padded(instances: list[Instance]) -> dict[str, Tensor]:
    """transformers' arguments for the sequences of instances, in a rectangle."""
    features = [feature for instance in instances for feature in instance.features]
    longest = max(len(feature.tokens) for feature in features)
    ids, types, mask = np.zeros((3, len(features), longest), dtype=np.int64)
    for row, feature in enumerate(features):
        length = len(feature.tokens)
        ids[row, :length], types[row, :length], mask[row, :length] = feature.tokens, feature.types, 1
    arrays = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def their_loss(kind: str, theirs: Any, instance: Instance) -> tuple[Tensor, Tensor]:
    """transformers' loss and logits of one instance alone, without padding."""
    head, given = HEADS[kind], padded([instance])
    label = torch.from_numpy(instance.label)
    if head.kind == "choice":
        output = theirs(**{name: value[None] for name, value in given.items()}, labels=label)
        return output.loss, output.logits.reshape(-1, 1)
    if head.kind == "span":
        output = theirs(**given, start_positions=label[:1], end_positions=label[1:])
        return output.loss, torch.stack((output.start_logits[0], output.end_logits[0]), dim=1)
    if head.kind == "token":
        tags = torch.full_like(given["input_ids"], -100)
        tags[0, torch.from_numpy(instance.features[0].rows)] = label
        output = theirs(**given, labels=tags)
        return output.loss, output.logits[0, torch.from_numpy(instance.features[0].rows)]
    whole = head.problem == "single_label_classification"
    output = theirs(**given, labels=label if whole else label[None])
    return output.loss, output.logits


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_logits_and_gradients_equal_transformers(family: str, kind: str, tmp_path: Path) -> None:
    ours, theirs = FAMILIES[family](kind, tmp_path)
    instances = instances_for(family, kind)
    batch = collate_instances(instances, range(6), HEADS[kind], most_features=4, multiple=4)
    logits = ours(batch)
    head = HEADS[kind]
    total = HEAD_KINDS[head.kind].loss_sum(logits, batch, head.problem)
    total.backward()
    expected, their_logits = torch.zeros(()), []
    for instance in instances[:-1]:  # the last has no label
        loss, scores = their_loss(kind, theirs, instance)
        # Their loss of an instance is the mean over its tokens for a token head, and over labels for several: ours too,
        # but for the token head, whose sum is over tokens.
        expected = expected + loss * (len(instance.label) if kind == "token" else 1)
        their_logits.append(scores)
    expected.backward()
    count = sum(len(scores) for scores in their_logits)
    torch.testing.assert_close(logits[:count], torch.cat(their_logits), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    assert HEAD_KINDS[head.kind].counted(batch.labels).sum() == (
        sum(len(u.label) for u in instances[:-1]) if kind == "token" else 5
    )
    names = family_of(ours.config)
    gradients = {names.inside(name): parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        found = [gradients[names.inside(key)] for key in names.theirs(name)]
        assert parameter.grad is not None, name
        assert all(gradient is not None for gradient in found), name
        reference = fuse(found, ours.config.head_dim)
        torch.testing.assert_close(parameter.grad[: len(reference)], reference, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_does_not_depend_on_how_instances_are_batched(family: str, kind: str) -> None:
    head, instances = HEADS[kind], instances_for(family, kind)
    torch.manual_seed(3)
    config = CONFIG if family == "megatron" else RobertaConfig(**ROBERTA_SIZES, vocab_size=95)
    model = BertForTask(config, head.kind, head.outputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)

    def loss(groups: list[list[int]]) -> float:
        """With dropout, whose masks belong to the instance."""
        total = 0.0
        for group in groups:
            batch = collate_instances([instances[i] for i in group], group, head, most_features=4)
            total += model.head_kind.loss_sum(model(batch, 11), batch, head.problem).item()
        return total

    whole = loss([[0, 1, 2, 3, 4, 5]])
    assert loss([[0, 1], [2, 3], [4, 5]]) == pytest.approx(whole, rel=1e-5)
    assert loss([[4, 2], [5, 3, 0], [1]]) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("kind", ["single", "token", "multi"])
def test_class_weights_are_those_of_torch(kind: str) -> None:
    """Of sums over parts of a batch, divided by the weights of all of it."""
    head, instances = HEADS[kind], random_instances(kind, 6)
    weights = torch.tensor([0.25, 3.0, 0.0, 1.5, 0.1][: head.outputs])
    parts = ([0, 4], [1, 2, 5], [3])
    batches = [collate_instances([instances[i] for i in part], part, head, most_features=1) for part in parts]
    torch.manual_seed(1)
    logits = [torch.randn(len(batch.rows), head.outputs) for batch in batches]
    table, pairs = HEAD_KINDS[head.kind], zip(logits, batches, strict=True)
    total = sum(table.loss_sum(scores, batch, head.problem, weights) for scores, batch in pairs)
    weight = sum(table.label_weights(batch.labels, weights).sum() for batch in batches)
    joined, labels = torch.cat(logits), torch.cat([batch.labels for batch in batches])
    if kind == "multi":
        counted = ~labels.isnan().any(dim=1)
        expected = torch.nn.BCEWithLogitsLoss(pos_weight=weights)(joined[counted], labels[counted])
    else:
        expected = torch.nn.CrossEntropyLoss(weight=weights)(joined, labels)
    torch.testing.assert_close(total / weight, expected)


@pytest.mark.parametrize("kind", ["single", "token"])
def test_the_distance_to_a_teacher_is_weighed_as_the_loss(kind: str) -> None:
    head, instances = HEADS[kind], random_instances(kind, 6)
    weights = torch.tensor([0.25, 3.0, 0.0, 1.5, 0.1][: head.outputs])
    batch = collate_instances(instances, range(6), head, most_features=1)
    torch.manual_seed(1)
    mine, theirs = torch.randn(2, len(batch.rows), head.outputs)
    table = HEAD_KINDS[head.kind]
    counted = table.counted(batch.labels)
    each = torch.nn.functional.kl_div(mine.log_softmax(1), theirs.softmax(1), reduction="none").sum(dim=1)
    expected = (each * weights[batch.labels.clamp(min=0)])[counted].sum()
    found = table.distillation_sum(mine, theirs, batch, head.problem, temperature=1.0, class_weights=weights)
    torch.testing.assert_close(found, expected)
