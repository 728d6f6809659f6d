# SPDX-License-Identifier: Apache-2.0
"""All settings of a quantization run as validated models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_bert.config_checks import check_layout
from megatron_bert.config_sections import LARGEST_SCALE, LearningRateSettings
from megatron_bert.finetuning.settings import (
    MOST_EPOCHS,
    FinetuneModelSettings,
    FinetuneSettings,
    FinetuneTrainingSettings,
)
from megatron_bert.ibert.settings import QuantizationConfig
from megatron_bert.section import Section
from parallel.errors import UserError
from parallel.mesh import ParallelLayout


class QuantizeModelSettings(FinetuneModelSettings):
    """The fine-tuned model to quantize; its head comes with it."""

    keep_head: Literal[True] = Field(True, description="Always: the head is part of what is quantized.")


class QuantizationSettings(QuantizationConfig):
    """Bit widths and ranges, and the data that make them; see docs/ibert.md."""

    calibration_steps: int = Field(16, gt=0, description="Global batches of training data that calibrate the ranges.")
    report_steps: int = Field(4, gt=0, description="Global batches on which tensors are compared with the float model.")

    def config(self) -> QuantizationConfig:
        """What quantizes a model."""
        return QuantizationConfig(**self.model_dump(include=set(QuantizationConfig.model_fields)))


class DistillationSettings(Section):
    """Learning from the float model beside the labels (Hinton et al., arXiv 1503.02531)."""

    weight: float = Field(0.0, ge=0, le=1, description="Share of the float model's outputs in the loss; 0 is without.")
    temperature: float = Field(
        1.0, ge=1e-3, le=LARGEST_SCALE, description="Divides the logits of classes before they are compared."
    )


class SearchSettings(Section):
    """Train with every combination of these and name the best; the defaults are the paper's (section 4.2)."""

    enabled: bool = Field(False, description="Whether to search.")
    learning_rate: list[Annotated[float, Field(gt=0, le=LARGEST_SCALE)]] = Field(
        [5e-7, 1e-6, 1.5e-6, 2e-6], min_length=1, description="Peak learning rates."
    )
    attention_probs_dropout_prob: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.0, 0.1], min_length=1, description="Attention dropout."
    )
    hidden_dropout_prob: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.1, 0.2], min_length=1, description="Dropout of the other layers."
    )


class QuantizeLearningRateSettings(LearningRateSettings):
    """Warm-up, then a decay; the peak is far below that of fine-tuning."""

    peak: float = Field(1e-6, gt=0, le=LARGEST_SCALE, description="Learning rate at the end of the warm-up.")


class QuantizeTrainingSettings(FinetuneTrainingSettings):
    """Length, batch and place of a quantization run."""

    epochs: float = Field(3.0, ge=0, le=MOST_EPOCHS, description="Passes over the training data; 0 calibrates only.")


class QuantizeSettings(FinetuneSettings):
    """A run of `megatron-bert quantize`."""

    model: QuantizeModelSettings
    quantization: QuantizationSettings = Field(default_factory=QuantizationSettings)
    distillation: DistillationSettings = Field(default_factory=DistillationSettings)
    search: SearchSettings = Field(default_factory=SearchSettings)
    learning_rate: QuantizeLearningRateSettings = Field(default_factory=QuantizeLearningRateSettings)
    training: QuantizeTrainingSettings


def check_quantize(settings: QuantizeSettings) -> None:
    """The checks of a quantization run that involve more than one field, or that fine-tuning does not have.

    Raises:
        UserError: a setting is none that quantized layers can be trained with.
    """
    if settings.training.compile:
        raise UserError("quantized layers are not compiled: set training.compile=false")
    if settings.precision.compute == "float16":
        raise UserError("quantization trains in float32 or bfloat16: set precision.compute to one of them")


def check_quantize_layout(settings: QuantizeSettings, world_size: int) -> ParallelLayout:
    """These checks and those of the layout on a number of processes, which it returns."""
    check_quantize(settings)
    return check_layout(settings, world_size)
