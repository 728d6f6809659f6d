"""The whole pretraining model against transformers' MegatronBert with the same weights: logits, loss and gradients."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from megatron_bert.model.pretraining import BertForPretraining
from parallel.cross_entropy import IGNORED
from tests.megatron_bert.model.support import CONFIG, LENGTH, make_batch, make_model, total_loss

transformers = pytest.importorskip("transformers")

_PLAIN_NAMES = {
    "embeddings.position_embeddings": "bert.embeddings.position_embeddings",
    "embeddings.token_type_embeddings": "bert.embeddings.token_type_embeddings",
    "encoder.final_norm": "bert.encoder.ln",
    "masked_head.dense": "cls.predictions.transform.dense",
    "masked_head.norm": "cls.predictions.transform.LayerNorm",
    "pair_head.pooler": "bert.pooler.dense",
    "pair_head.classifier": "cls.seq_relationship",
}
_LAYER_NAMES = {
    "attention_norm": "attention.ln",
    "attention.output": "attention.output.dense",
    "mlp_norm": "ln",
    "mlp.intermediate": "intermediate.dense",
    "mlp.output": "output.dense",
}


def to_huggingface(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters (or gradients) under transformers' names, without padding and with query, key and value apart."""
    heads, head_dim, words = CONFIG.num_attention_heads, CONFIG.head_dim, CONFIG.vocab_size
    result = {}
    for name, tensor in tensors.items():
        owner, _, kind = name.rpartition(".")
        if name == "embeddings.word_embeddings.weight":
            result["bert.embeddings.word_embeddings.weight"] = tensor[:words]
        elif name == "masked_head.bias":
            result["cls.predictions.bias"] = tensor[:words]
        elif owner in _PLAIN_NAMES:
            result[f"{_PLAIN_NAMES[owner]}.{kind}"] = tensor
        else:
            number, part = owner.removeprefix("encoder.layers.").split(".", 1)
            layer = f"bert.encoder.layer.{number}"
            if part == "attention.query_key_value":
                fused = tensor.unflatten(0, (heads, 3, head_dim))
                for index, projection in enumerate(("query", "key", "value")):
                    result[f"{layer}.attention.self.{projection}.{kind}"] = fused[:, index].flatten(0, 1)
            else:
                result[f"{layer}.{_LAYER_NAMES[part]}.{kind}"] = tensor
    return result


def _peer(model: BertForPretraining, act: str):
    sizes = asdict(CONFIG) | {"hidden_act": act, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    names = transformers.MegatronBertConfig().to_dict().keys()
    config = transformers.MegatronBertConfig(**{name: value for name, value in sizes.items() if name in names})
    peer = transformers.MegatronBertForPreTraining(config)
    weights = to_huggingface(dict(model.named_parameters()))
    missing, unexpected = peer.load_state_dict({k: v.detach().clone() for k, v in weights.items()}, strict=False)
    assert not unexpected
    # What is left is the output matrix, tied to the word embeddings, and a second name of its bias.
    assert set(missing) <= {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    peer.tie_weights()
    assert peer.cls.predictions.decoder.weight is peer.bert.embeddings.word_embeddings.weight
    return peer


@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
def test_same_logits_loss_and_gradients(act):
    model, batch = make_model(hidden_act=act), make_batch()
    peer = _peer(model, act)
    labels = torch.full_like(batch.tokens, IGNORED)
    used = batch.slot_labels != IGNORED
    labels[batch.slots[used]] = batch.slot_labels[used]
    square = lambda tensor: tensor.view(-1, LENGTH)  # noqa: E731
    theirs = peer(
        input_ids=square(batch.tokens),
        attention_mask=batch.layout.key_mask.long(),
        token_type_ids=square(batch.types),
        labels=square(labels),
        next_sentence_label=batch.pair_labels,
    )
    ours = model(batch)
    # float32 sums over a hidden size of 32, twelve of them in a row: 1e-5 is some tens of roundings.
    close = {"rtol": 1e-5, "atol": 1e-5}
    masked = ours.masked[used][:, : CONFIG.vocab_size]
    torch.testing.assert_close(masked, theirs.prediction_logits.flatten(0, 1)[batch.slots[used]], **close)
    torch.testing.assert_close(ours.pair, theirs.seq_relationship_logits, **close)

    loss = total_loss(model, batch)
    torch.testing.assert_close(loss, theirs.loss, **close)
    loss.backward()
    theirs.loss.backward()
    gradients = to_huggingface({name: parameter.grad for name, parameter in model.named_parameters()})
    # transformers drops the gradient of looking up the padding token. Here too it is zero: padding stands only where
    # attention does not look.
    compared = 0
    for name, parameter in peer.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, rtol=1e-4, atol=2e-5, msg=lambda t, n=name: f"{n}: {t}"
        )
        compared += 1
    assert compared == len(gradients)


def test_activations_differ():
    # The two variants of GELU are told apart by the tolerance above.
    batch = make_batch()
    exact, tanh = (make_model(hidden_act=act)(batch).masked for act in ("gelu", "gelu_new"))
    assert float((exact - tanh).detach().abs().max()) > 1e-4
    also_tanh = make_model(hidden_act="gelu_pytorch_tanh")(batch).masked
    assert also_tanh.equal(tanh)
