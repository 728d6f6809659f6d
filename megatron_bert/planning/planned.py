# SPDX-License-Identifier: Apache-2.0
"""Settings of any kind of run as a workload to plan for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_bert.config import RunSettings, Settings
from megatron_bert.config_checks import check_learning_rate, check_tensor_size
from megatron_bert.config_file import load_settings, read_tree, validated
from megatron_bert.config_sections import ParallelSettings
from megatron_bert.data.sidecar import check_tokenizer
from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.task_heads.table import HEADS
from megatron_bert.planning.devices import Device
from megatron_bert.planning.workload import USUAL_VOCABULARY, TaskHead, Workload, workload_of
from megatron_bert.quantizing.settings import QuantizeSettings
from megatron_bert.tables import RUNS, found_at
from megatron_bert.tasks.encoding import BERT, InputFormat, input_format
from megatron_bert.tasks.table import TASKS
from parallel.errors import UserError
from parallel.mesh import ParallelLayout

#: Choices of a question where nobody has looked at the data.
_USUAL_CHOICES = 4


@dataclass(frozen=True)
class Planned:
    """A run to plan.

    Attributes:
        check: what a start of the run asks of its settings and the number of processes; the layout.
        notes: what is assumed.
    """

    settings: RunSettings
    workload: Workload
    check: Callable[[RunSettings, int], ParallelLayout]
    notes: tuple[str, ...]

    def on(self, device: Device) -> Planned:
        """The same run where it is to train.

        Raises:
            UserError: it would not start there.
        """
        training, name, gpu = self.settings.training, device.name, device.asynchronous
        if training.device not in ("auto", "cuda" if gpu else "cpu"):
            raise UserError(
                f"training.device is {training.device}, but {name} is {'' if gpu else 'not '}a GPU: set "
                "training.device=auto, or choose another --gpu"
            )
        if self.workload.graphs and not gpu:
            raise UserError(
                f"training.cuda_graphs is true, but {name} is not a GPU: set training.cuda_graphs=false to train on "
                "processors"
            )
        if self.workload.compute not in device.peak_tflops:
            raise UserError(
                f"precision.compute is {self.workload.compute}, for which no peak of {name} is known: choose "
                f"{' or '.join(device.peak_tflops)}"
            )
        return replace(self, workload=replace(self.workload, fused_attention=gpu))


def load_planned(path: Path, overrides: list[str], encoder: Path | None = None) -> Planned:
    """Read settings of pretrain, finetune or quantize, distinguished by their sections.

    Args:
        encoder: settings of pretrain whose model a task's run is to start from, in place of a checkpoint.

    Raises:
        UserError: they cannot be read, the checkpoint that they start from cannot, or a start of the run would refuse
            them in any layout.
    """
    tree = read_tree(path, overrides)
    command = _command_of(tree)
    kind = RUNS[command]
    settings = validated(tree, found_at(kind.settings), source=str(path))
    check = found_at(kind.check)
    if isinstance(settings, Settings):
        if encoder is not None:
            raise UserError(f"--encoder {encoder} is for tasks, but {path} has settings of pretrain: leave it out")
        planned = _pretraining(settings, check)
    else:
        planned = _task(settings, check, encoder)
    planned.check(_in_simplest_layout(planned.settings), 1)
    return planned


def _command_of(tree: dict[str, Any]) -> str:
    if "task" not in tree:
        return "pretrain"
    return "quantize" if {"quantization", "distillation", "search"} & set(tree) else "finetune"


def _in_simplest_layout(settings: RunSettings) -> RunSettings:
    """The same run on one rank, of which no layout is refused."""
    training = settings.training
    simple = {"micro_batch_size": training.global_batch_size, "recompute": "none"}
    return settings.model_copy(update={"parallel": ParallelSettings(), "training": training.model_copy(update=simple)})


def _task(settings: Any, check: Callable[[Any, int], ParallelLayout], encoder: Path | None) -> Planned:
    from megatron_bert.finetuning.start import check_lengths

    config, form, notes = _start_of_task(settings, encoder)
    steps, task = settings.training.steps, TASKS[settings.task.name]
    if steps is None:
        notes.append("training.steps is not set, and the number of steps depends on the data: times are of one step")
    else:
        check_learning_rate(settings.learning_rate, steps)
    length = settings.task.max_length or task.max_length
    check_lengths(length, form, config)
    if isinstance(settings, QuantizeSettings):
        notes.append("memory and times are of the model before it is quantized: quantizers keep more, and take longer")
    kind = HEADS[task.head]
    if kind.grouped:
        notes.append(f"a question is counted with {_USUAL_CHOICES} choices")
    head = TaskHead(
        outputs=kind.outputs or 2,
        rows=1 if kind.by_sequence else length,
        pooled=kind.pooled,
        sequences=_USUAL_CHOICES if kind.grouped else 1,
    )

    def check_with_model(wanted: RunSettings, world_size: int) -> ParallelLayout:
        layout = check(wanted, world_size)
        check_tensor_size(layout.tensor, config)
        wanted.divide_layers(config.num_hidden_layers, wanted.schedule(layout).stages)
        return layout

    return Planned(settings, workload_of(settings, config, steps, length, head), check_with_model, tuple(notes))


def _start_of_task(settings: Any, encoder: Path | None) -> tuple[MegatronBertConfig, InputFormat, list[str]]:
    """The encoder that a task's run starts from, how its inputs are laid out, and what is assumed."""
    from megatron_bert.finetuning.start import encoder_config, find_tokenizer
    from megatron_bert.training.pretrain import take_sizes

    start = settings.model.from_
    if encoder is not None:
        if _command_of(read_tree(encoder, [])) != "pretrain":
            raise UserError(
                f"--encoder {encoder} has settings of a task: give those of pretrain, for the model's sizes"
            )
        config, notes = _encoder(take_sizes(load_settings(encoder, [])))
        return settings.model.changed(config), BERT, [f"the model has the sizes of {encoder}", *notes]
    if not start.exists():
        raise UserError(
            f"model.from is {start}, which is not there: give a checkpoint, or a run that wrote one; or before there "
            "is one the settings that will pretrain it, with --encoder"
        )
    tokenizer = find_tokenizer(settings)
    config = encoder_config(settings, tokenizer)
    return config, input_format(tokenizer, roberta=config.like_roberta), []


def _pretraining(settings: Settings, check: Callable[[Any, int], ParallelLayout]) -> Planned:
    from megatron_bert.training.pretrain import take_sizes

    settings = take_sizes(settings)
    config, notes = _encoder(settings)
    workload = workload_of(settings, config, settings.training.steps, settings.data.seq_length)
    return Planned(settings, workload, check, notes)


def _encoder(settings: Settings) -> tuple[MegatronBertConfig, tuple[str, ...]]:
    """The encoder of a run with its vocabulary, or the usual one where that is not there; what is assumed."""
    path = settings.tokenizer.path
    if not path.exists():
        assumed = f"{path} is not there: a vocabulary of {USUAL_VOCABULARY:,} is assumed"
        return settings.model_config_for(USUAL_VOCABULARY, 0), (assumed,)
    tokenizer = load_tokenizer(path, lowercase=settings.tokenizer.lowercase)
    for corpus in [*settings.data.train, *(settings.data.valid or [])]:
        check_tokenizer(corpus.prefix, tokenizer)  # those that are there
    return settings.model_config_for(tokenizer.vocab_size, tokenizer.pad_id), ()
