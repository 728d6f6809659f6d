# SPDX-License-Identifier: Apache-2.0
"""What is not finite is noticed in its step, kept away from the weights, and traced to where it came from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megatron_bert.config_sections import OptimizerSettings
from megatron_bert.training.divergence import NotReproducedError
from megatron_bert.training.metrics import METRICS_FILE
from megatron_bert.training.optimizer import ShardedOptimizer
from megatron_bert.training.precision import LossScale
from megatron_bert.training.pretrain import pretrain
from megatron_bert.training.staged_model import TIED_NAME
from megatron_bert.training.trainer import Trainer
from parallel.checkpoint import whole_checkpoints
from parallel.errors import UserError
from tests.megatron_bert.training.layouts import Case, Outcome, make_trainer, train
from tests.megatron_bert.training.runs import rows, run_settings
from tests.worlds import Together


def before_step(patch: pytest.MonkeyPatch, step: int, change: Callable[[Trainer], None]) -> None:
    """Do something to a trainer before one step."""
    original = Trainer.train_step

    def train_step(self: Trainer, *args: Any) -> Any:
        if self.step == step - 1:
            change(self)
        return original(self, *args)

    patch.setattr(Trainer, "train_step", train_step)


def put(name: str, value: float, elements: int = 1) -> Callable[[Trainer], None]:
    """Overwrite some weights."""

    def change(trainer: Trainer) -> None:
        trainer.optimizer.weights(trainer.parameters[name]).values.view(-1)[:elements] = value
        trainer.optimizer.publish()

    return change


def faulty(times: int, backward: bool = False, part: str = "mlp") -> Callable[[Trainer], None]:
    """Spoil what the last layer gives, or a part of it."""

    def change(trainer: Trainer) -> None:
        for stage in trainer.model.stages.values():
            for layer in stage.encoder.layer_list()[-1:]:
                layer.get_submodule(part).register_forward_hook(Fault(times, backward))

    return change


class Fault:
    """A forward hook that spoils the output of a module, or its gradient, for one token, so many times."""

    def __init__(self, times: int, backward: bool) -> None:
        self.times, self.backward = times, backward

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if self.times == 0:
            return None
        self.times -= 1
        row = torch.zeros(output.shape[0], 1)
        row[3] = 1.0
        if self.backward:
            return output + (row * output * 0.0).abs().sqrt()
        return output.masked_fill(row.bool(), torch.nan)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            put(TIED_NAME, float("nan"), 8),
            rf"^step 3 is not finite because values were damaged before it: 8 of the values of model\.{TIED_NAME}"
            r" on rank 0 \(.*\) are NaN or infinite; memory is damaged",
        ),
        (
            put(TIED_NAME, 1e30),
            rf"^at step 3 the loss is .* out of all proportion: model\.{TIED_NAME} on rank 0 \(.*\) holds 1e\+30, ",
        ),
        (
            faulty(100),
            r"^training diverged: at step 3 the loss is .* and the gradient norm nan; the first values that are not "
            r"finite are in the output of encoder\.layers\.0\.\S+ on rank 0 \(.*\), stage 0, micro batch 0, samples 16:"
            r" go on from .* lower learning_rate\.peak",
        ),
        (
            faulty(100, backward=True),
            r"^training diverged: at step 3 the loss is \d.* the gradient norm nan; .* in the gradient of the output"
            r" of encoder\.layers\.0",
        ),
    ],
    ids=["NaN", "flipped bit", "forward", "backward"],
)
@pytest.mark.parametrize("every", [1, 100], ids=["logged", "not logged"])
def test_the_cause_is_named(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Trainer], None],
    sentence: str,
    every: int,
) -> None:
    before_step(monkeypatch, 3, change)
    with pytest.raises(UserError, match=sentence) as caught:
        pretrain(run_settings(data, tmp_path, checkpoint__every=1, logging__every=every))
    assert ("learning_rate" in str(caught.value)) == sentence.startswith("^training diverged")
    assert list(whole_checkpoints(tmp_path / "checkpoints")) == [1, 2]
    kept = tmp_path / "diverged" / "step_00000003_data_0000.npz"
    assert str(kept) in str(caught.value)
    with np.load(kept, allow_pickle=False) as arrays:
        assert arrays["step"] == 3
        assert set(arrays["0.samples"]) | set(arrays["1.samples"]) == set(range(16, 24))
        assert arrays["0.tokens"].shape == arrays["0.positions"].shape


@pytest.mark.parametrize("every", [1, 100], ids=["logged", "not logged"])
def test_a_gpu_says_so_a_step_later(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """Nothing waits for it; steps made by then have changed nothing, and it is the bad one that is computed again."""
    weights: list[Tensor] = []
    trainers: list[Trainer] = []

    def change(trainer: Trainer) -> None:
        trainer.watch.at_once = False
        trainers.append(trainer)
        weights.extend(trainer.optimizer.weights(parameter).values.clone() for parameter in trainer.parameters.values())
        faulty(100)(trainer)

    before_step(monkeypatch, 3, change)
    with pytest.raises(UserError, match=r"^training diverged: at step 3 the loss .* samples 16: "):
        pretrain(run_settings(data, tmp_path, checkpoint__every=2, logging__every=every))
    assert list(whole_checkpoints(tmp_path / "checkpoints")) == [2]
    (trainer,) = trainers
    assert trainer.step == 3
    assert trainer.optimizer.steps == 3
    for before, parameter in zip(weights, trainer.parameters.values(), strict=True):
        assert torch.equal(before, trainer.optimizer.weights(parameter).values)


def test_a_learning_rate_that_is_too_high(data: Path, tmp_path: Path) -> None:
    """It moves all weights, and is not taken for damage."""
    settings = run_settings(data, tmp_path, learning_rate__peak=1e3, optimizer__weight_decay=1e3)
    with pytest.raises(UserError, match=r"^training diverged: .* lower learning_rate\.peak"):
        pretrain(settings)


def test_what_does_not_come_back_is_a_failure(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another start may help, so it is not refused."""
    before_step(monkeypatch, 3, faulty(1))
    with pytest.raises(NotReproducedError, match="step 3 was not finite, but computed again it is"):
        pretrain(run_settings(data, tmp_path, checkpoint__every=1))
    assert list(whole_checkpoints(tmp_path / "checkpoints")) == [1, 2]


