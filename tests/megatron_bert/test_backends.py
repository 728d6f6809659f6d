# SPDX-License-Identifier: Apache-2.0
"""Which kernels are taken when something named apex is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_bert import backends
from megatron_bert.config_sections import OptimizerSettings
from megatron_bert.training.optimizer import ShardedOptimizer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAMES = ("apex", "apex.normalization", "apex.normalization.fused_layer_norm", "apex.optimizers")


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What was found is remembered for a process; here every test looks again."""
    found = (backends.apex_layer_norm, backends.apex_adam)
    for function in found:
        function.cache_clear()
    yield
    for function in found:
        function.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, *names: str, **contents: Any) -> None:
    """Put modules in place; ``contents`` by the last part of their names."""
    for name in (*NAMES, "fused_layer_norm_cuda", "amp_C"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    for name in names:
        module = ModuleType(name)
        for attribute, value in contents.get(name.rpartition(".")[2], {}).items():
            setattr(module, attribute, value)
        monkeypatch.setitem(sys.modules, name, module)


def fake_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, shape: Any, eps: float) -> torch.Tensor:
    assert tuple(shape) == tuple(weight.shape)
    assert eps == 1e-5
    return torch.full_like(x, 7.0)


class FakeAdam(torch.optim.Optimizer):
    """Takes what apex's FusedAdam takes, and keeps its step in the group as that does."""

    def __init__(self, params: Any, lr: float, betas: Any, eps: float, adam_w_mode: bool) -> None:
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] += 1


def install_apex(monkeypatch: pytest.MonkeyPatch, *extensions: str) -> None:
    install(
        monkeypatch,
        *NAMES,
        *extensions,
        fused_layer_norm={"fused_layer_norm_affine": fake_layer_norm},
        optimizers={"FusedAdam": FakeAdam},
    )


def normalized(x: torch.Tensor) -> torch.Tensor:
    weight, bias = torch.full((4,), 2.0), torch.ones(4)
    return backends.layer_norm(x, weight, bias, 1e-5)


def plain(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (4,), torch.full((4,), 2.0), torch.ones(4), 1e-5)


def test_no_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    x = torch.randn(3, 4)
    assert torch.equal(normalized(x), plain(x))
    assert backends.report(CUDA) == {"layer norm": "torch", "Adam": "torch fused"}
    assert backends.report(CPU) == backends.report(CUDA)


def test_apex_with_its_extensions_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    install_apex(monkeypatch, "fused_layer_norm_cuda", "amp_C")
    x = torch.randn(3, 4)
    assert torch.equal(normalized(x), plain(x))
    assert torch.equal(normalized(x.as_subclass(OnCuda)).as_subclass(torch.Tensor), torch.full((3, 4), 7.0))
    assert backends.report(CUDA) == {"layer norm": "apex", "Adam": "apex"}
    assert backends.report(CPU) == {"layer norm": "torch", "Adam": "torch fused"}


@pytest.mark.parametrize("extensions", [(), ("amp_C",), ("fused_layer_norm_cuda",)])
def test_each_kernel_needs_its_extension(monkeypatch: pytest.MonkeyPatch, extensions: tuple[str, ...]) -> None:
    install_apex(monkeypatch, *extensions)
    assert (backends.apex_layer_norm() is fake_layer_norm) == ("fused_layer_norm_cuda" in extensions)
    assert (backends.apex_adam() is FakeAdam) == ("amp_C" in extensions)


def test_another_package_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "apex")
    assert backends.report(CUDA) == {"layer norm": "torch", "Adam": "torch fused"}
    # Nor with something that has the name of the extensions.
    for function in (backends.apex_layer_norm, backends.apex_adam):
        function.cache_clear()
    install(monkeypatch, "apex", "fused_layer_norm_cuda", "amp_C")
    assert backends.report(CUDA) == {"layer norm": "torch", "Adam": "torch fused"}


def test_optimizer_takes_apex_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    install_apex(monkeypatch, "amp_C")
    weight = torch.nn.Parameter(torch.ones(2, 2))
    assert ShardedOptimizer({"w": weight}, OptimizerSettings()).rule.apex is None

    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    optimizer = ShardedOptimizer({"w": weight}, OptimizerSettings())
    assert isinstance(optimizer.rule.apex, FakeAdam)
    optimizer.load_state({"steps": 5})
    optimizer.step(0.1)
    assert (optimizer.steps, optimizer.rule.apex.param_groups[0]["step"]) == (6, 6)
