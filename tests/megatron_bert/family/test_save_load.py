# SPDX-License-Identifier: Apache-2.0
"""Directories: written here and read by transformers, written there and read here, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import megatron_bert
from megatron_bert import AutoTokenizer, MegatronBertForMaskedLM, MegatronBertModel
from megatron_bert.convert.opening import open_checkpoint
from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.family.tokenizer import save_tokenizer
from parallel.errors import UserError
from tests.megatron_bert.family.support import (
    CONFIG,
    HEADS,
    assert_outputs_close,
    batch_for,
    build,
    changed,
    config_of,
    equal_states,
)
from tests.worlds import make_tensor_parallel, run_world

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
EXACT = {"rtol": 0, "atol": 0}


def _class(head):
    return getattr(megatron_bert, f"MegatronBert{head}")


def _auto(head):
    names = {"Model": "AutoModel", "ForNextSentencePrediction": "AutoModelForNextSentencePrediction"}
    return getattr(transformers, names.get(head, f"AutoModel{head}"))


@pytest.mark.parametrize("head", HEADS)
def test_round_trips(head, tmp_path):
    """Ours, theirs from ours, theirs again, and ours from theirs: no bit changes."""
    model = build(head)
    model.save_pretrained(tmp_path / "ours")
    assert equal_states(_class(head).from_pretrained(tmp_path / "ours"), model)
    peer, info = _auto(head).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(peer).__name__ == type(model).__name__
    assert sum(parameter.numel() for parameter in peer.parameters()) == model.num_parameters()
    peer.save_pretrained(tmp_path / "theirs")
    again, info = _class(head).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(info.values())
    assert equal_states(again, model)
    assert again.config.num_labels == model.config.num_labels
    assert_outputs_close(again(**batch_for(head)), model(**batch_for(head)), (), **EXACT)


@pytest.mark.parametrize(
    "changes",
    [
        {"is_decoder": True, "add_cross_attention": True},
        {"position_embedding_type": "relative_key", "is_decoder": True, "add_cross_attention": True},
        {"num_hidden_layers": 3, "pruned_heads": {0: [1], 2: [0, 3]}},
        {"tie_word_embeddings": False},
        {"eos_token_id": [3, 4], "bos_token_id": 2, "id2label": {0: "a", 1: "b", 2: "c"}},
    ],
    ids=["cross", "relative", "pruned", "untied", "names"],
)
def test_options(changes, tmp_path):
    model = build("ForMaskedLM", changed(**changes))
    model.save_pretrained(tmp_path)
    again = MegatronBertForMaskedLM.from_pretrained(tmp_path)
    assert equal_states(again, model)
    for name, value in changes.items():
        assert getattr(again.config, name) == value
    assert again.config.label2id == model.config.label2id


@pytest.mark.parametrize("tied", [True, False])
def test_untied_heads_of_transformers(tied, tmp_path):
    config = transformers.MegatronBertConfig(**_sizes() | {"tie_word_embeddings": tied})
    peer = transformers.MegatronBertForMaskedLM(config).eval()
    with torch.no_grad():
        peer.cls.predictions.decoder.bias.normal_()
    peer.save_pretrained(tmp_path)
    model = MegatronBertForMaskedLM.from_pretrained(tmp_path)
    batch = batch_for("ForMaskedLM")
    torch.testing.assert_close(model(**batch).logits, peer(**batch).logits, rtol=1e-5, atol=1e-5)


def _sizes():
    names = transformers.MegatronBertConfig().to_dict()
    return {name: value for name, value in CONFIG.to_dict().items() if name in names and name != "model_type"}


def test_files_of_torch_save(tmp_path):
    """pytorch_model.bin, as the converters of old wrote it: by the restricted unpickler."""
    model = build("ForPreTraining")
    model.save_pretrained(tmp_path)
    peer = transformers.MegatronBertForPreTraining.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = peer.state_dict() | {"bert.embeddings.position_ids": torch.arange(20)[None]}
    torch.save(state, tmp_path / "pytorch_model.bin")
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert equal_states(again, model)
    assert not any(info.values())
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo hello'\ntR.")
    with pytest.raises(UserError, match=r"pytorch_model.bin is not a file of torch.save"):
        type(model).from_pretrained(tmp_path)
    torch.save({"a": Path("harm")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin holds something else than tensors"):
        type(model).from_pretrained(tmp_path)


def _cut(place, share):
    content = place.read_bytes()
    place.write_bytes(content[: int(share * len(content))])


_DAMAGE = {
    "empty": ("model.safetensors", lambda place: place.write_bytes(b""), "is empty"),
    "cut": ("model.safetensors", lambda place: _cut(place, 0.6), "damaged safetensors file"),
    "header": ("model.safetensors", lambda place: place.write_bytes(b"\2" * 99), "damaged safetensors file"),
    "page": ("model.safetensors", lambda place: place.write_bytes(b"<!DOCTYPE html><html>"), "is a web page"),
    "variant": ("model.fp16.safetensors", lambda place: _cut(place, 0.6), "damaged safetensors file"),
    "index": ("model.safetensors.index.json", lambda place: _cut(place, 0.5), "is not JSON"),
    "map": ("model.safetensors.index.json", lambda place: place.write_text("{}"), "holds no weight_map"),
    "list": ("model.safetensors.index.json", lambda place: place.write_text("[]"), "JSON list instead of an object"),
    "shard": ("model-00002-of-00003.safetensors", lambda place: _cut(place, 0.6), "damaged safetensors file"),
    "gone": ("model-00002-of-00003.safetensors", lambda place: place.unlink(), "No such file|names model-00002"),
    "bin": ("pytorch_model.bin", lambda place: _cut(place, 0.9), "truncated or damaged zip file"),
    "bin-start": ("pytorch_model.bin", lambda place: _cut(place, 0.3), "truncated or damaged zip file"),
    "settings": ("config.json", lambda place: place.write_text("[]"), "holds a JSON list instead of an object"),
    "half": ("config.json", lambda place: _cut(place, 0.5), "is not JSON|not a valid JSON"),
    "nothing": ("model.safetensors", lambda place: place.unlink(), "holds config.json, but no model.saf|no file named"),
}


@pytest.mark.parametrize("kind", _DAMAGE)
def test_damaged_files_are_named(kind, tmp_path):
    """In one sentence, by every reader: from_pretrained, and the one of all commands."""
    name, damage, reason = _DAMAGE[kind]
    model = build("ForMaskedLM")
    variant = {"variant": "fp16"} if "fp16" in name else {}
    model.save_pretrained(tmp_path, max_shard_size="35KB" if "index" in name or "-of-" in name else "1GB", **variant)
    if name.endswith(".bin"):
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / name)
    damage(tmp_path / name)
    with pytest.raises((UserError, OSError), match=reason) as error:
        type(model).from_pretrained(tmp_path, **variant)
    assert "\n" not in str(error.value)
    assert kind == "nothing" or name in str(error.value)
    if not variant:
        with pytest.raises(UserError, match=reason), open_checkpoint(tmp_path) as state:
            assert state


def test_names_that_wrappers_have_changed(tmp_path):
    """As DataParallel and torch.compile save them; tensors with other names are not drawn in silence."""
    model, batch = build("ForMaskedLM"), batch_for("ForMaskedLM")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        torch.save({prefix + name: t for name, t in model.state_dict().items()}, tmp_path / "pytorch_model.bin")
        assert_outputs_close(MegatronBertForMaskedLM.from_pretrained(tmp_path)(**batch), model(**batch))
        with open_checkpoint(tmp_path) as state:  # as the commands read it
            words = state["embeddings.word_embeddings.weight"].load()
        assert words.equal(model.get_input_embeddings().weight)
    torch.save({f"mine.{name}": t for name, t in model.state_dict().items()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no embeddings\..*of the encoder are not there.* holds mine\.bert"):
        MegatronBertForMaskedLM.from_pretrained(tmp_path)


def test_shards(tmp_path):
    model = build("ForMaskedLM")
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert equal_states(MegatronBertForMaskedLM.from_pretrained(tmp_path), model)
    peer = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert peer.bert.embeddings.word_embeddings.weight.equal(model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path, max_shard_size=10**9)  # nothing of the shards stays behind
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    with pytest.raises(ValueError, match="many"):
        model.save_pretrained(tmp_path, max_shard_size="many")


def test_another_head(tmp_path):
    build("ForPreTraining").save_pretrained(tmp_path)
    head = "ForSequenceClassification"
    torch.manual_seed(0)
    model, info = _class(head).from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert "cls.seq_relationship.weight" in info["unexpected_keys"]
    assert len(info["unexpected_keys"]) == 7
    assert model.config.num_labels == 3
    assert 0.1 < float(model.classifier.weight.detach().std()) < 0.3
    assert not model.training
    bare = MegatronBertModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert bare.pooler is None
    back = _class(head).from_pretrained(tmp_path, config=config_of(head, id2label=dict(enumerate("wxyz"))))
    assert back.config.label2id == {"w": 0, "x": 1, "y": 2, "z": 3}


def test_sizes_that_do_not_match(tmp_path):
    head = "ForSequenceClassification"
    build(head).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        _class(head).from_pretrained(tmp_path, num_labels=3)
    model, info = _class(head).from_pretrained(
        tmp_path, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name for name, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert model.classifier.weight.isfinite().all()


def test_number_formats(tmp_path):
    """That of the file unless another is asked for, under both of transformers' names."""
    build("Model").to(torch.bfloat16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    kinds = {None: torch.bfloat16, "auto": torch.bfloat16, "float16": torch.float16, torch.float64: torch.float64}
    for given, expected in kinds.items():
        model = MegatronBertModel.from_pretrained(tmp_path, torch_dtype=given)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        assert MegatronBertModel.from_pretrained(tmp_path, dtype=given).dtype == model.dtype


@pytest.mark.parametrize("kind", ["vocab", "json"])
def test_tokenizers_beside_the_model(kind, tmp_path):
    """A vocabulary that is saved beside a model is the tokenizer that transformers finds there."""
    (tmp_path / "source").mkdir()
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *["hello", ",", "my", "dog", "is", "cute", "and", "he", "sees", "the", "sky"],
    ]
    (tmp_path / "source" / "vocab.txt").write_text("\n".join(pieces) + "\n")
    vocabulary = load_tokenizer(tmp_path / "source")
    if kind == "json":
        vocabulary.save(tmp_path / "source")
        (tmp_path / "source" / "vocab.txt").unlink()
        vocabulary = load_tokenizer(tmp_path / "source")
    build("Model").save_pretrained(tmp_path / "model")
    save_tokenizer(vocabulary, tmp_path / "model", 64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (tokenizer.model_max_length, len(tokenizer)) == (64, vocabulary.vocab_size)
    text = "Hello, my dog is cute"
    batch = tokenizer([text, "dog"], ["the sky", "cute"], padding=True, return_tensors="pt")
    first, second = vocabulary.encode(text), vocabulary.encode("the sky")
    expected = [vocabulary.cls_id, *first, vocabulary.sep_id, *second, vocabulary.sep_id]
    assert batch["input_ids"][0].tolist() == expected
    assert batch["token_type_ids"][0].tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert batch["attention_mask"][1].sum() == 5


def _divided_round_trip(source, target):
    tp = make_tensor_parallel()
    model = MegatronBertForMaskedLM.from_pretrained(source, tp=tp)
    model.save_pretrained(target)
    return model.num_parameters()


@pytest.mark.parametrize("size", [2, 4])
def test_divided_models_save_and_load(size, tmp_path):
    model = build("ForMaskedLM")
    model.save_pretrained(tmp_path / "one")
    counts = run_world(size, _divided_round_trip, tmp_path / "one", tmp_path / "many")
    assert counts == [model.num_parameters()] * size
    assert equal_states(MegatronBertForMaskedLM.from_pretrained(tmp_path / "many"), model)
