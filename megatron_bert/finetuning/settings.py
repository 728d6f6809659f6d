# SPDX-License-Identifier: Apache-2.0
"""All settings of a fine-tuning run as validated models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from megatron_bert.config import RunSettings, of_encoder
from megatron_bert.config_sections import CheckpointSettings, RunTrainingSettings, TokenizerSettings
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.section import Section
from megatron_bert.tasks.settings import TaskDataSettings, TaskSettings

#: Bound of the passes over the data, far above what anyone waits for.
MOST_EPOCHS = 1e6


class FinetuneModelSettings(Section):
    """The encoder to start from; its sizes are the checkpoint's."""

    from_: Path = Field(
        alias="from",
        description="Checkpoint to start from, of any format `megatron-bert inspect` knows: a run directory of this "
        "project, a Hugging Face or Megatron directory, an NGC zip; or a Hugging Face directory of a RoBERTa, an "
        "XLM-RoBERTa or an I-BERT; of a command with several seeds, its directory stands for the best run.",
    )
    keep_head: bool = Field(
        False, description="Take the head too, from a model that was fine-tuned for the same classes."
    )
    hidden_dropout_prob: float | None = of_encoder(
        "hidden_dropout_prob",
        "Dropout of embeddings, attention and MLP output; the checkpoint's when unset.",
        default=None,
    )
    attention_probs_dropout_prob: float | None = of_encoder(
        "attention_probs_dropout_prob",
        "Dropout of attention probabilities; the checkpoint's when unset.",
        default=None,
    )
    classifier_dropout: float | None = of_encoder(
        "classifier_dropout",
        "Dropout before the task's head; the checkpoint's, or else hidden_dropout_prob, when unset.",
    )

    def changed(self, config: MegatronBertConfig) -> MegatronBertConfig:
        """The configuration of an encoder with what is set here of it."""
        return replace(config, **self.model_dump(exclude={"from_", "keep_head"}, exclude_none=True))


class FinetuneTrainingSettings(RunTrainingSettings):
    """Length, batch and place of a fine-tuning run."""

    epochs: float = Field(3.0, gt=0, le=MOST_EPOCHS, description="Passes over the training data.")
    steps: int | None = Field(None, gt=0, description="Optimizer steps, in place of epochs.")
    evaluate_every: int | None = Field(None, ge=0, description="Steps between evaluations; once per epoch when unset.")
    evaluate_batch_size: int = Field(
        32, gt=0, description="Instances (texts, questions) a forward pass of an evaluation."
    )
    patience: int = Field(
        0, ge=0, description="Evaluations without a better score after which a run ends early; 0 never does."
    )
    seeds: list[Annotated[int, Field(ge=0, lt=2**62)]] | None = Field(
        None,
        min_length=1,
        description="Train once with each of these in place of training.seed, in a directory each, and report the "
        "median and spread.",
    )

    @model_validator(mode="after")
    def _different_seeds(self) -> Self:
        if self.seeds is not None and len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"training.seeds names one seed twice: {', '.join(map(str, self.seeds))}")
        return self


class FinetuneCheckpointSettings(CheckpointSettings):
    """Saving and resuming; the best checkpoint is kept whatever its age."""

    every: int = Field(0, ge=0, description="Steps between checkpoints beside those that are the best so far.")
    keep: int = Field(1, ge=0, description="Newest checkpoints kept beside the best; 0 keeps all.")
    keep_best: int = Field(
        1, ge=1, description="Checkpoints kept, whatever their age, of the evaluations with the best task.metric."
    )


class FinetuneSettings(RunSettings):
    """A run of `megatron-bert finetune`."""

    model: FinetuneModelSettings
    tokenizer: TokenizerSettings | None = Field(
        None, description="The vocabulary; the one beside the checkpoint, or in the run that wrote it, when unset."
    )
    task: TaskSettings
    data: TaskDataSettings
    training: FinetuneTrainingSettings
    checkpoint: FinetuneCheckpointSettings = Field(default_factory=FinetuneCheckpointSettings)
