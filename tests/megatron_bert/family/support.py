# SPDX-License-Identifier: Apache-2.0
"""Micro models of every class, their peers in transformers, and batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import megatron_bert
from megatron_bert import MegatronBertConfig
from megatron_bert.model.resharding import undivided
from parallel.errors import UserError
from parallel.mesh import SINGLE, TensorParallel
from tests.worlds import preload

preload("megatron_bert.family.language", "megatron_bert.ibert.family.heads")

#: 91 words in a table of 96; large weights, so that every part of the model matters in its result.
CONFIG = MegatronBertConfig(
    vocab_size=91,
    vocab_size_multiple=32,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=20,
    initializer_range=0.2,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
#: Sums of 32 and 64 terms in float32, some tens in a row, beside the same in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
BATCH, LENGTH, CHOICES = 3, 9, 4

#: Class -> the arguments of its labels.
HEADS = {
    "Model": {},
    "ForPreTraining": {"labels": "words", "next_sentence_label": "pairs"},
    "ForMaskedLM": {"labels": "words"},
    "ForCausalLM": {"labels": "words"},
    "ForNextSentencePrediction": {"labels": "pairs"},
    "ForSequenceClassification": {"labels": "classes"},
    "ForMultipleChoice": {"labels": "choices"},
    "ForTokenClassification": {"labels": "tags"},
    "ForQuestionAnswering": {"start_positions": "places", "end_positions": "places"},
}


def changed(**changes: Any) -> MegatronBertConfig:
    return CONFIG.replaced(**changes)


def config_of(head: str, **changes: Any) -> MegatronBertConfig:
    """A configuration that suits the class."""
    if head == "ForCausalLM":
        changes.setdefault("is_decoder", True)
    if "Classification" in head and "id2label" not in changes:
        changes.setdefault("num_labels", 5)
    return changed(**changes)


def build(head: str, config: MegatronBertConfig | None = None, *, tp: TensorParallel = SINGLE, **arguments: Any) -> Any:
    """A model of a class, in evaluation mode, with biases and norms that are not just zeros and ones."""
    torch.manual_seed(3)
    model = getattr(megatron_bert, f"MegatronBert{head}")(config or config_of(head), tp=tp, **arguments)
    return noisy(model).eval()


def noisy(model: Any) -> Any:
    """The model with noise on its biases and norms."""
    tp = model.tp
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                rows = model.config.vocab_size if model.has_words(name) else len(parameter)
                noise = torch.zeros(parameter.shape)
                noise[:rows] = torch.randn(rows, generator=generator) * 0.2
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                local.add_(noise.chunk(tp.size)[tp.rank] if local is not parameter else noise)
    return model


def peer_of(model: Any, directory: Path) -> Any:
    """transformers' model of the same class with the same weights."""
    import transformers

    model.save_pretrained(directory)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind = getattr(transformers, type(model).__name__)
    return kind.from_pretrained(directory, attn_implementation="eager").eval()


class Both:
    """Ours and theirs of every class, in evaluation mode and without gradients; each pair is made once.

    Args:
        build: makes ours of a class.
        directory: to hand weights over in.
    """

    def __init__(self, build: Callable[[str], Any], directory: Path) -> None:
        self.build, self.directory = build, directory
        self.made: dict[str, tuple[Any, Any]] = {}

    def __call__(self, head: str) -> tuple[Any, Any]:
        if head not in self.made:
            model = self.build(head)
            self.made[head] = model, peer_of(model, self.directory / head)
        for model in self.made[head]:
            model.zero_grad()
            model.eval()
        return self.made[head]


def batch_for(head: str, *, ragged: bool = True, length: int = LENGTH) -> dict[str, Tensor]:
    """Inputs of a class, with a 2-D mask."""
    generator = torch.Generator().manual_seed(5)
    shape = (BATCH, CHOICES, length) if head == "ForMultipleChoice" else (BATCH, length)
    ids = torch.randint(1, CONFIG.vocab_size, shape, generator=generator)
    lengths = torch.tensor([length, 4, 6])[:, *([None] * (len(shape) - 1))]
    mask = (torch.arange(length).expand(shape) < lengths).long() if ragged else torch.ones(shape, dtype=torch.int64)
    return {
        "input_ids": torch.where(mask.bool(), ids, CONFIG.pad_token_id),
        "attention_mask": mask,
        "token_type_ids": (torch.arange(length).expand(shape) > 3).long() * mask,
    }


