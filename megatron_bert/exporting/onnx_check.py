# SPDX-License-Identifier: Apache-2.0
"""How near an ONNX graph is to the integer engine, on random tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from megatron_bert.ibert.engine.model import IntegerModel
from megatron_bert.ibert.engine.plan import Plan
from megatron_bert.model.task_heads.table import HEADS

_SEQUENCES, _LENGTH = 4, 32


def compare_with_integers(path: Path, plan: Plan) -> str:
    """Run both on the same tokens; a sentence on the graph's signal to noise against the engine's, or why not."""
    try:
        import onnxruntime
    except ImportError:
        return "not compared with the integer engine, as onnxruntime is not installed"
    generator = torch.Generator().manual_seed(0)
    length = min(_LENGTH, plan.longest)
    # From the middle of the vocabulary: no padding among them.
    words = plan.embeddings.word.shape[0]
    ids = torch.randint(words // 2, words, (_SEQUENCES, length), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
    integers: Any = _answer(plan, given)
    noise = signal = 0.0
    for output, values in zip(session.get_outputs(), found, strict=True):
        real, integer = torch.from_numpy(values).double(), integers[output.name].double()
        noise += float((real - integer).square().sum())
        signal += float(integer.square().sum())
    ratio = math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-30) / noise)
    return f"the graph in onnxruntime agrees with the integer engine to {ratio:.0f} dB on random tokens"


def _answer(plan: Plan, given: dict[str, Any]) -> Any:
    model = IntegerModel(plan)
    if plan.task not in HEADS or not HEADS[plan.task].grouped:
        return model(**given)
    # The graph scores sequences one by one.
    answer = model(**{name: tensor[:, None] for name, tensor in given.items()})
    return {"logits": answer.logits}
