# SPDX-License-Identifier: Apache-2.0
"""Training that starts from the weights of another run."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from megatron_bert.training.pretrain import CHECKPOINT_SIZES, pretrain, take_sizes
from parallel.errors import UserError
from tests.megatron_bert.training.layouts import make_data
from tests.megatron_bert.training.runs import rows, run_settings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a run of three steps, too."""
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    pretrain(run_settings(folder, folder / "run", training__steps=3))
    return folder


def test_sizes_are_the_checkpoints(data: Path) -> None:
    first = run_settings(data, data / "run")
    wanted = first.model_copy(update={"model": type(first.model)(**{"from": data / "run"})})
    taken = take_sizes(wanted)
    for name in CHECKPOINT_SIZES:
        assert getattr(taken.model, name) == getattr(first.model, name)
    assert take_sizes(first) is first


def test_a_size_that_is_another(data: Path) -> None:
    settings = run_settings(data, data / "new", model__from=data / "run", model__num_hidden_layers=2)
    with pytest.raises(
        UserError, match=r"model\.num_hidden_layers is 2, but the model in .* has 1: remove the setting"
    ):
        pretrain(settings)
    assert not (data / "new").exists()


def test_norms_that_are_elsewhere(data: Path) -> None:
    transformers.BertModel(
        transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(data / "bert")
    with pytest.raises(UserError, match="is of a bert model, whose norms are in another place"):
        pretrain(run_settings(data, data / "new", model__from=data / "bert"))
    assert not (data / "new").exists()


def test_weights_are_the_checkpoints(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Nothing is learned in a step at this rate, so the held-out scores are those of the weights started from.
    options = {"training__steps": 1, "learning_rate__peak": 1e-30, "learning_rate__warmup_steps": 0}
    pretrain(run_settings(data, tmp_path / "run", model__from=data / "run", **options))
    assert f"starting from the weights of {data / 'run'}" in capsys.readouterr().out
    found, expected = rows(tmp_path / "run"), rows(data / "run")
    assert [row["step"] for row in found] == [1, 1]
    assert found[-1] == {**expected[-1], "step": 1}