def test_a_full_disk_hides_nothing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before_step(monkeypatch, 3, put(TIED_NAME, float("nan")))
    (tmp_path / "diverged").write_text("in the way")
    with pytest.raises(
        UserError, match=r"are NaN or infinite.* the batch could not be kept in .*diverged \(File exists"
    ):
        pretrain(run_settings(data, tmp_path))


class TestFloat16:
    """The loss scale works on any device, though float16 itself needs a GPU."""

    @pytest.fixture(autouse=True)
    def _dynamic(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = LossScale.__init__

        def init(self: LossScale, settings: Any) -> None:
            original(self, settings)
            self.dynamic, self.value = True, settings.initial_loss_scale

        monkeypatch.setattr(LossScale, "__init__", init)

    def test_a_run_that_skips_every_step_is_refused(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before_step(monkeypatch, 1, put(TIED_NAME, float("nan")))
        with pytest.raises(UserError, match=r"^step 6 is not finite because values were damaged"):
            pretrain(run_settings(data, tmp_path))
        assert list(whole_checkpoints(tmp_path / "checkpoints")) == []
        text = (tmp_path / METRICS_FILE).read_text(encoding="utf-8")
        assert not {"NaN", "Infinity"} & set(text.replace(",", " ").split())
        assert [set(json.loads(line)) & {"step", "loss", "grad_norm"} for line in text.splitlines()] == 5 * [{"step"}]

    def test_or_of_a_scale_that_is_too_large(self, data: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"every float16 step up to step 6 was skipped.*initial_loss_scale"):
            pretrain(run_settings(data, tmp_path, precision__initial_loss_scale=2.0**127))

    def test_at_a_scale_of_one_it_does_not_last(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before_step(monkeypatch, 2, faulty(1000))
        settings = run_settings(data, tmp_path, precision__initial_loss_scale=16.0, training__steps=60)
        with pytest.raises(
            UserError, match=r"at step 21 .*the 20 float16 steps up to it.* precision\.compute=bfloat16"
        ):
            pretrain(settings)

    def test_a_step_in_between_is_skipped(self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before_step(monkeypatch, 2, faulty(2))
        pretrain(run_settings(data, tmp_path))
        found = [row for row in rows(tmp_path) if "learning_rate" in row]
        assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
        assert [row["step"] for row in found if "grad_norm" not in row] == [2]


def test_the_optimizer_can_be_kept_from_changing_anything() -> None:
    parameter = nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(1)))
    adam = ShardedOptimizer({"one": parameter}, OptimizerSettings())
    before = parameter.detach().clone()
    parameter.grad = torch.full((5,), torch.nan)
    adam.step(0.1, torch.tensor(1.0))
    assert torch.equal(parameter, before)
    assert all(moment.values.eq(0).all() for moment in adam.moments(parameter).values())
    parameter.grad = torch.ones(5)
    adam.step(0.1, torch.tensor(0.0))
    assert not torch.equal(parameter, before)


def traced(case: Case, folder: Path, run_dir: Path, rank: int) -> str:
    """How a run ends when one rank computes something wrong in its second step."""
    trainer = make_trainer(case, folder, run_dir=run_dir)
    train(trainer, 1, Outcome())
    if trainer.world.rank == rank:
        faulty(100)(trainer)
    weights = {
        name: trainer.optimizer.weights(parameter).values.clone() for name, parameter in trainer.parameters.items()
    }
    try:
        train(trainer, 1, Outcome())
    except UserError as error:
        for name, parameter in trainer.parameters.items():
            assert torch.equal(trainer.optimizer.weights(parameter).values, weights[name])
        return str(error)
    return ""


#: Layout, the rank that computes something wrong, and its data rank.
TRACED = [
    (Case(data=2, microbatches=2), 1, 1),
    (Case(data=2, sharding="full", compute="bfloat16"), 0, 0),
    (Case(pipeline=2, microbatches=2), 1, 0),
    (Case(tensor=2, sequence=True, packed=True), 1, 0),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of their run directories."""
    return tmp_path_factory.mktemp("traced")


@pytest.fixture(scope="module")
def together(data: Path, runs: Path) -> Together:
    return Together(*((case.ranks, traced, case, data, runs / str(case), rank) for case, rank, _ in TRACED))


@pytest.mark.parametrize(("case", "rank", "data_rank"), TRACED, ids=str)
def test_the_rank_is_named(data: Path, runs: Path, together: Together, case: Case, rank: int, data_rank: int) -> None:
    run_dir = runs / str(case)
    said = together(case.ranks, traced, case, data, run_dir, rank)
    assert len(set(said)) == 1
    assert f" on rank {rank} (" in said[0]
    assert "the first values that are not finite are in the output of encoder.layers." in said[0]
    assert [path.name for path in (run_dir / "diverged").iterdir()] == [f"step_00000002_data_{data_rank:04d}.npz"]
