# SPDX-License-Identifier: Apache-2.0
"""Models whose parts are on several devices, or on the disk, as a device map says."""

from __future__ import annotations

import warnings

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from tests.megatron_bert.family import support as megatron
from tests.megatron_bert.family.classes import EACH_CLASS
from tests.megatron_bert.family.support import CLOSE


def _parts(model):
    """Blocks that a device map may put anywhere, by name: embeddings, layers, and all that is above them."""
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    blocks = {f"{prefix}{name}": module for name, module in base.named_children() if name != "encoder"}
    blocks |= {f"{prefix}encoder.{name}": module for name, module in base.encoder.named_children() if name != "layer"}
    blocks |= {f"{prefix}encoder.layer.{number}": layer for number, layer in enumerate(base.encoder.layer)}
    if base is not model:
        for name, module in model.named_children():
            inner = {f"{name}.{key}": part for key, part in module.named_children()} if name == "cls" else {}
            blocks |= inner or ({name: module} if module is not base else {})
    return blocks


@EACH_CLASS
@pytest.mark.parametrize("asked", ["nothing", "everything", "loss", "training"])
def test_parts_on_two_devices(make, head, asked):
    """Embeddings and the lowest layer on one, the rest on another: every tensor is brought to where it is needed.

    The other device is meta, on which operations check devices and compute nothing.
    """
    changes = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1} if asked == "training" else {}
    model = make.build(head, make.config_of(head, **changes)).train(asked == "training")
    blocks = _parts(model)
    assert len(blocks) >= 4
    for name, block in blocks.items():
        device = "cpu" if name.endswith(("embeddings", "layer.0")) else "meta"
        add_hook_to_module(block.to(device), AlignDevicesHook(device))
    labels = megatron.labels_for(head) if asked in ("loss", "training") else {}
    options = {"output_hidden_states": True, "output_attentions": True} if asked == "everything" else {}
    out = model(**make.batch_for(head), **labels, **options)
    assert out[0].device.type == "meta"
    if options:
        assert [state.device.type for state in out.hidden_states] == ["cpu", "cpu", "meta"]


@EACH_CLASS
@pytest.mark.parametrize("whole", [False, True], ids=["parts", "whole"])
def test_parts_on_the_disk(make, head, whole, tmp_path):
    """Layers and, where they are not tied, embeddings, or everything; they come back for each use, and are saved."""
    model, batch = make.build(head), make.batch_for(head)
    expected = model(**batch)[0]
    model.save_pretrained(tmp_path / "model")
    tied = model.get_output_embeddings() is not None
    places = dict.fromkeys(_parts(model), "disk")
    places = (
        {"": "disk"}
        if whole
        else places | {name: "cpu" for name in places if name.endswith("layer.1") or (tied and "layer" not in name)}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow, and what takes memory
        loaded = type(model).from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk")
        assert any(parameter.device.type == "meta" for parameter in loaded.parameters())
        torch.testing.assert_close(loaded(**batch)[0], expected, **CLOSE)
        loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(type(model).from_pretrained(tmp_path / "again")(**batch)[0], expected, **CLOSE)
