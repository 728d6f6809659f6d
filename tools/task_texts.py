# SPDX-License-Identifier: Apache-2.0
"""Texts of a task's training examples as JSON lines, for pretraining on them before fine-tuning.

An encoder that has read the words of a task, and not its labels, learns it from fewer examples (task-adaptive
pretraining; Gururangan et al., arXiv 2004.10964). A line holds one example's text: a text and what it is paired with, a
passage, or a question and its right choice, which both objectives of pretraining then bring together::

    python -m tools.task_texts configs/finetune/arc.yaml --output texts.jsonl
    megatron-bert preprocess --input texts.jsonl --tokenizer ENCODER --output-prefix texts
    megatron-bert pretrain CONFIG.yaml model.from=ENCODER data.train=texts_text_sentence

Examples whose passage, question or first text also stands in a held-out split are left out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_bert.ending import command
from megatron_bert.finetuning.results import write_predictions
from megatron_bert.tasks.choice_files import ChoiceExample
from megatron_bert.tasks.sequence import TextExample
from megatron_bert.tasks.squad_files import SpanExample
from megatron_bert.tasks.task import Task
from parallel.whole_files import reporting
from tools.task_scores import task_of_file


def parts(example: Any) -> tuple[str, ...]:
    """What an example says, a paragraph each; of the choices only the right one."""
    if isinstance(example, ChoiceExample):
        given = (example.context, example.question, None if example.answer is None else example.choices[example.answer])
    elif isinstance(example, SpanExample):
        given = (example.context,)
    elif isinstance(example, TextExample):
        given = (example.text, example.text_pair)
    else:
        given = (example.text,)
    return tuple(" ".join(part.split()) for part in given if part and part.strip())


def training_texts(tasks: list[Task[Any, Any]]) -> list[str]:
    """Each text of the training examples once, without those that begin as an example that is held out does."""
    held_out = {
        parts(example)[:1]
        for task in tasks
        for split in (*task.valid_splits, *task.test_splits)
        for example in task.examples(split)
    }
    texts: dict[tuple[str, ...], None] = {}
    for task in tasks:
        texts |= dict.fromkeys(map(parts, task.examples("train")))
    return ["\n".join(text) for text in texts if text and text[:1] not in held_out]


@command("task_texts")
def main(given: list[str] | None = None) -> int:
    """Read tasks, write their texts; 0 on success, 2 for mistakes a user can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="settings of fine-tuning")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines file to write")
    arguments = parser.parse_args(given)
    texts = training_texts([task_of_file(file) for file in arguments.files])
    with reporting("written", arguments.output, "give another"):
        write_predictions(arguments.output, ({"text": text} for text in texts))
    print(f"{arguments.output}: {len(texts):,} texts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
