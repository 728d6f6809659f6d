# SPDX-License-Identifier: Apache-2.0
"""Growing an encoder: the same function at twice the width, with copies that learn different things."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_bert import MegatronBertForPreTraining
from parallel.errors import UserError
from tests.megatron_bert.family.support import batch_for, build, changed
from tools.grow_checkpoint import grow, main


@pytest.fixture
def small(tmp_path: Path) -> MegatronBertForPreTraining:
    model = build("ForPreTraining", changed(num_hidden_layers=3))
    model.save_pretrained(tmp_path / "small")
    return model


def test_twice_the_width_is_the_same_function(tmp_path: Path, small: MegatronBertForPreTraining) -> None:
    grow(tmp_path / "small", tmp_path / "large", [0, 1, 2])
    large = MegatronBertForPreTraining.from_pretrained(tmp_path / "large").eval()
    assert (large.config.hidden_size, large.config.num_attention_heads, large.config.num_hidden_layers) == (64, 8, 3)
    batch = batch_for("ForPreTraining")
    before, after = small(**batch), large(**batch)
    # Sums of twice as many terms, in another order.
    torch.testing.assert_close(after.prediction_logits, before.prediction_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.seq_relationship_logits, before.seq_relationship_logits, rtol=1e-4, atol=1e-4)
    after.prediction_logits.square().mean().backward()
    gradient = large.get_input_embeddings().weight.grad
    assert gradient is not None
    first, second = gradient.chunk(2, dim=1)
    assert float((first - second).norm() / first.norm()) > 0.03


def test_repeated_layers_share_what_one_gave(tmp_path: Path, small: MegatronBertForPreTraining) -> None:
    grow(tmp_path / "small", tmp_path / "large", [0, 0, 1, 2])
    large = MegatronBertForPreTraining.from_pretrained(tmp_path / "large")
    one, two = (large.layer_list()[number].mlp.output.weight for number in (0, 1))
    halves = one[:32, :64] + one[:32, 64:]
    torch.testing.assert_close(halves, small.layer_list()[0].mlp.output.weight / 2)
    assert not torch.equal(one, two)


@pytest.mark.parametrize("layers", [[], [0, 3], [-1]])
def test_layers_that_are_not_there(tmp_path: Path, small: MegatronBertForPreTraining, layers: list[int]) -> None:
    with pytest.raises(UserError, match=r"--layers is .*: give numbers of 0 to 2"):
        grow(tmp_path / "small", tmp_path / "large", layers)
    assert not (tmp_path / "large").exists()


def test_the_command(tmp_path: Path, small: MegatronBertForPreTraining, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    source, file, none = (str(tmp_path / name) for name in ("small", "file", "none"))
    for arguments, message in (([none, "large"], "none"), ([source, file], f"{file} cannot be made a directory")):
        assert main([*arguments, "--layers", "0"]) == 2
        assert message in capsys.readouterr().err
    assert main([source, str(tmp_path / "large"), "--layers", "0"]) == 0
    assert {path.name for path in (tmp_path / "large").iterdir()} == {"config.json", "model.safetensors"}