def labels_for(head: str, length: int = LENGTH) -> dict[str, Tensor]:
    """Labels of a class, some of which are ignored where that is possible."""
    generator = torch.Generator().manual_seed(6)

    def random(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    words = random(CONFIG.vocab_size, BATCH, length)
    words[:, 1::3] = -100
    tags = random(5, BATCH, length)
    tags[1] = -100
    kinds = {
        "words": words,
        "pairs": random(2, BATCH),
        "classes": random(5, BATCH),
        "choices": random(CHOICES, BATCH),
        "tags": tags,
        "places": torch.tensor([2, length + 3, 0]),
    }
    return {name: kinds[kind] for name, kind in HEADS[head].items()}


def refused(call: Callable[[], Any]) -> str:
    """The one sentence by which a call is refused; anything else that happens fails."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def wrong_kinds(good: Tensor) -> dict[str, tuple[Any, str]]:
    """What is not a plain tensor on the model's device, in place of one that is, and how it is named."""
    kinds = {
        "text": ("a", "is a str: give a tensor"),
        "number": (1.5, "is a float: give a tensor"),
        "list": (good.tolist(), "is a list: give a tensor"),
        "dict": ({}, "is a dict: give a tensor"),
        "array": (good.numpy(), "is a ndarray: give a tensor"),
        "complex": (good.cfloat(), "is of type torch.complex64: give real numbers"),
        "meta": (good.to("meta"), "is on meta, but the model on cpu: move one"),
        "sparse": (good.to_sparse(), "is a sparse tensor"),
    }
    return kinds | {"nested": (torch.nested.nested_tensor([good, good], layout=torch.jagged), "is a nested tensor")}


def assert_kinds_are_named(model: Any, good: dict[str, Tensor]) -> None:
    """Every argument of forward is refused where it is not a plain tensor, or no switch, with a sentence of its own.

    Args:
        model: of any class.
        good: tensors for the arguments, of which those that the class does not take are left out.
    """
    names = inspect.signature(model.forward).parameters.keys()
    labels = {name: tensor for name, tensor in good.items() if name in names and ("label" in name or "_pos" in name)}
    switches = [name for name in names if name.startswith(("output_", "use_", "return_"))]
    assert len(switches) >= 3
    for name in good.keys() & names:
        for wrong, reason in wrong_kinds(good[name]).values():
            given = {"input_ids": good["input_ids"]} if name != "inputs_embeds" else {}
            message = refused(lambda given=given, name=name, wrong=wrong: model(**given | labels | {name: wrong}))
            assert message.startswith(f"{name} {reason}"), message
    for name in switches:
        for wrong in ("yes", 2, [True], good["input_ids"].numpy()):
            message = refused(lambda name=name, wrong=wrong: model(good["input_ids"], **{name: wrong}))
            assert message.startswith(f"{name} is ")
            assert message.endswith("give True or False")
        model(good["input_ids"], **{name: 0}), model(good["input_ids"], **{name: np.bool_(False)})


def arguments_for(head: str) -> dict[str, Tensor]:
    """Good tensors for all arguments of forward, of a class of either family."""
    ids = batch_for(head, ragged=False)["input_ids"].clamp(min=2)
    encoder = {
        "encoder_hidden_states": torch.zeros(BATCH, 2, 32),
        "encoder_attention_mask": torch.ones(BATCH, 2, dtype=torch.int64),
    }
    return encoder | {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "position_ids": torch.arange(2, 2 + LENGTH).expand(ids.shape).clone(),
        "head_mask": torch.ones(4),
        "inputs_embeds": torch.zeros(*ids.shape, 32),
        **labels_for(head),
    }


def as_tuples(cache: Any) -> tuple[tuple[Tensor, ...], ...]:
    """A cache as transformers 4 had it: key and value per layer, then those of the encoder."""
    parts = [cache.self_attention_cache] + [cache.cross_attention_cache] * any(cache.is_updated.values())
    layers = zip(*(part.layers for part in parts), strict=True)
    return tuple(tuple(tensor for part in layer for tensor in (part.keys, part.values)) for layer in layers)


def flatten(output: Any) -> dict[str, Tensor]:
    """Every tensor of an output by a name of its own; caches as keys and values."""
    tensors: dict[str, Tensor] = {}
    for field in fields(output):
        value = getattr(output, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = value
        elif isinstance(value, tuple):
            for number, part in enumerate(value):
                for place, tensor in enumerate(part if isinstance(part, tuple) else (part,)):
                    tensors[f"{field.name}.{number}.{place}"] = tensor
    return tensors


def equal_states(one, other) -> bool:
    """Whether two models have the same tensors by name, bit for bit."""
    mine, yours = one.state_dict(), other.state_dict()
    return mine.keys() == yours.keys() and all(tensor.equal(yours[name]) for name, tensor in mine.items())


def assert_outputs_close(
    actual: Any, expected: Any, skip: tuple[str, ...] = ("past_key_values",), **close: Any
) -> None:
    """Every field of one output is there in the other, and close."""
    one = {name: t for name, t in flatten(actual).items() if not name.startswith(skip)}
    other = {name: t for name, t in _theirs(expected).items() if not name.startswith(skip)}
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, **(close or CLOSE), msg=lambda text, n=name: f"{n}: {text}")


def _theirs(output: Any) -> dict[str, Tensor]:
    if not hasattr(output, "items"):
        return flatten(output)
    tensors = {}
    for name, value in output.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, tuple):
            for number, part in enumerate(value):
                for place, tensor in enumerate(part if isinstance(part, tuple) else (part,)):
                    tensors[f"{name}.{number}.{place}"] = tensor
    return tensors


def gradients(model: Any) -> dict[str, Tensor]:
    """Gradients, whole and without padding of the vocabulary."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(undivided(parameter)) if parameter.grad is None else undivided(parameter.grad)
        found[name] = gradient[: model.config.vocab_size] if model.has_words(name) else gradient
    return found


def assert_gradients_close(model: Any, peer: Any) -> None:
    """Gradients of a model and of transformers' are close, relative to the largest of each parameter."""
    ours = gradients(model)
    for name, parameter in peer.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        largest = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(
            ours[name], expected, rtol=0, atol=1e-5 * largest, msg=lambda text, n=name: f"{n}: {text}"
        )


def assert_trains_as(model: Any, peer: Any, batch: dict[str, Tensor]) -> None:
    """Outputs of a model and of transformers' are close, and gradients of the loss, or of states where there is none.

    Gradients are not compared where the output matrix is not tied: its bias has two names there, and one gradient.
    """
    ours, theirs = model(**batch), peer(**batch)
    assert_outputs_close(ours, theirs)
    for output in (ours, theirs):
        has_loss = getattr(output, "loss", None) is not None
        total = output.loss if has_loss else output.last_hidden_state.square().mean() + output.pooler_output.mean()
        total.backward()
    if model.config.tie_word_embeddings:
        assert_gradients_close(model, peer)
