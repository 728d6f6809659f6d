# SPDX-License-Identifier: Apache-2.0
"""All settings of a run as validated models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, model_validator

from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.configuration_checks import bounds
from megatron_bert.section import Section
from megatron_bert.tables import DECAYS, OPTIMIZERS, TRACKERS, one_of
from parallel.errors import called
from parallel.mesh import ParallelLayout, Sharding, data_shard_size, fit_data_size
from parallel.pipeline.actions import Schedule
from parallel.pipeline.schedules import SCHEDULES, build_schedule
from parallel.pipeline.stage import StagePart, split_layers
from parallel.recompute import Recompute

#: Bound of rates and scales of weights. Weights that are larger overflow within a step or two.
LARGEST_SCALE = 1e3
#: Seconds of the longest wait; the system's own clocks overflow not far above it.
LONGEST_WAIT = 1e8


def of_encoder(name: str, description: str, **changes: Any) -> Any:
    """A field of the encoder's configuration, with the default and the bounds that it has there.

    Args:
        name: of the field.
        description: for people.
        **changes: arguments of pydantic's Field in place of those or beside them.
    """
    default = getattr(MegatronBertConfig, name)
    return Field(**{"default": default, "description": description, **bounds(name), **changes})


class ModelSettings(Section):
    """The encoder; fields are named as in MegatronBertConfig. Defaults are the 345M model's.

    With ``from``, sizes that are not set are the checkpoint's.
    """

    from_: Path | None = Field(
        None,
        alias="from",
        description="Checkpoint to start from, of any format `megatron-bert inspect` knows: an NGC zip, a Megatron or "
        "Hugging Face directory, a run directory of this project.",
    )

    hidden_size: int = of_encoder("hidden_size", "Width of the residual stream.")
    num_hidden_layers: int = of_encoder("num_hidden_layers", "Number of transformer layers.")
    num_attention_heads: int = of_encoder("num_attention_heads", "Attention heads per layer; divides hidden_size.")
    intermediate_size: int | None = of_encoder(
        "intermediate_size", "Width of the feed-forward layer; 4 x hidden_size when unset.", default=None
    )
    hidden_act: str = of_encoder(
        "hidden_act", "gelu (exact, erf), gelu_new / gelu_pytorch_tanh (tanh approximation), relu, or silu / swish."
    )
    hidden_dropout_prob: float = of_encoder("hidden_dropout_prob", "Dropout of embeddings, attention and MLP output.")
    attention_probs_dropout_prob: float = of_encoder(
        "attention_probs_dropout_prob", "Dropout of attention probabilities."
    )
    max_position_embeddings: int = of_encoder("max_position_embeddings", "Longest sequence, in tokens.")
    type_vocab_size: int = of_encoder("type_vocab_size", "Number of token types (segments).")
    initializer_range: float = of_encoder(
        "initializer_range", "Standard deviation of initial weights.", gt=0, le=LARGEST_SCALE
    )
    scaled_output_init: bool = of_encoder(
        "scaled_output_init",
        "Initialize output projections with initializer_range / sqrt(2 x layers), as Megatron does.",
    )
    layer_norm_eps: float = of_encoder(
        "layer_norm_eps", "Added to the variance in every layer norm.", default=1e-5, gt=0
    )
    vocab_size_multiple: int = of_encoder(
        "vocab_size_multiple", "The vocabulary is padded to a multiple of this many rows, at every layout alike."
    )


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


class WeightedPrefix(Section):
    """One corpus of a blend."""

    prefix: Path = Field(description="Path of a .bin/.idx pair without the ending.")
    weight: float = Field(1.0, gt=0, description="Share of the samples, relative to the other corpora.")


def _as_list(value: Any) -> Any:
    """One corpus, or a list of them; each may be named by its prefix alone."""
    items = value if isinstance(value, list) else [value]
    return [{"prefix": item} if isinstance(item, str) else item for item in items]


Corpora = Annotated[
    list[WeightedPrefix],
    Field(min_length=1),
    BeforeValidator(_as_list, json_schema_input_type=str | Annotated[list[WeightedPrefix | str], Field(min_length=1)]),
]


class DataSettings(Section):
    """Corpora and how samples are made of them."""

    train: Corpora = Field(description="Corpora: one prefix, or a list of prefixes or of {prefix, weight}.")
    valid: Corpora | None = Field(
        None, description="Held-out corpora; by default a part of the training corpora set by `split`."
    )
    split: str = Field(
        "969,30,1",
        description="Documents of the training corpora for training, validation, test, in relative parts; 1,0,0 trains "
        "on all of them, without held-out scores.",
    )
    seq_length: int = Field(512, ge=8, description="Tokens per sample, special tokens included.")
    mask_probability: float = Field(0.15, gt=0, le=0.5, description="Share of the tokens to predict.")
    max_predictions: int | None = Field(
        None, gt=0, description="Most tokens to predict in a sample; mask_probability x seq_length when unset."
    )
    whole_word_masking: bool = Field(True, description="Mask all pieces of a word together.")
    max_ngram: int = Field(3, ge=1, description="Longest run of words masked together; n words with weight 1/n.")
    short_sequence_probability: float = Field(
        0.1, ge=0, lt=1, description="Share of samples with a random short length."
    )
    pair_objective: Literal["sop", "nsp", "none"] = Field(
        "sop",
        description="Sentence order prediction, next sentence prediction, or single segments, which use every token "
        "of the corpus once per epoch.",
    )
    packed: bool = Field(
        False,
        description="Pack samples into rows of seq_length tokens, 99% full and more, instead of padding each of them. "
        "Batch sizes then count rows. Single segments (pair_objective none) end inside sentences to fill them.",
    )
    row_samples: int | None = Field(
        None,
        gt=0,
        description="Most samples in a row of packed data; when unset the least of 4, 8, 16, ... that fills rows as "
        "well as no limit would.",
    )
    workers: int = Field(2, ge=0, description="Loader processes per rank; 0 loads in the training process.")
    cache_dir: Path | None = Field(
        None, description="Where sample indices are kept; `cache` in the run directory when unset."
    )


class ParallelSettings(Section):
    """How the processes divide the work."""

    tensor: int = Field(1, gt=0, description="Ranks that share every layer's matrices.")
    pipeline: int = Field(1, gt=0, description="Ranks that share the stack of layers.")
    schedule: str = Field(
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


class TrainingSettings(RunTrainingSettings):
    """Length, batch and place of a pretraining run."""

    cuda_graphs: bool = Field(
        False,
        description="Record forward and backward pass of a micro batch as a CUDA graph, and replay it for all of them: "
        "the host queues one launch in place of thousands. Needs data.packed, and neither pipeline stages, full or "
        "hybrid sharding nor recomputation. It has not been run on a GPU yet.",
    )

    steps: int = Field(
        ge=0, description="Optimizer steps; with 0 the model is evaluated on held-out data, and no more."
    )
    evaluate_every: int = Field(0, ge=0, description="Steps between evaluations; 0 evaluates at the end only.")
    evaluate_batches: int = Field(20, gt=0, description="Global batches of held-out samples an evaluation.")
    spike_threshold: float = Field(
        0.0,
        ge=0,
        description="Return to the last checkpoint, and leave out the data since, when the loss is above its median "
        "over the last spike_window steps by this many times its spread (median absolute deviation x 1.4826, at least "
        "1% of the median); 0 never does. Waits for the loss of every step. 10 is a start.",
    )
    spike_window: int = Field(100, ge=3, description="Steps that spike_threshold compares with.")
    spike_steps: int = Field(3, gt=0, description="Steps in a row above spike_threshold that make a spike.")
    spike_returns: int = Field(3, gt=0, description="Returns to a checkpoint after which another spike ends the run.")


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


#: Tokens of the shortest sample: one between two special ones.
_SHORTEST_SAMPLE = 3
#: Sections in the order in which a settings file is written.
_SECTIONS = ("model", "tokenizer", "task", "data")


class RunSettings(Section):
    """What every training run has: how it is laid out, optimized, saved and reported."""

    parallel: ParallelSettings = Field(default_factory=ParallelSettings)
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    learning_rate: LearningRateSettings = Field(default_factory=LearningRateSettings)
    precision: PrecisionSettings = Field(default_factory=PrecisionSettings)
    training: RunTrainingSettings
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    logging: LoggingSettings = Field(default_factory=LoggingSettings)

    def layout(self, world_size: int) -> ParallelLayout:
        """How ``world_size`` processes divide the work.

        Raises:
            UserError: the axes do not multiply to the world size, or the data axis cannot be sharded as asked.
        """
        wanted = self.parallel
        with called(**{name: f"parallel.{name}" for name in ("tensor", "pipeline", "data", "sequence")}):
            data = fit_data_size(
                world_size,
                tensor=wanted.tensor,
                pipeline=wanted.pipeline,
                data=wanted.data,
                choices=self._elastic_sizes() if wanted.elastic else None,
            )
            return ParallelLayout(
                tensor=wanted.tensor,
                pipeline=wanted.pipeline,
                data=data,
                data_shard=data_shard_size(wanted.sharding, data, wanted.shard_size),
                sequence=wanted.sequence,
            )

    def _elastic_sizes(self) -> list[int]:
        """Data sizes that divide the batch and, where it is sharded in groups, hold whole groups."""
        group = self.parallel.shard_size or 1
        rounds = self.training.global_batch_size // self.training.micro_batch_size
        return [size for size in range(group, rounds + 1, group) if rounds % size == 0]

    def schedule(self, layout: ParallelLayout) -> Schedule:
        """The pipeline schedule of a training step.

        Raises:
            UserError: an unknown schedule, or stages it does not take.
        """
        microbatches = self.training.global_batch_size // (self.training.micro_batch_size * layout.data)
        wanted = self.parallel
        return build_schedule(wanted.schedule, layout.pipeline, microbatches, wanted.virtual_stages)

    def divide_layers(self, layers: int, stages: int, last_cost: float = 0.0) -> list[StagePart]:
        """What each stage holds of a model.

        Args:
            layers: of the model.
            stages: of the pipeline.
            last_cost: of what the last stage holds beside layers, in layers.

        Raises:
            UserError: more stages than layers, or parallel.stage_layers that do not fit.
        """
        with called(sizes="parallel.stage_layers"):
            return split_layers(layers, stages, last_cost=last_cost, sizes=self.parallel.stage_layers)

    def dump(self) -> str:
        """The resolved settings as YAML."""
        values = self.model_dump(mode="json", by_alias=True)
        ordered = {name: values.pop(name) for name in _SECTIONS if name in values}
        return yaml.safe_dump(ordered | values, sort_keys=False)


class Settings(RunSettings):
    """A run of `megatron-bert pretrain`."""

    model: ModelSettings = Field(default_factory=ModelSettings)
    tokenizer: TokenizerSettings
    data: DataSettings
    training: TrainingSettings

    @property
    def max_predictions(self) -> int:
        """Slots of masked tokens per sample."""
        return self.data.max_predictions or max(1, round(self.data.mask_probability * self.data.seq_length))

    def row_slots(self, samples: int) -> int:
        """Slots of masked tokens of a row that holds as many samples at most: as many as they can have together.

        A sample of n tokens has mask_probability x n rounded, and one at least.
        """
        share, data = self.data.mask_probability, self.data
        rounded = samples * max(0.5, 1 - _SHORTEST_SAMPLE * share)
        return min(samples * self.max_predictions, int(share * data.seq_length + rounded + 1e-9))

    def model_config_for(self, vocab_size: int, pad_token_id: int) -> MegatronBertConfig:
        """The encoder's configuration, for the vocabulary of the run's tokenizer.

        Raises:
            UserError: sizes that an encoder cannot have.
        """
        sizes = self.model.model_dump(exclude={"from_"})
        sizes["intermediate_size"] = self.model.intermediate_size or 4 * self.model.hidden_size
        sizes |= {"pad_token_id": pad_token_id, "binary_head": self.data.pair_objective != "none"}
        with called(**{name: f"model.{name}" for name in sizes}):
            return MegatronBertConfig(**sizes, vocab_size=vocab_size)
