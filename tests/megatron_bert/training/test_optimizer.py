"""The optimizer on local tensors is torch's AdamW, with decay on matrices alone."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from megatron_bert.config import OptimizerSettings
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.pretraining import BertForPretraining
from megatron_bert.training.optimizer import MOMENTS, ShardedAdamW, decays
from tests.worlds import make_mesh, run_world

SETTINGS = OptimizerSettings(beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1)
SHAPES = {"a.weight": (6, 4), "a.bias": (6,), "norm.weight": (4,), "table.weight": (10, 4)}
RATES = [0.01, 0.02, 0.005]


def make_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 + step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def reference(steps: int = len(RATES)) -> tuple[dict[str, nn.Parameter], torch.optim.AdamW]:
    """torch's own, without fused kernels."""
    parameters = make_parameters()
    groups = [
        {"params": [p for p in parameters.values() if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in parameters.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.8, 0.95), eps=1e-6, fused=False, foreach=False)
    for step in range(steps):
        for name, gradient in gradients(step).items():
            parameters[name].grad = gradient
        for group in adam.param_groups:
            group["lr"] = RATES[step]
        adam.step()
    return parameters, adam


def take_steps(optimizer: ShardedAdamW, parameters: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        for name, gradient in gradients(step).items():
            parameter = parameters[name]
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        optimizer.step(RATES[step])
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in parameters.values())


#: A few roundings of float32 a step, on values of order 1.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def test_equals_torch() -> None:
    parameters = make_parameters()
    optimizer = ShardedAdamW(parameters, SETTINGS)
    take_steps(optimizer, parameters, range(len(RATES)))
    expected, adam = reference()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, expected[name], **CLOSE)
        moments = optimizer.moments(parameter)
        for moment in MOMENTS:
            torch.testing.assert_close(moments[moment], adam.state[expected[name]][moment], **CLOSE)


def test_goes_on_from_loaded_state() -> None:
    first, second = make_parameters(), make_parameters()
    one, two = ShardedAdamW(first, SETTINGS), ShardedAdamW(second, SETTINGS)
    take_steps(one, first, range(2))
    with torch.no_grad():
        for name in SHAPES:
            second[name].copy_(first[name])
            for moment, tensor in two.moments(second[name]).items():
                tensor.copy_(one.moments(first[name])[moment])
    two.load_state(one.state())
    take_steps(one, first, range(2, 3))
    take_steps(two, second, range(2, 3))
    for name in SHAPES:
        assert torch.equal(first[name], second[name])


def test_without_gradient_nothing_moves() -> None:
    parameters = make_parameters()
    optimizer = ShardedAdamW(parameters, SETTINGS)
    parameters["a.bias"].grad = torch.ones(6)
    optimizer.step(0.1)
    for name, before in make_parameters().items():
        assert torch.equal(parameters[name], before) == (name != "a.bias")


def sharded_steps() -> dict[str, torch.Tensor]:
    mesh = make_mesh(tensor=2).tensor_parallel.mesh
    placements = {"a.weight": Shard(1), "table.weight": Shard(0), "a.bias": Shard(0)}
    parameters = {
        name: nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placements[name]]))
        if name in placements
        else parameter
        for name, parameter in make_parameters().items()
    }
    optimizer = ShardedAdamW(parameters, SETTINGS)
    take_steps(optimizer, parameters, range(len(RATES)))
    for name in placements:
        for moment in optimizer.moments(parameters[name]).values():
            assert moment.placements == parameters[name].placements
            assert moment.shape == SHAPES[name]
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
        for name, parameter in parameters.items()
    }


def test_equals_torch_on_divided_parameters() -> None:
    expected, _ = reference()
    for found in run_world(2, sharded_steps):
        for name in SHAPES:
            torch.testing.assert_close(found[name], expected[name].detach(), **CLOSE)


def test_what_decays_in_the_model() -> None:
    config = MegatronBertConfig(
        vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = BertForPretraining(config, device=torch.device("meta"))
    for name, parameter in model.named_parameters():
        norm_or_bias = name.endswith("bias") or "norm" in name.lower().split(".")[-2]
        assert decays(name, parameter) is not norm_or_bias, name


def test_a_bias_of_two_dimensions_does_not_decay() -> None:
    assert not decays("layer.bias", torch.zeros(2, 2))
    assert not decays("norm.weight", torch.zeros(2))
