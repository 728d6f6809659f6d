# SPDX-License-Identifier: Apache-2.0
"""Making, changing, loading and saving models with wrong arguments, and what stays as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_bert import MegatronBertConfig, MegatronBertForPreTraining, MegatronBertModel
from tests.megatron_bert.family.support import batch_for, build, changed, labels_for, refused

WRONG_SIZES = ("a", 1.5, 0, -1, True, [8])


@pytest.mark.parametrize(
    "heads",
    [[0, 1], {0.5: [1]}, {"0": [1]}, {0: [1.5]}, {0: ["1"]}, {0: 1}, {0: "1"}, {None: [1]}, None, "a", 3],
    ids=str,
)
def test_heads_to_prune(heads):
    model = build("Model")
    message = refused(lambda: model.prune_heads(heads))
    assert message == f"heads_to_prune is {heads!r}: give numbers of heads by number of layer, such as {{0: [1, 2]}}"
    assert model.config.pruned_heads is None


def test_kinds_of_heads_to_prune():
    model = build("Model", changed(num_hidden_layers=3))
    model.prune_heads({np.int64(0): np.array([1]), 2: {3}, 1: torch.tensor([0, 2])})
    assert model.config.pruned_heads == {0: [1], 1: [0, 2], 2: [3]}
    assert "pruned_heads is {0: [1.5]}" in refused(lambda: changed(pruned_heads={0: [1.5]}))


@pytest.mark.parametrize("size", WRONG_SIZES, ids=str)
@pytest.mark.parametrize("name", ["new_num_tokens", "pad_to_multiple_of"])
def test_sizes_of_vocabularies(name, size):
    model = build("ForMaskedLM", changed())
    message = refused(lambda: model.resize_token_embeddings(**{name: size}))
    assert message == f"{name} is {size!r}: give 1 or more, or None"
    assert model.config.vocab_size == 91


@pytest.mark.parametrize("every", [1, 2, 5])
def test_every_so_many_layers_are_recomputed_as_in_transformers(every):
    transformers = pytest.importorskip("transformers")
    model = build("ForMaskedLM", changed(num_hidden_layers=3)).train()
    batch = batch_for("ForMaskedLM") | labels_for("ForMaskedLM")
    model(**batch).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every, offload=False)
    peer = transformers.MegatronBertModel(
        transformers.MegatronBertConfig(vocab_size=91, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    )
    peer.activation_checkpointing_enable(every_n_layers=every)
    theirs = [layer.gradient_checkpointing for layer in peer.encoder.layer]
    assert [layer.gradient_checkpointing for layer in model.layer_list()] == theirs
    model(**batch).loss.backward()
    ours = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(one.equal(other) for one, other in zip(ours, expected, strict=True))
    assert model.is_activation_checkpointing
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing


MAKING = {
    "tp": (3, "tp is 3: give a TensorParallel handle"),
    "device": ("gpu", "device is 'gpu', which torch does not take here ("),
    "device-number": (1.5, "device is 1.5, which torch does not take here ("),
    "skip_padding": ("no", "skip_padding is 'no': give True or False"),
    "initial": ("no", "initial is 'no': give True or False"),
    "add_pooling_layer": ("no", "add_pooling_layer is 'no': give True or False"),
}


@pytest.mark.parametrize("case", MAKING)
def test_arguments_of_making(case):
    value, message = MAKING[case]
    assert refused(lambda: MegatronBertModel(changed(), **{case.partition("-")[0]: value})).startswith(message)


def test_switches_of_a_model():
    assert "add_binary_head is 'no'" in refused(lambda: MegatronBertForPreTraining(changed(), "no"))
    model = build("ForMaskedLM")
    with pytest.raises(ValueError, match="skip_padding is 'no': give True or False"):
        model.skip_padding = "no"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    build("Model").save_pretrained(directory)
    return directory


@pytest.mark.parametrize("pair", [(torch.float16, "float16"), ("bfloat16", torch.bfloat16), ("auto", "auto")], ids=str)
def test_two_names_of_one_number_format(pair, saved):
    dtype, torch_dtype = pair
    model = MegatronBertModel.from_pretrained(saved, dtype=dtype, torch_dtype=torch_dtype)
    assert model.dtype == MegatronBertModel.from_pretrained(saved, dtype=dtype).dtype


LOADING = {
    "num_labels": (("a", 1.5, [1], torch.ones(3)), "num_labels is "),
    "hidden_act": ((np.ones(3), ["gelu"]), "hidden_act is "),
    "id2label": ((torch.ones(3), "a"), "id2label is "),
}


@pytest.mark.parametrize("name", LOADING)
def test_arguments_of_loading(name, saved):
    values, message = LOADING[name]
    for value in values:
        assert refused(lambda value=value: MegatronBertModel.from_pretrained(saved, **{name: value})).startswith(
            message
        )


@pytest.mark.parametrize("read", [MegatronBertModel.from_pretrained, MegatronBertConfig.from_pretrained])
def test_what_is_no_model(read, tmp_path):
    """As transformers says it, whose names of the hub are taken too."""
    for place in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(OSError, match=r"config\.json|Repo id"):
            read(place)


@pytest.mark.parametrize("write", ["model", "config"])
def test_where_nothing_can_be_written(write, tmp_path):
    model = build("Model")
    save = model.save_pretrained if write == "model" else model.config.save_pretrained
    file = tmp_path / "file"
    file.write_text("kept")
    for place in (file, file / "below", "a\0b"):
        assert f"{place} cannot be made a directory (" in refused(lambda place=place: save(place))
    assert "the directory is a NoneType" in refused(lambda: save(None))
    assert file.read_text() == "kept"


def test_what_cannot_be_saved(tmp_path):
    empty = MegatronBertModel(changed(), device="meta", initial=False)
    assert "is on the meta device" in refused(lambda: empty.save_pretrained(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM"])
@pytest.mark.parametrize("kind", ["absolute", "relative_key"])
def test_numbers_of_parameters_without_tables(head, kind):
    model = build(head, changed(position_embedding_type=kind, tie_word_embeddings=False))
    tables = (91 + 20 + 2) * 32 + (2 * 39 * 8 if kind != "absolute" else 0)
    assert model.num_parameters() - model.num_parameters(exclude_embeddings=True) == tables
