# SPDX-License-Identifier: Apache-2.0
"""A quantized model of a task, run by an integer engine where a float model would be."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from megatron_bert.ibert.engine.model import IntegerModel
from megatron_bert.ibert.engine.plan_file import PLAN_NAME
from megatron_bert.ibert.quantization import is_quantized
from megatron_bert.model.batch import TaskBatch
from megatron_bert.model.finetuning import BertForTask
from megatron_bert.model.stage import ModelStage
from megatron_bert.tasks.task import Head
from parallel.errors import UserError


class IntegerTask(ModelStage):
    """The logits of a task's rows, computed by an engine; without parameters, on the CPU."""

    def __init__(self, model: IntegerModel) -> None:
        super().__init__(model.config)
        self.model = model

    def forward(self, batch: TaskBatch, dropout_seed: int | None = None, received: Tensor | None = None) -> Tensor:
        """float32 ``[R, outputs]``, as :class:`BertForTask` gives them without dropout."""
        assert dropout_seed is None, "an engine does not train"
        assert received is None, "an engine runs whole models"
        lengths = batch.layout.lengths[: len(batch.lengths)]  # what follows is filling
        tokens = sum(lengths)
        positions = batch.positions + self.config.first_position
        packed = self.model.pack(batch.tokens[:tokens], positions[:tokens], batch.types[:tokens], lengths)
        return self.model.head("classifier", self.model.encode(packed)[batch.rows])


def integer_task(
    model: BertForTask | None, head: Head, directory: Path, backend: str, threads: int | None
) -> IntegerTask:
    """A task's model in integers: by the plan beside it, or compiled now where there is none.

    Args:
        model: as it was loaded, with ranges if it is quantized; None where there is a plan and no weights.
        backend, threads: of the engine.

    Raises:
        UserError: it is a float model, or the plan is that of another.
    """
    name, path = "auto" if backend == "integer" else backend, directory / PLAN_NAME
    if model is not None and not is_quantized(model):
        raise UserError(
            f"--backend {backend} runs quantized models, but {directory} is in floating point: `megatron-bert "
            "quantize` it, or leave --backend out"
        )
    if model is not None and not path.is_file():
        return IntegerTask(IntegerModel.from_model(model, name, threads))
    loaded = IntegerModel.from_pretrained(path, name, threads)
    classifier = loaded.plan.heads.classifier
    if loaded.plan.task != head.kind or classifier is None or len(classifier.matrix.bias) != head.outputs:
        raise UserError(f"{path} is the plan of another model: export this one again")
    return IntegerTask(loaded)
