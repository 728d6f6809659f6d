"""The model of a run, laid out over its ranks."""

from __future__ import annotations

from torch import nn

from megatron_bert.config import Settings
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.pretraining import BertForPretraining
from megatron_bert.training.precision import DTYPES
from parallel.data_parallel import apply_data_parallel
from parallel.mesh import ParallelMesh
from parallel.sharding import initialize


def build_model(
    settings: Settings, config: MegatronBertConfig, mesh: ParallelMesh, *, draw: bool
) -> BertForPretraining:
    """The model with this rank's share of the parameters.

    Args:
        settings: of the run.
        config: of the encoder.
        mesh: where the run is laid out.
        draw: give the parameters their initial values; a checkpoint about to be loaded needs none.
    """
    model = BertForPretraining(
        config, tp=mesh.tensor_parallel, recompute=settings.training.recompute, device=mesh.device
    )
    if draw:
        initialize(model, settings.training.seed)
    layers = model.encoder.layer_list()
    if settings.training.compile:
        for layer in layers:
            layer.compile_forward()
    apply_data_parallel(
        model,
        layers,
        mesh,
        sharding=settings.parallel.sharding,
        compute_dtype=DTYPES[settings.precision.compute],
    )
    return model


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Global name -> parameter; tied parameters once."""
    return dict(model.named_parameters())


def model_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's part of a checkpoint."""
    return {f"model.{name}": parameter for name, parameter in model.named_parameters()}
