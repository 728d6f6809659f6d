# SPDX-License-Identifier: Apache-2.0
"""All settings of a run as validated models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field

from megatron_bert.config_sections import (
    LARGEST_SCALE,
    CheckpointSettings,
    LearningRateSettings,
    LoggingSettings,
    OptimizerSettings,
    ParallelSettings,
    PrecisionSettings,
    RunTrainingSettings,
    TokenizerSettings,
)
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.configuration_checks import bounds
from megatron_bert.section import Section
from parallel.errors import called
from parallel.mesh import ParallelLayout, data_shard_size, fit_data_size
from parallel.pipeline.actions import Schedule
from parallel.pipeline.schedules import build_schedule
from parallel.pipeline.stage import StagePart, split_layers


def of_encoder(name: str, description: str, **changes: Any) -> Any:
    """A field of the encoder's configuration, with the default and the bounds that it has there.

    Args:
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


class TrainingSettings(RunTrainingSettings):
    """Length, batch and place of a pretraining run."""

    cuda_graphs: bool = Field(
        False,
        description="Record forward and backward passes as CUDA graphs, and replay them for all micro batches: the "
        "host queues one launch for each pass of a stage in place of thousands. Needs data.packed, and neither full or "
        "hybrid sharding nor full recomputation with attention dropout. It has not been run on a GPU yet.",
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
            last_cost: of what the last stage holds beside layers, in layers.

        Raises:
            UserError: more stages than layers, or parallel.stage_layers that do not fit.
        """
        with called(sizes="parallel.stage_layers"):
            return split_layers(layers, stages, last_cost=last_cost, sizes=self.parallel.stage_layers)

    def as_json(self) -> dict[str, Any]:
        """The resolved settings as checkpoints and results have them."""
        return self.model_dump(mode="json", by_alias=True)

    def dump(self) -> str:
        """The resolved settings as YAML."""
        values = self.as_json()
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
