# SPDX-License-Identifier: Apache-2.0
"""A small pretrained encoder, small data of every kind of task, and runs over them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_bert import MegatronBertConfig, MegatronBertForPreTraining
from megatron_bert.family.tokenizer import save_tokenizer
from megatron_bert.finetuning import finetune as finetune_module
from megatron_bert.finetuning import inference
from megatron_bert.finetuning.settings import FinetuneSettings
from megatron_bert.model.configuration import EncoderConfig
from megatron_bert.quantizing import quantize as quantize_module
from megatron_bert.tasks.encoding import Feature
from megatron_bert.tasks.task import Head, Instance
from megatron_bert.training import running
from parallel.process_group import World
from tests.megatron_bert.data.support import small_vocabulary
from tests.pictures import leave_out_pictures
from tests.worlds import CPU, preload

preload(
    __name__,
    "megatron_bert.data.text_files",
    "megatron_bert.family.language",
    "megatron_bert.family.tokenizer",
    "megatron_bert.finetuning.inference",
    "megatron_bert.quantizing.quantize",
    "megatron_bert.tasks.metrics",
    "sklearn.metrics",
    "transformers.models.encoder_decoder",
)

WORDS = [f"w{number}" for number in range(90)]
CONFIG = EncoderConfig(
    vocab_size=95,
    vocab_size_multiple=32,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=24,
    initializer_range=0.1,
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
    layer_norm_eps=1e-5,
)
HEADS = {
    "single": Head("sequence", 3, "single_label_classification"),
    "multi": Head("sequence", 3, "multi_label_classification"),
    "regression": Head("sequence", 1, "regression"),
    "choice": Head("choice", 1),
    "token": Head("token", 5),
    "span": Head("span", 2),
}


def make_encoder(folder: Path, layers: int = CONFIG.num_hidden_layers) -> Path:
    """A directory with a pretrained encoder's weights and its vocabulary."""
    from megatron_bert.data.tokenizers import load_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(5)
    tokenizer = load_tokenizer(small_vocabulary(folder, WORDS))
    config = MegatronBertConfig.from_dict(CONFIG.to_dict() | {"num_hidden_layers": layers})
    MegatronBertForPreTraining(config).save_pretrained(folder / "encoder")
    save_tokenizer(tokenizer, folder / "encoder", CONFIG.max_position_embeddings)
    return folder / "encoder"


