# SPDX-License-Identifier: Apache-2.0
"""I-BERT directories: written here and read by transformers, written there and read here, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch

import megatron_bert
from megatron_bert import IBertConfig, IBertForMaskedLM, IBertModel, MegatronBertModel
from megatron_bert.ibert.quantization import quantizers
from parallel.errors import UserError
from tests.megatron_bert.family.support import assert_outputs_close, equal_states
from tests.megatron_bert.ibert.family.support import CONFIG, HEADS, batch_for, build, config_of
from tests.worlds import make_tensor_parallel, run_world

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
EXACT = {"rtol": 0, "atol": 0}


def _class(head):
    return getattr(megatron_bert, f"IBert{head}")


@pytest.mark.parametrize("head", HEADS)
def test_round_trips(head, tmp_path):
    """Ours, theirs from ours, theirs again, and ours from theirs: no bit of a weight changes."""
    model = build(head)
    model.save_pretrained(tmp_path / "ours")
    again, info = _class(head).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert equal_states(again, model)
    assert not any(info.values())
    auto = getattr(transformers, f"Auto{head if head == 'Model' else 'Model' + head}")
    peer, info = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(peer).__name__ == type(model).__name__
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    # What they have beyond are buffers of their quantized layers, which they fill themselves.
    parameters = {name for name, _ in peer.named_parameters()}
    assert not parameters & set(info["missing_keys"])
    assert sum(parameter.numel() for parameter in peer.parameters()) == model.num_parameters()
    batch = batch_for(head)
    assert_outputs_close(model(**batch), peer.eval()(**batch))

    peer.save_pretrained(tmp_path / "theirs")
    again, info = _class(head).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(info.values())
    assert equal_states(again, model)
    assert_outputs_close(again(**batch), model(**batch), (), **EXACT)


@pytest.mark.parametrize("kind", ["Roberta", "XLMRoberta"])
@pytest.mark.parametrize("head", HEADS)
def test_models_of_roberta_are_read(head, kind, tmp_path):
    """Its encoder and heads are the same, so that a fine-tuned one can be quantized."""
    config = config_of(head, type_vocab_size=1)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_labels")
    names += ("max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id", "initializer_range")
    torch.manual_seed(1)
    theirs = getattr(transformers, f"{kind}Config")(**{name: getattr(config, name) for name in names})
    peer = getattr(transformers, f"{kind}{head}")(theirs).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    peer.save_pretrained(tmp_path)
    model, info = _class(head).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    batch = batch_for(head)
    del batch["token_type_ids"]
    assert_outputs_close(model(**batch), peer(**batch))
    quantized = _class(head).from_pretrained(tmp_path, quant_mode=True).train()
    quantized(**batch)
    exact = model(**batch)[0]
    atol = 0.15 * float(exact.detach().abs().max())
    torch.testing.assert_close(quantized.eval()(**batch)[0], exact, rtol=0, atol=atol)


def test_untied_heads(tmp_path):
    """The output matrix and its bias are those of the decoder, both ways."""
    model = build("ForMaskedLM", config_of("ForMaskedLM", tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "ours")
    peer = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        peer.lm_head.decoder.bias.normal_()
        peer.lm_head.decoder.weight.normal_()
    peer.save_pretrained(tmp_path / "theirs")
    batch = batch_for("ForMaskedLM")
    again = IBertForMaskedLM.from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(again(**batch).logits, peer.eval()(**batch).logits, rtol=1e-5, atol=1e-4)


def test_files_of_torch_save(tmp_path):
    """pytorch_model.bin, as the published models have it: by the restricted unpickler."""
    model = build("ForMaskedLM")
    model.save_pretrained(tmp_path)
    peer = transformers.IBertForMaskedLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = peer.state_dict() | {"ibert.embeddings.position_ids": torch.arange(20)[None]}
    torch.save(state, tmp_path / "pytorch_model.bin")
    again, info = IBertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert equal_states(again, model)
    assert not any(info.values())
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo hello'\ntR.")
    with pytest.raises(UserError, match=r"pytorch_model.bin is not a file of torch.save"):
        IBertForMaskedLM.from_pretrained(tmp_path)


def test_another_head_and_shards(tmp_path):
    model = build("ForMaskedLM")
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    other, info = _class("ForSequenceClassification").from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert set(info["missing_keys"]) == {
        f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")
    }
    assert "lm_head.dense.weight" in info["unexpected_keys"]
    assert other.config.num_labels == 3
    assert other.ibert.embeddings.norm.weight.equal(model.ibert.embeddings.norm.weight)


def test_configurations_pass_both_ways(tmp_path):
    theirs = transformers.IBertConfig(vocab_size=77, quant_mode=True, force_dequant="gelu", num_labels=3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = IBertConfig.from_pretrained(tmp_path / "theirs")
    assert (ours.vocab_size, ours.quant_mode, ours.force_dequant, ours.num_labels) == (77, True, "gelu", 3)
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert type(again) is transformers.IBertConfig
    shared = theirs.to_dict().keys() & ours.to_dict().keys() - {
        "architectures",
        "transformers_version",
        "dtype",
        "_name_or_path",
    }
    assert shared >= {"pad_token_id", "quant_mode", "layer_norm_eps", "id2label"}
    for name in shared:
        assert again.to_dict()[name] == theirs.to_dict()[name], name
    assert IBertConfig.from_pretrained(tmp_path / "ours").encoder_config() == ours.encoder_config()


def test_directories_of_another_kind(tmp_path):
    build("Model").save_pretrained(tmp_path / "ibert")
    with pytest.raises(UserError, match="model_type 'ibert': expected megatron-bert"):
        MegatronBertModel.from_pretrained(tmp_path / "ibert")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "electra"}))
    with pytest.raises(UserError, match="model_type 'electra': expected ibert"):
        IBertModel.from_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="IBertModel takes an IBertConfig, but got a MegatronBertConfig"):
        IBertModel(megatron_bert.MegatronBertConfig())
    with pytest.raises(UserError, match="MegatronBertModel takes a MegatronBertConfig, but got an IBertConfig"):
        MegatronBertModel(CONFIG)


def _divided_round_trip(source, target):
    model = IBertForMaskedLM.from_pretrained(source, tp=make_tensor_parallel())
    model.save_pretrained(target)
    return model.num_parameters()


@pytest.mark.parametrize("size", [2, 4])
def test_divided_models_save_and_load(size, tmp_path):
    model = build("ForMaskedLM")
    model.save_pretrained(tmp_path / "one")
    counts = run_world(size, _divided_round_trip, tmp_path / "one", tmp_path / "many")
    assert counts == [model.num_parameters()] * size
    assert equal_states(IBertForMaskedLM.from_pretrained(tmp_path / "many"), model)


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "quantized"])
@pytest.mark.parametrize("head", HEADS)
def test_states_go_both_ways(head, quantized):
    """load_state_dict(strict=True) of transformers' state and of ours; what its layers have seen is used."""
    batch, config = batch_for(head), config_of(head, quant_mode=quantized)
    peers = [getattr(transformers, f"IBert{head}")(transformers.IBertConfig(**config.to_dict())) for _ in range(2)]
    if quantized:
        peers[0].train()(**batch)
    model = getattr(megatron_bert, f"IBert{head}")(config).eval()
    model.load_state_dict(peers[0].eval().state_dict())
    peers[1].load_state_dict(model.transformers_state_dict())
    if not quantized:
        assert_outputs_close(model(**batch), peers[0](**batch))
        assert_outputs_close(peers[1].eval()(**batch), peers[0](**batch), **EXACT)
        return
    limits = {name: float(quantizer.range) for name, quantizer in quantizers(model)}
    encoder = model.base_model.encoder.layer[0]
    theirs = peers[0].base_model.encoder.layer[0].attention.self.key_activation
    assert float(encoder.ranges["key"].range) == max(-float(theirs.x_min), float(theirs.x_max))
    assert (
        float(peers[1].base_model.encoder.layer[0].attention.self.key_activation.x_max)
        == limits[next(name for name in limits if name.endswith("0.ranges.key"))]
    )
    assert float(peers[1].base_model.embeddings.embeddings_act1.x_max) == pytest.approx(1e-5)  # nothing was seen
    model.load_state_dict(model.state_dict())  # ours, which says of every range what it is
    assert limits == {name: float(quantizer.range) for name, quantizer in quantizers(model)}
