# SPDX-License-Identifier: Apache-2.0
"""One line for each table: in a package of a user here, and in the project in the tables themselves."""

from megatron_bert.convert.formats import FORMATS
from megatron_bert.ibert.activations import INTEGER_ACTIVATIONS
from megatron_bert.model.activations import ACTIVATIONS
from megatron_bert.model.task_heads.table import HEADS
from megatron_bert.tables import DECAYS, OPTIMIZERS
from megatron_bert.tasks.table import TASKS, TaskKind
from parallel.pipeline.schedules import SCHEDULES

from .activation import squared_relu
from .checkpoint_format import NumpyArchive
from .head_kind import PointerKind
from .integer_function import SQUARED_RELU
from .learning_rate import quadratic
from .pipeline_schedule import REVERSED

ACTIVATIONS["squared_relu"] = squared_relu  # activation
INTEGER_ACTIVATIONS["squared_relu"] = SQUARED_RELU  # integer function
DECAYS["quadratic"] = quadratic  # learning-rate schedule
SCHEDULES["reversed"] = REVERSED  # pipeline schedule
OPTIMIZERS["lion"] = f"{__name__}.optimizer:Lion"  # optimizer
HEADS["pointer"] = PointerKind()  # kind of head
TASKS["pointer"] = TaskKind(f"{__name__}.task:PointerTask", head="pointer", max_length=16)  # task
FORMATS["numpy"] = NumpyArchive()  # checkpoint format
