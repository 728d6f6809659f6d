# SPDX-License-Identifier: Apache-2.0
"""The whole pretraining model beside one of transformers' with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_bert.model.batch import MicroBatch
from megatron_bert.model.pretraining import BertForPretraining
from parallel.cross_entropy import IGNORED
from tests.megatron_bert.model.support import CONFIG, LENGTH, total_loss

#: Gives tensors by our names transformers' names.
Renaming = Callable[[dict[str, Tensor]], dict[str, Tensor]]

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


def assert_trains_as(family: str, model: BertForPretraining, batch: MicroBatch, names: Renaming) -> None:
    """Logits, loss and gradients are those of transformers' model with the same weights.

    Args:
        family: of transformers' class, such as ``MegatronBert``.
        model: with CONFIG's sizes; its gradients are filled in.
        batch: a rectangle.
        names: of its parameters there.
    """
    peer = _peer(family, model, names)
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
    # transformers drops the gradient of looking up the padding token. Here too it is zero: padding stands only where
    # attention does not look.
    gradients = names({name: parameter.grad for name, parameter in model.named_parameters()})
    expected = {name: parameter.grad for name, parameter in peer.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def _peer(family: str, model: BertForPretraining, names: Renaming) -> Any:
    transformers = pytest.importorskip("transformers")
    configuration = getattr(transformers, f"{family}Config")
    sizes = asdict(model.config) | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    known = configuration().to_dict().keys()
    config = configuration(**{name: value for name, value in sizes.items() if name in known})
    peer = getattr(transformers, f"{family}ForPreTraining")(config).eval()
    weights = {name: tensor.detach().clone() for name, tensor in names(dict(model.named_parameters())).items()}
    missing, unexpected = peer.load_state_dict(weights, strict=False)
    assert not unexpected
    # What is left is the output matrix, tied to the word embeddings, and a second name of its bias.
    assert set(missing) <= {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    peer.tie_weights()
    assert peer.cls.predictions.decoder.weight is peer.bert.embeddings.word_embeddings.weight
    return peer
