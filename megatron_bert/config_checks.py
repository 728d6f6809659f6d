# SPDX-License-Identifier: Apache-2.0
"""The checks between settings, before any process group starts."""

from __future__ import annotations

from megatron_bert.config import RunSettings, Settings
from megatron_bert.config_sections import LearningRateSettings
from megatron_bert.model.configuration import EncoderConfig, MegatronBertConfig
from parallel.errors import UserError
from parallel.mesh import ParallelLayout
from parallel.pipeline.actions import Backward


def check_settings(settings: Settings, world_size: int) -> ParallelLayout:
    """Every check of a pretraining run that involves more than one field, before any process group; the layout.

    Raises:
        UserError: two settings, or a setting and the number of processes, do not go together.
    """
    model, data = settings.model, settings.data
    layout = check_layout(settings, world_size)
    # Of any vocabulary: that of the run has not been read yet.
    encoder = settings.model_config_for(MegatronBertConfig.vocab_size, MegatronBertConfig.pad_token_id)
    check_tensor_size(layout.tensor, encoder)
    tokens = settings.training.micro_batch_size * data.seq_length
    if layout.sequence and tokens % layout.tensor:
        raise UserError(
            f"parallel.sequence divides the {tokens} tokens of a micro batch (training.micro_batch_size x "
            f"data.seq_length) over {layout.tensor} tensor ranks, which does not come out even: change "
            "data.seq_length or training.micro_batch_size"
        )
    if data.seq_length > model.max_position_embeddings:
        raise UserError(
            f"data.seq_length {data.seq_length} is above model.max_position_embeddings "
            f"{model.max_position_embeddings}: raise the latter or shorten the sequences"
        )
    if model.type_vocab_size < 2 and data.pair_objective != "none":
        raise UserError(
            f"data.pair_objective {data.pair_objective} needs two token types, but model.type_vocab_size is "
            f"{model.type_vocab_size}: set it to 2, or data.pair_objective=none"
        )
    if settings.max_predictions > data.seq_length:
        raise UserError(
            f"data.max_predictions {settings.max_predictions} is above data.seq_length {data.seq_length}: lower it"
        )
    if data.row_samples is not None and not data.packed:
        raise UserError(
            f"data.row_samples is {data.row_samples}, but there are no rows while data.packed is false: remove it, or "
            "set data.packed=true"
        )
    if settings.training.spike_threshold and not settings.checkpoint.every:
        raise UserError(
            f"training.spike_threshold is {settings.training.spike_threshold}, but checkpoint.every is 0, so there is "
            "no checkpoint to return to: set checkpoint.every, or training.spike_threshold=0"
        )
    if settings.training.cuda_graphs:
        _check_graphs(settings, layout)
    settings.divide_layers(encoder.num_hidden_layers, settings.schedule(layout).stages)
    if settings.training.steps:
        check_learning_rate(settings.learning_rate, settings.training.steps)
    return layout


def check_layout(settings: RunSettings, world_size: int) -> ParallelLayout:
    """Checks of any run that need neither its model nor its data; the layout.

    Raises:
        UserError: two settings, or a setting and the number of processes, do not go together.
    """
    sharding, shard_size = settings.parallel.sharding, settings.parallel.shard_size
    training = settings.training
    if (sharding == "hybrid") != (shard_size is not None):
        raise UserError(
            f"parallel.sharding is {sharding} and parallel.shard_size is {shard_size}: hybrid sharding needs a "
            "shard_size (ranks per group, for example the GPUs of a node), the others take none"
        )
    layout = settings.layout(world_size)
    step = layout.data * training.micro_batch_size
    if training.global_batch_size % step:
        raise UserError(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of data-parallel size "
            f"{layout.data} x training.micro_batch_size {training.micro_batch_size} = {step}: change one of them"
        )
    schedule = settings.schedule(layout)
    if schedule.backward is Backward.SPLIT and training.compile:
        raise UserError(
            f"parallel.schedule {schedule.name} computes weight gradients on their own, which compiled layers cannot: "
            "set training.compile=false, or choose 1f1b or interleaved-1f1b"
        )
    if settings.precision.compute == "float16" and training.device == "cpu":
        raise UserError("precision.compute float16 needs a GPU: choose bfloat16 or float32 with training.device=cpu")
    return layout


def _check_graphs(settings: Settings, layout: ParallelLayout) -> None:
    """What stands against CUDA graphs, and what to set.

    Raises:
        UserError: something does.
    """
    training, sharding = settings.training, settings.parallel.sharding
    reasons = (
        (training.device == "cpu", "training.device is cpu, and graphs are of GPUs", "training.device=cuda"),
        (not settings.data.packed, "data.packed is false, so micro batches differ in shape", "data.packed=true"),
        (
            layout.data > 1 and sharding in ("full", "hybrid"),
            f"parallel.sharding is {sharding}, which frees gathered weights in every pass",
            "parallel.sharding=optimizer",
        ),
        (
            training.recompute == "full" and settings.model.attention_probs_dropout_prob > 0,
            "training.recompute is full, whose attention would have to draw its dropout from the same state of torch's "
            "generator again",
            "training.recompute=selective or model.attention_probs_dropout_prob=0",
        ),
    )
    for stands, reason, remedy in reasons:
        if stands:
            raise UserError(f"training.cuda_graphs is true, but {reason}: set {remedy}, or training.cuda_graphs=false")


def check_tensor_size(tensor: int, encoder: EncoderConfig) -> None:
    """What the tensor ranks divide must come out even.

    Raises:
        UserError: it does not.
    """
    for name in ("num_attention_heads", "intermediate_size", "vocab_size_multiple"):
        size = getattr(encoder, name)
        if size % tensor:
            other = f", or set model.{name}={size * tensor}" if name.endswith("multiple") else ""
            raise UserError(
                f"model.{name} is {size}, which parallel.tensor {tensor} does not divide: choose a tensor size that "
                f"does{other}"
            )


def check_learning_rate(rate: LearningRateSettings, total_steps: int) -> None:
    """The schedule must fit a run of ``total_steps``.

    Raises:
        UserError: it does not.
    """
    decay = rate.decay_steps or total_steps
    if rate.minimum > rate.peak:
        raise UserError(f"learning_rate.minimum {rate.minimum} is above learning_rate.peak {rate.peak}: lower it")
    if rate.warmup_steps and rate.warmup_fraction is not None:
        raise UserError(
            f"learning_rate.warmup_steps {rate.warmup_steps} and learning_rate.warmup_fraction {rate.warmup_fraction} "
            "both say how long the warm-up is: remove one of them"
        )
    warmup = rate.warmup(total_steps)
    if warmup >= decay and rate.schedule != "constant":
        raise UserError(
            f"learning_rate.warmup_steps {warmup} leaves no step to decay before step {decay}: shorten the "
            "warm-up, or raise learning_rate.decay_steps"
        )
    if rate.schedule != "wsd" and rate.wsd_decay_steps is not None:
        raise UserError(
            f"learning_rate.wsd_decay_steps is set but learning_rate.schedule is {rate.schedule}: set it to wsd, "
            "or remove wsd_decay_steps"
        )
    if rate.schedule == "wsd" and (rate.wsd_decay_steps or 0) > decay - warmup:
        raise UserError(
            f"learning_rate.wsd_decay_steps {rate.wsd_decay_steps} is longer than the "
            f"{decay - warmup} steps after warm-up: shorten it"
        )
