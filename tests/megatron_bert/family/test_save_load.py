"""Directories: written here and read by transformers, written there and read here, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch

import megatron_bert
from megatron_bert import AutoTokenizer, MegatronBertConfig, MegatronBertForMaskedLM, MegatronBertModel
from megatron_bert.data.tokenizers import load_tokenizer
from parallel.errors import UserError
from tests.megatron_bert.family.support import CONFIG, HEADS, assert_outputs_close, batch_for, build, changed, config_of
from tests.worlds import make_tensor_parallel, run_world

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
EXACT = {"rtol": 0, "atol": 0}


def _class(head):
    return getattr(megatron_bert, f"MegatronBert{head}")


def _equal(one, other) -> bool:
    mine, yours = one.state_dict(), other.state_dict()
    return mine.keys() == yours.keys() and all(tensor.equal(yours[name]) for name, tensor in mine.items())


def _auto(head):
    names = {"Model": "AutoModel", "ForNextSentencePrediction": "AutoModelForNextSentencePrediction"}
    return getattr(transformers, names.get(head, f"AutoModel{head}"))


@pytest.mark.parametrize("head", HEADS)
def test_round_trips(head, tmp_path):
    """Ours, theirs from ours, theirs again, and ours from theirs: no bit changes."""
    model = build(head)
    model.save_pretrained(tmp_path / "ours")
    assert _equal(_class(head).from_pretrained(tmp_path / "ours"), model)
    peer, info = _auto(head).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(peer).__name__ == type(model).__name__
    assert sum(parameter.numel() for parameter in peer.parameters()) == model.num_parameters()
    peer.save_pretrained(tmp_path / "theirs")
    again, info = _class(head).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(info.values())
    assert _equal(again, model)
    assert again.config.num_labels == model.config.num_labels
    assert_outputs_close(again(**batch_for(head)), model(**batch_for(head)), (), **EXACT)


@pytest.mark.parametrize(
    "changes",
    [
        {"is_decoder": True, "add_cross_attention": True},
        {"position_embedding_type": "relative_key", "is_decoder": True, "add_cross_attention": True},
        {"pruned_heads": {0: [1], 2: [0, 3]}},
        {"tie_word_embeddings": False},
        {"eos_token_id": [3, 4], "bos_token_id": 2, "id2label": {0: "a", 1: "b", 2: "c"}},
    ],
    ids=["cross", "relative", "pruned", "untied", "names"],
)
def test_options(changes, tmp_path):
    model = build("ForMaskedLM", changed(**changes))
    model.save_pretrained(tmp_path)
    again = MegatronBertForMaskedLM.from_pretrained(tmp_path)
    assert _equal(again, model)
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
    assert _equal(again, model)
    assert not any(info.values())
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo hello'\ntR.")
    with pytest.raises(UserError):
        type(model).from_pretrained(tmp_path)


def test_shards(tmp_path):
    model = build("ForMaskedLM")
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert _equal(MegatronBertForMaskedLM.from_pretrained(tmp_path), model)
    peer = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert peer.bert.embeddings.word_embeddings.weight.equal(model.get_input_embeddings().weight[:91])
    model.save_pretrained(tmp_path, max_shard_size=10**9)  # nothing of the shards stays behind
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    for size in ("many", "-1GB", "3 XB"):
        with pytest.raises(UserError, match="max_shard_size"):
            model.save_pretrained(tmp_path, max_shard_size=size)


def test_another_head(tmp_path, caplog):
    build("ForPreTraining").save_pretrained(tmp_path)
    head = "ForSequenceClassification"
    torch.manual_seed(0)
    model, info = _class(head).from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert info["missing_keys"] == ["classifier.weight", "classifier.bias"]
    assert "cls.seq_relationship.weight" in info["unexpected_keys"]
    assert len(info["unexpected_keys"]) == 7
    assert "classifier.weight" in caplog.text
    assert model.config.num_labels == 3
    assert 0.1 < float(model.classifier.weight.detach().std()) < 0.3
    assert not model.training
    bare = MegatronBertModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert bare.pooler is None
    back = _class(head).from_pretrained(
        tmp_path, config=config_of(head, num_labels=4), id2label=dict(enumerate("wxyz"))
    )
    assert back.config.label2id == {"w": 0, "x": 1, "y": 2, "z": 3}


def test_sizes_that_do_not_match(tmp_path):
    head = "ForSequenceClassification"
    build(head).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"classifier\.weight has shape \[5, 32\], but the model \[3, 32\]"):
        _class(head).from_pretrained(tmp_path, num_labels=3)
    model, info = _class(head).from_pretrained(
        tmp_path, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert info["mismatched_keys"] == ["classifier.weight", "classifier.bias"]
    assert model.classifier.weight.isfinite().all()


def test_number_formats(tmp_path):
    build("Model").to(torch.bfloat16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    kinds = {None: torch.float32, "auto": torch.bfloat16, "float16": torch.float16, torch.float64: torch.float64}
    for given, expected in kinds.items():
        model = MegatronBertModel.from_pretrained(tmp_path, torch_dtype=given)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        assert MegatronBertModel.from_pretrained(tmp_path, dtype=given).dtype == model.dtype
    with pytest.raises(UserError, match="dtype is 'auto', but torch_dtype 'float16': give one of them"):
        MegatronBertModel.from_pretrained(tmp_path, torch_dtype="float16", dtype="auto")
    with pytest.raises(UserError, match="torch_dtype is 'int8'"):
        MegatronBertModel.from_pretrained(tmp_path, torch_dtype="int8")


def test_directories_that_hold_no_model(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        MegatronBertModel.from_pretrained("nvidia/megatron-bert-cased-345m")
    CONFIG.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no weights"):
        MegatronBertModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="model_type 'bert': expected megatron-bert"):
        MegatronBertConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        MegatronBertConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["vocab", "json", "sentencepiece"])
def test_tokenizers_beside_the_model(kind, tmp_path):
    text = "Hello, my dog is cute and he sees the sky"
    vocabulary = _vocabulary(kind, text, tmp_path / "source")
    tokenizer = AutoTokenizer(vocabulary, max_length=64)
    build("Model").save_pretrained(tmp_path / "model", tokenizer=tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again.vocabulary.fingerprint == vocabulary.fingerprint
    assert again.model_max_length == 64
    assert len(again) == len(vocabulary)
    batch = again([text, "dog"], ["the sky", "cute"], return_tensors="pt")
    expected = tokenizer([text, "dog"], ["the sky", "cute"])
    assert all(tensor.equal(expected[name]) for name, tensor in batch.items())
    if kind != "sentencepiece":
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")(
            [text, "dog"], ["the sky", "cute"], padding=True, return_tensors="pt"
        )
        for name, tensor in batch.items():
            assert tensor.equal(theirs[name]), name


def test_what_a_tokenizer_is_asked_for(tmp_path):
    tokenizer = AutoTokenizer(_vocabulary("vocab", "the sky", tmp_path / "source"), max_length=3)
    usual = tokenizer(["the sky", "sky"], truncation=True)["input_ids"]
    assert tokenizer(["the sky", "sky"], truncation="longest_first", padding="longest")["input_ids"].equal(usual)
    for given in ({"padding": "max_length"}, {"truncation": "only_first"}):
        with pytest.raises(UserError, match="give True or False"):
            tokenizer("sky", **given)
    with pytest.raises(UserError, match="a text is a int: give texts"):
        tokenizer([1, 2])


def _vocabulary(kind, text, folder):
    folder.mkdir()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(text.replace(",", " ,").split()))]
    if kind == "sentencepiece":
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text] * 50),
            model_prefix=str(folder / "tokenizer"),
            vocab_size=40,
            user_defined_symbols=["[CLS]", "[SEP]", "[PAD]", "[MASK]"],
            hard_vocab_limit=False,
            minloglevel=2,
        )
        return load_tokenizer(folder)
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    vocabulary = load_tokenizer(folder)
    if kind == "json":
        vocabulary.save(folder)
        (folder / "vocab.txt").unlink()
        return load_tokenizer(folder)
    return vocabulary


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
    assert _equal(MegatronBertForMaskedLM.from_pretrained(tmp_path / "many"), model)