def _sentence(rng: np.random.Generator, label: int) -> str:
    """Words 0 to 29, half of them replaced by words that give the label away."""
    words = [f"w{number}" for number in rng.integers(30, size=rng.integers(3, 9))]
    for place in rng.permutation(len(words))[: len(words) // 2]:
        words[place] = f"w{30 + 10 * label + rng.integers(5)}"
    return " ".join(words)


def write_classes(path: Path, rows: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(rows):
        label = int(rng.integers(3))
        lines.append(json.dumps({"id": f"r{number}", "text": _sentence(rng, label), "label": "abc"[label]}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_questions(path: Path, rows: int, seed: int) -> Path:
    """Multiple choice in ARC's JSON lines: three or four choices."""
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(rows):
        count = int(rng.integers(3, 5))
        right = int(rng.integers(count))
        choices = [
            {"label": "ABCD"[place], "text": _sentence(rng, 2 if place == right else 1)} for place in range(count)
        ]
        question = {"stem": _sentence(rng, 0), "choices": choices}
        lines.append(json.dumps({"id": f"q{number}", "question": question, "answerKey": "ABCD"[right]}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_answers(path: Path, rows: int, seed: int) -> Path:
    """SQuAD: the answer is the word of the second class."""
    rng = np.random.default_rng(seed)
    paragraphs = []
    for number in range(rows):
        context = _sentence(rng, 1)
        answer = next(word for word in context.split() if 40 <= int(word[1:]) < 50)
        answers = [{"text": answer, "answer_start": context.index(answer)}]
        paragraphs.append({"context": context, "qas": [{"id": f"a{number}", "question": "w1 w2", "answers": answers}]})
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}), "utf-8")
    return path


def write_entities(path: Path, rows: int, seed: int) -> Path:
    """CoNLL columns: words from 40 on begin an entity."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(rows):
        for word in _sentence(rng, int(rng.integers(1, 3))).split():
            number = int(word[1:])
            tag = "O" if number < 40 else "B-X" if number < 50 else "B-Y"
            lines.append(f"{word}\t{tag}")
        lines.append("")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run_settings(folder: Path, **changes: Any) -> FinetuneSettings:
    """Settings of a run over the encoder and the classes in a folder.

    Args:
        folder: made by :func:`make_encoder` and a ``write_..`` function.
        **changes: values by ``section__key``, or whole sections.
    """
    tree: dict[str, Any] = {
        "model": {"from": folder / "encoder"},
        "task": {"name": "classification", "max_length": 16},
        "data": {"train": folder / "train.jsonl", "valid": folder / "valid.jsonl", "columns": {"id": "id"}},
        "parallel": {},
        "optimizer": {},
        "precision": {},
        "checkpoint": {"asynchronous": False},
        "learning_rate": {"peak": 3e-3},
        "training": {
            "run_dir": folder / "run",
            "epochs": 2,
            "global_batch_size": 16,
            "micro_batch_size": 8,
            "device": "cpu",
        },
        "logging": {"every": 1, "tensorboard": False, "progress": False},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            tree[section][key] = value
        else:
            tree[section] = value
    return FinetuneSettings.model_validate(tree)


def make_run(folder: Path, layers: int = CONFIG.num_hidden_layers, **changes: Any) -> FinetuneSettings:
    """An encoder, training and validation data for a run, and its settings."""
    make_encoder(folder, layers)
    write_classes(folder / "train.jsonl", 120, 1)
    write_classes(folder / "valid.jsonl", 40, 2)
    return run_settings(folder, **changes)


def join_world() -> None:
    """Let commands run in this rank of a test's world, which they would otherwise start."""

    @contextmanager
    def joined(*_: Any) -> Iterator[World]:
        yield World(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=dist.get_rank(), device=CPU)

    for module in (running, inference):
        module.process_group = joined  # type: ignore[attr-defined]
    leave_out_pictures()  # for good: this process ends with the run
    for module in (finetune_module, inference, quantize_module):
        module.launched_world_size = dist.get_world_size  # type: ignore[attr-defined]


def random_instances(kind: str, count: int, seed: int = 7) -> list[Instance]:
    """Instances for a head of ``HEADS``, some of them without a label."""
    rng = np.random.default_rng(seed)
    head, instances = HEADS[kind], []
    for number in range(count):
        features = []
        for _ in range(int(rng.integers(2, 5)) if head.kind == "choice" else 1):
            length = int(rng.integers(4, 13))
            tokens = rng.integers(5, 95, size=length)
            rows = {"token": np.arange(1, length - 1), "span": np.arange(length)}.get(head.kind, np.array([0]))
            features.append(Feature(tokens, np.sort(rng.integers(2, size=length)), rows))
        instances.append(Instance(tuple(features), _label(head, features, rng, unlabeled=number == count - 1), number))
    return instances


def _label(head: Head, features: list[Feature], rng: np.random.Generator, unlabeled: bool) -> np.ndarray:
    if head.problem in ("multi_label_classification", "regression"):
        label = rng.integers(2, size=head.outputs).astype(np.float32)
        return np.full_like(label, np.nan) if unlabeled else label
    size, highest = {
        "sequence": (1, head.outputs),
        "choice": (1, len(features)),
        "token": (len(features[0].rows), head.outputs),
        "span": (2, len(features[0].rows)),
    }[head.kind]
    return np.full(size, -100) if unlabeled else rng.integers(highest, size=size)
