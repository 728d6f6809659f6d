# SPDX-License-Identifier: Apache-2.0
"""Small vocabularies and files for the tests of tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bert.data.tokenizers import Tokenizer, load_tokenizer
from megatron_bert.tasks.registry import build_task
from megatron_bert.tasks.settings import TaskDataSettings, TaskSettings
from megatron_bert.tasks.task import Task

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [*"abcdefghijklmnopqrstuvwxyz0123456789.,?!'-_()"]


def letter_tokenizer(folder: Path) -> Tokenizer:
    """Lower-casing WordPiece in which every letter is a piece, and a few words are one."""
    pieces = SPECIAL + LETTERS + [f"##{letter}" for letter in LETTERS] + ["the", "cat", "sat", "mat", "##ing"]
    path = folder / "vocab.txt"
    path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return load_tokenizer(path)


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def json_lines(path: Path, rows: Sequence[Any]) -> Path:
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def task_of(tokenizer: Tokenizer, settings: dict[str, Any], data: dict[str, Any] | None = None) -> Task[Any, Any]:
    return build_task(TaskSettings(**settings), TaskDataSettings(**(data or {})), tokenizer)


def scores_for(classes: Sequence[int], outputs: int) -> list[np.ndarray]:
    """Logits that say these classes."""
    return [np.eye(outputs, dtype=np.float32)[number] * 5 for number in classes]
