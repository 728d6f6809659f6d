# SPDX-License-Identifier: Apache-2.0
"""The sections of settings that every kind of run has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_bert.section import Section
from megatron_bert.tables import DECAYS, OPTIMIZERS, TRACKERS, one_of
from parallel.mesh import Sharding
from parallel.pipeline.schedules import SCHEDULES
from parallel.recompute import Recompute

#: Bound of rates and scales of weights. Weights that are larger overflow within a step or two.
LARGEST_SCALE = 1e3
#: Seconds of the longest wait; the system's own clocks overflow not far above it.
LONGEST_WAIT = 1e8


class TokenizerSettings(Section):
    """The vocabulary of the corpora."""

    path: Path = Field(
        description="vocab.txt, tokenizer.json, vocab.json with merges.txt beside it, a sentencepiece .model, or a "
        "directory with one of them."
    )
    lowercase: bool | None = Field(
        None,
        description="Whether text is lower-cased; found from a vocab.txt, or the tokenizer_config.json beside it, when "
        "unset.",
    )


class ParallelSettings(Section):
    """How the processes divide the work."""

    tensor: int = Field(1, gt=0, description="Ranks that share every layer's matrices.")
    pipeline: int = Field(1, gt=0, description="Ranks that share the stack of layers.")
    schedule: Annotated[str, one_of(SCHEDULES)] = Field(
        "1f1b", description=f"Order of a pipeline step: {', '.join(SCHEDULES)}; see `megatron-bert schedule`."
    )
    virtual_stages: int | None = Field(
        None, gt=0, description="Stages on each pipeline rank; the least the schedule takes when unset."
    )
    stage_layers: list[int] | None = Field(
        None, description="Layers of each stage; balanced by the cost of embedding and heads when unset."
    )
    data: int | None = Field(
        None, gt=0, description="Ranks that share the batch; what the other axes leave when unset."
    )
    elastic: bool = Field(
        False,
        description="Take fewer data ranks, the most that divide the batch, when fewer processes are there than before "
        "(a host was lost); `data` is then the most. Processes left over wait.",
    )
    sequence: bool = Field(False, description="Divide activations by token over the tensor ranks between the matrices.")
    sharding: Sharding = Field(
        "none",
        description="What data ranks divide: none, optimizer (states), full (gradients and weights, too), or hybrid "
        "(full inside groups of shard_size ranks, copied between them). The flat buffers of none and optimizer "
        "have not been run on a GPU yet.",
    )
    shard_size: int | None = Field(None, gt=1, description="Ranks per shard group, for hybrid sharding.")
    timeout_seconds: float = Field(
        600.0, gt=0, le=LONGEST_WAIT, description="How long a collective waits for the other ranks, in seconds."
    )


class OptimizerSettings(Section):
    """An optimizer with decoupled weight decay; biases and norms do not decay."""

    name: Annotated[str, one_of(OPTIMIZERS)] = Field(
        "adamw",
        description="lamb scales the step of every matrix to the size of the matrix, which keeps batches of tens of "
        "thousands of sequences stable, at a peak learning rate some ten times that of adamw.",
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the gradient's running mean.")
    beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the squared gradient's running mean.")
    eps: float = Field(1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(
        0.01, ge=0, le=LARGEST_SCALE, description="Share of a weight removed a step, times the learning rate."
    )
    weight_decay_by_name: dict[str, Annotated[float, Field(ge=0, le=LARGEST_SCALE)]] = Field(
        default_factory=dict,
        description="Weight decay of parameters whose names match a pattern (* and ?), such as "
        "'*.word_embeddings.weight': 0; the first that matches counts. Others have weight_decay if they are matrices.",
    )
    clip_grad_norm: float = Field(1.0, ge=0, description="Largest L2 norm of the whole gradient; 0 does not clip.")


class LearningRateSettings(Section):
    """Warm-up, then a decay."""

    peak: float = Field(1e-4, gt=0, le=LARGEST_SCALE, description="Learning rate at the end of the warm-up.")
    minimum: float = Field(0.0, ge=0, le=LARGEST_SCALE, description="Learning rate after the end of the decay.")
    schedule: Annotated[str, one_of(DECAYS, "constant", "wsd")] = Field(
        "linear", description="Shape after warm-up: linear, cosine, sqrt, constant, or wsd: warm-up, stable, decay."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up from 0.")
    warmup_fraction: float | None = Field(
        None, ge=0, lt=1, description="Share of all steps that warm up, in place of warmup_steps."
    )
    decay_steps: int | None = Field(
        None, gt=0, description="Steps after which the minimum is reached; training.steps when unset."
    )
    wsd_decay_steps: int | None = Field(
        None, gt=0, description="Length of the final decay of wsd, in steps; a tenth of decay_steps when unset."
    )
    wsd_decay_shape: Annotated[str, one_of(DECAYS)] = Field(
        "sqrt",
        description="Shape of the final decay of wsd: linear, cosine, or sqrt, which falls as 1 - sqrt(progress).",
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Factor on the learning rate from each layer to the one below it; heads have the full rate, the "
        "embeddings the lowest.",
    )

    def warmup(self, total_steps: int) -> int:
        """Steps of warm-up in a run of ``total_steps``."""
        return self.warmup_steps if self.warmup_fraction is None else round(self.warmup_fraction * total_steps)


class PrecisionSettings(Section):
    """Number formats; parameters and optimizer states are float32 always."""

    compute: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Format of matrix products.")
    initial_loss_scale: float = Field(65536.0, gt=0, description="float16: first factor on the loss.")
    loss_scale_growth_interval: int = Field(
        1000, gt=0, description="float16: steps without overflow before the loss scale doubles."
    )


class RunTrainingSettings(Section):
    """Batch and place of a run."""

    run_dir: Path = Field(description="Directory of the run's files.")
    global_batch_size: int = Field(
        gt=0, description="Samples, or rows of packed data, an optimizer step, over all ranks."
    )
    micro_batch_size: int = Field(gt=0, description="Samples, or rows, a forward pass on one data rank.")
    seed: int = Field(1234, ge=0, lt=2**62, description="Seed of initial weights, data order, masks and dropout.")
    recompute: Recompute = Field(
        "none",
        description="Activations computed again in the backward pass: none, selective (the activation of the MLP, "
        "and attention that is not fused), full (everything but layer inputs).",
    )
    compile: bool | Literal["all"] = Field(
        False,
        description="Compile each layer with torch.compile; pays off on GPUs. all compiles embeddings, dropout keys "
        "and, in pretraining, the masked-language head and losses as well; it has not been run on a GPU yet.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where to compute; auto takes CUDA if there is any."
    )
    max_minutes: float | None = Field(None, gt=0, description="Save and stop after this many minutes.")


class CheckpointSettings(Section):
    """Saving and resuming."""

    every: int = Field(1000, ge=0, description="Steps between checkpoints; 0 saves at the end only.")
    keep: int = Field(2, ge=0, description="Newest checkpoints kept; 0 keeps all.")
    keep_every: int = Field(
        0, ge=0, description="Checkpoints of the steps that this divides are kept for good; 0 keeps none of them so."
    )
    keep_best: int = Field(
        0,
        ge=0,
        description="Checkpoints kept, whatever their age, of the evaluations with the lowest held-out loss; each "
        "evaluation that is among them saves one.",
    )
    resume: str = Field(
        "auto",
        description="auto (newest of the run directory, if any), none (begin with the first step), or a checkpoint's "
        "path; none and a path are refused while the run directory holds later checkpoints of another command.",
    )
    asynchronous: bool = Field(
        True,
        description="Write while training goes on. A save that fails is then a warning, and the next is made when "
        "it is due; the run ends if three in a row fail, or the last one does.",
    )
    timeout_seconds: float = Field(
        1800.0,
        gt=0,
        le=LONGEST_WAIT,
        description="How long a checkpoint may take to write, in seconds, whatever parallel.timeout_seconds is; a disk "
        "that takes longer is a save that fails.",
    )

    compare_replicas_every: int | None = Field(
        None,
        ge=0,
        description="Steps between comparisons of the copies that several ranks hold of weights and optimizer states; "
        "a rank whose copy was damaged is named, and the run ends. Copies are also compared before every checkpoint, "
        "and only there when unset; 0 never compares them.",
    )


class LoggingSettings(Section):
    """What a run reports."""

    every: int = Field(10, gt=0, description="Steps between logged lines.")
    trace: bool = Field(
        False, description="Record the pipeline timeline of logged steps as pictures and Chrome traces in `traces`."
    )
    profile: str | None = Field(
        None,
        pattern=r"^[1-9][0-9]*:[1-9][0-9]*$",
        description="START:STOP, the first and the last step that torch's profiler records: a trace of each pipeline "
        "stage for viewers, and tables of the time by part of the model, in `profile`. A few steps are enough.",
    )
    tensorboard: bool = Field(True, description="Write TensorBoard event files.")
    trackers: list[Annotated[str, one_of(TRACKERS)]] = Field(
        default_factory=list,
        description="Further places for metrics: wandb (Weights & Biases; offline with WANDB_MODE=offline) and mlflow "
        "(MLFLOW_TRACKING_URI, or files in the run directory). Their libraries are installed separately.",
    )
    project: str = Field("megatron-bert", description="Project (wandb) or experiment (mlflow) that the run belongs to.")
    progress: bool | None = Field(None, description="Show a progress bar; on a terminal only when unset.")
    peak_tflops: float | None = Field(
        None,
        gt=0,
        description="Peak of one device for the compute format, in TFLOP/s, for the MFU; "
        "looked up from the device's name when unset.",
    )

    @property
    def profiled_steps(self) -> range:
        """Those that ``profile`` names; empty without."""
        first, last = map(int, (self.profile or "1:0").split(":"))
        return range(first, last + 1)

    @model_validator(mode="after")
    def _profiles_forward(self) -> Self:
        if self.profile is not None and not self.profiled_steps:
            raise ValueError(f"logging.profile is {self.profile}, which has no step: give START:STOP, such as 10:12")
        return self
