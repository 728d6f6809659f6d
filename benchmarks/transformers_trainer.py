# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning with transformers' Trainer under the settings of `megatron-bert finetune`.

The same start, the same tokenized instances, batch size, learning rates, warm-up, epochs, weight decay, dropout and
number format; another order of the data and other dropout masks. Needs the packages ``transformers`` and
``accelerate``.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import transformers
from megatron_bert.convert.conversion import convert
from megatron_bert.finetuning.saved import task_config
from megatron_bert.finetuning.settings import FinetuneSettings
from megatron_bert.finetuning.start import encoder_config, find_tokenizer
from megatron_bert.model.task_heads.table import HEADS
from megatron_bert.tasks.registry import build_task
from megatron_bert.tasks.task import Head, Instance, Task


def collate(instances: list[Instance], head: Head, pad_id: int) -> dict[str, Tensor]:
    """Transformers' arguments for instances: rectangles with padding."""
    choices = max(len(instance.features) for instance in instances)
    length = max(len(feature.tokens) for instance in instances for feature in instance.features)
    shape = (len(instances), choices, length)
    ids, types, mask = np.full(shape, pad_id), np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for row, instance in enumerate(instances):
        for choice, feature in enumerate(instance.features):
            count = len(feature.tokens)
            ids[row, choice, :count], types[row, choice, :count] = feature.tokens, feature.types
            mask[row, choice, :count] = 1
    if head.kind != "choice":
        ids, types, mask = ids[:, 0], types[:, 0], mask[:, 0]
    given = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}
    if head.kind == "token":
        tags = np.full(ids.shape, -100)
        for row, instance in enumerate(instances):
            tags[row, instance.features[0].rows] = instance.label
        given["labels"] = tags
    elif head.kind == "span":
        places = np.stack([instance.label for instance in instances])
        given |= {"start_positions": places[:, 0], "end_positions": places[:, 1]}
    else:
        labels = np.stack([instance.label for instance in instances])
        given["labels"] = labels[:, 0] if labels.dtype == np.int64 else labels
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in given.items()}


@torch.no_grad()
def score(model: Any, task: Task[Any, Any], split: str, batch: int = 64) -> dict[str, float]:
    """The task's metrics of transformers' model on a split."""
    model.eval()
    examples = task.examples(split)
    instances = task.instances(examples, train=False)
    logits: list[np.ndarray] = []
    for start in range(0, len(instances), batch):
        chosen = instances[start : start + batch]
        given = collate(chosen, task.head, task.tokenizer.pad_id)
        names = ("input_ids", "token_type_ids", "attention_mask")
        output = model(**{name: given[name].to(model.device) for name in names})
        for row, instance in enumerate(chosen):
            rows = instance.features[0].rows
            if task.head.kind == "span":
                pair = torch.stack((output.start_logits[row], output.end_logits[row]), dim=1)
                logits.append(pair.cpu().numpy()[rows])
            elif task.head.kind == "token":
                logits.append(output.logits[row].cpu().numpy()[rows])
            else:
                found = (
                    output.logits[row, : len(instance.features)] if task.head.kind == "choice" else output.logits[row]
                )
                logits.append(found.cpu().numpy())
    return task.metrics(examples, task.predictions(examples, instances, logits))


def train(settings: FinetuneSettings, seed: int, folder: Path) -> tuple[dict[str, dict[str, float]], float]:
    """Best scores of transformers' Trainer by split, and its training seconds."""
    tokenizer = find_tokenizer(settings)
    task = build_task(settings.task, settings.data, tokenizer)
    config = task_config(encoder_config(settings, tokenizer), task)
    start = settings.model.from_
    if not settings.model.keep_head:  # a directory with a head is transformers' own format; converting leaves heads out
        start = folder / "encoder"
        convert(settings.model.from_, start, to="huggingface", progress=False)
    transformers.set_seed(seed)
    theirs = getattr(transformers, f"MegatronBert{HEADS[task.head.kind].class_ending}")
    model = theirs.from_pretrained(
        start,
        num_labels=config.num_labels,
        problem_type=config.problem_type,
        hidden_dropout_prob=config.hidden_dropout_prob,
        attention_probs_dropout_prob=config.attention_probs_dropout_prob,
        layer_norm_eps=config.layer_norm_eps,
    )
    training, rate = settings.training, settings.learning_rate
    best: dict[str, dict[str, float]] = {}
    evaluating = 0.0

    class Follow(transformers.TrainerCallback):
        """Scores after every epoch, as the run had them."""

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            nonlocal best, evaluating
            began = time.perf_counter()
            scores = score(model, task, task.valid_splits[0])
            if not best or scores[task.metric] > best[task.valid_splits[0]][task.metric]:
                best = {task.valid_splits[0]: scores} | {name: score(model, task, name) for name in task.test_splits}
            model.train()
            evaluating += time.perf_counter() - began

    instances = task.instances(task.examples("train"), train=True)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.global_batch_size,
        learning_rate=rate.peak,
        warmup_steps=rate.warmup(math.ceil(training.epochs * len(instances) / training.global_batch_size)),
        lr_scheduler_type=rate.schedule,
        weight_decay=settings.optimizer.weight_decay,
        max_grad_norm=settings.optimizer.clip_grad_norm,
        seed=seed,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        remove_unused_columns=False,
        bf16=settings.precision.compute == "bfloat16",
        use_cpu=training.device != "cuda" and not torch.cuda.is_available(),
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=instances,
        data_collator=lambda chosen: collate(chosen, task.head, tokenizer.pad_id),
        callbacks=[Follow()],
    )
    began = time.perf_counter()
    trainer.train()
    return best, time.perf_counter() - began - evaluating
