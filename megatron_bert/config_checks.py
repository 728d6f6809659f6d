"""The checks between settings, before any process group starts."""

from __future__ import annotations

from megatron_bert.config import Settings
from megatron_bert.model.configuration import ACTIVATIONS
from parallel.errors import UserError
from parallel.mesh import ParallelLayout
from parallel.pipeline.actions import Backward


def check_settings(settings: Settings, world_size: int) -> ParallelLayout:
    """Every check that involves more than one field; runs before any process group starts.

    Returns:
        The layout, now known to fit.

    Raises:
        UserError: two settings, or a setting and the number of processes, do not go together.
    """
    model, data, training = settings.model, settings.data, settings.training
    sharding, shard_size = settings.parallel.sharding, settings.parallel.shard_size
    if (sharding == "hybrid") != (shard_size is not None):
        raise UserError(
            f"parallel.sharding is {sharding} and parallel.shard_size is {shard_size}: hybrid sharding needs a "
            "shard_size (ranks a group, for example the GPUs of a node), the others take none"
        )
    layout = settings.layout(world_size)
    if model.hidden_act not in ACTIVATIONS:
        raise UserError(f"model.hidden_act is {model.hidden_act!r}: choose one of {', '.join(ACTIVATIONS)}")
    if model.hidden_size % model.num_attention_heads:
        raise UserError(
            f"model.hidden_size {model.hidden_size} is not a multiple of model.num_attention_heads "
            f"{model.num_attention_heads}: every head needs the same number of dimensions"
        )
    _check_tensor_sizes(settings, layout)
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
    step = layout.data * training.micro_batch_size
    if training.global_batch_size % step:
        raise UserError(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of data-parallel size "
            f"{layout.data} x training.micro_batch_size {training.micro_batch_size} = {step}: change one of them"
        )
    _check_pipeline(settings, layout)
    _check_learning_rate(settings)
    if settings.precision.compute == "float16" and training.device == "cpu":
        raise UserError("precision.compute float16 needs a GPU: choose bfloat16 or float32 with training.device=cpu")
    return layout


def _check_tensor_sizes(settings: Settings, layout: ParallelLayout) -> None:
    model, tensor = settings.model, layout.tensor
    intermediate = model.intermediate_size or 4 * model.hidden_size
    for name, size in (
        ("model.num_attention_heads", model.num_attention_heads),
        ("model.intermediate_size", intermediate),
        ("model.vocab_size_multiple", model.vocab_size_multiple),
    ):
        if size % tensor:
            raise UserError(
                f"{name} is {size}, which parallel.tensor {tensor} does not divide: choose a tensor size that does"
                + (f", or set {name}={size * tensor}" if name.endswith("multiple") else "")
            )
    tokens = settings.training.micro_batch_size * settings.data.seq_length
    if layout.sequence and tokens % tensor:
        raise UserError(
            f"parallel.sequence divides the {tokens} tokens of a micro batch (training.micro_batch_size x "
            f"data.seq_length) over {tensor} tensor ranks, which does not come out even: change data.seq_length"
        )


def _check_pipeline(settings: Settings, layout: ParallelLayout) -> None:
    schedule = settings.schedule(layout)
    settings.stage_parts(schedule, padded_vocab_size=0)
    if schedule.backward is Backward.SPLIT and settings.training.compile:
        raise UserError(
            f"parallel.schedule {schedule.name} computes weight gradients on their own, which compiled layers cannot: "
            "set training.compile=false, or choose 1f1b or interleaved-1f1b"
        )


def _check_learning_rate(settings: Settings) -> None:
    rate = settings.learning_rate
    decay = rate.decay_steps or settings.training.steps
    if rate.minimum > rate.peak:
        raise UserError(f"learning_rate.minimum {rate.minimum} is above learning_rate.peak {rate.peak}: lower it")
    if rate.warmup_steps >= decay and rate.schedule != "constant":
        raise UserError(
            f"learning_rate.warmup_steps {rate.warmup_steps} leaves no step to decay before step {decay}: shorten the "
            "warm-up, or raise learning_rate.decay_steps"
        )
    if rate.schedule != "wsd" and rate.wsd_decay_steps is not None:
        raise UserError(
            f"learning_rate.wsd_decay_steps is set but learning_rate.schedule is {rate.schedule}: set it to wsd, "
            "or remove wsd_decay_steps"
        )
    if rate.schedule == "wsd" and (rate.wsd_decay_steps or 0) > decay - rate.warmup_steps:
        raise UserError(
            f"learning_rate.wsd_decay_steps {rate.wsd_decay_steps} is longer than the "
            f"{decay - rate.warmup_steps} steps after warm-up: shorten it"
        )
