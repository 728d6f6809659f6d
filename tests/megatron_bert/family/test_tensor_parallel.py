# SPDX-License-Identifier: Apache-2.0
"""Any class and option at tensor size 1, 2 and 4: equal outputs, losses and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.errors import UserError
from parallel.mesh import SINGLE, TensorParallel
from tests.megatron_bert.family.support import (
    BATCH,
    CONFIG,
    HEADS,
    LENGTH,
    batch_for,
    build,
    changed,
    config_of,
    flatten,
    gradients,
    labels_for,
)
from tests.worlds import make_tensor_parallel, run_world

ALL = {"output_hidden_states": True, "output_attentions": True}
HEAD_MASK = torch.tensor([[1.0, 0.0, 0.5, 1.0], [0.2, 0.0, 1.0, 0.25]])
DECODER = {"is_decoder": True, "add_cross_attention": True}
PRUNED = {"num_hidden_layers": 3, "pruned_heads": {0: [1, 2], 2: [0, 1]}}
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}

#: Case -> class, changes of the configuration, further arguments.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{head: (head, {}, {}) for head in HEADS},
    "everything": ("ForPreTraining", {}, ALL),
    "head-mask": ("ForMaskedLM", {}, ALL | {"head_mask": HEAD_MASK}),
    "relative": ("ForQuestionAnswering", {"position_embedding_type": "relative_key_query"}, {}),
    "cross": ("ForCausalLM", DECODER | {"position_embedding_type": "relative_key"}, ALL),
    "relu": ("ForMaskedLM", {"hidden_act": "relu"}, {}),
    "silu": ("ForMaskedLM", {"hidden_act": "silu"}, {}),
    "untied": ("ForMaskedLM", {"tie_word_embeddings": False}, {}),
    "pruned": ("ForTokenClassification", PRUNED, {"head_mask": HEAD_MASK[0]}),
    "dropout": ("ForSequenceClassification", DROPOUT, {}),
    "dropout-written-out": ("ForMaskedLM", DROPOUT, ALL),
}


def _run(tp: TensorParallel, sizes: int) -> dict[str, dict[str, Tensor]]:
    """Tensors of every case that the tensor size divides."""
    results = {}
    for case, (head, changes, extra) in CASES.items():
        if case == "pruned" and sizes > 2:
            continue  # two heads remain
        model = build(head, config_of(head, **changes), tp=tp)
        batch = batch_for(head) | labels_for(head)
        if "add_cross_attention" in changes:
            generator = torch.Generator().manual_seed(9)
            batch["encoder_hidden_states"] = torch.randn(BATCH, 5, CONFIG.hidden_size, generator=generator)
        if case.startswith("dropout"):
            model.train()
            # Ranks need not draw alike: the first one's seed counts.
            torch.manual_seed(7 + 100 * tp.rank)
        out = model(**batch, **extra)
        loss = out.last_hidden_state.square().mean() + out.pooler_output.sum() if head == "Model" else out.loss
        loss.backward()
        tensors = {n: t.detach() for n, t in flatten(out).items() if not n.startswith("past_key_values")}
        results[case] = tensors | {f"gradient of {name}": tensor for name, tensor in gradients(model).items()}
    return results


def _divided() -> dict[str, dict[str, Tensor]]:
    tp = make_tensor_parallel()
    return _run(tp, tp.size) | {"changes": _changes(tp), "text": _text(tp)}


def _changes(tp: TensorParallel) -> dict[str, Tensor]:
    """A model that is pruned, resized and started while it is divided."""
    torch.manual_seed(11 + 100 * tp.rank)
    model = build("ForMaskedLM", changed(vocab_size_multiple=4), tp=tp)
    if tp.size < 4:
        model.prune_heads({1: [0, 3]})
    torch.manual_seed(12 + 100 * tp.rank)
    model.resize_token_embeddings(99)
    out = model(batch_for("ForMaskedLM")["input_ids"] + 8)
    assert out.logits.shape == (BATCH, LENGTH, 99)
    # New words are near the mean of the others, each with noise that the order of draws decides.
    return {"logits": out.logits.detach()[..., :91]}


def _text(tp: TensorParallel) -> dict[str, Tensor]:
    model = build("ForCausalLM", tp=tp)
    ids = batch_for("ForCausalLM", ragged=False, length=4)["input_ids"]
    torch.manual_seed(13 + 100 * tp.rank)
    drawn = model.generate(ids, do_sample=True, top_k=20, temperature=2.0, max_new_tokens=8)
    return {"greedy": model.generate(ids, max_new_tokens=8), "drawn": drawn}


@pytest.fixture(scope="module")
def single() -> dict[str, dict[str, Tensor]]:
    return _run(SINGLE, 1) | {"changes": _changes(SINGLE), "text": _text(SINGLE)}


@pytest.fixture(scope="module", params=[2, 4])
def divided(request) -> list[dict[str, dict[str, Tensor]]]:
    return run_world(request.param, _divided)


@pytest.mark.parametrize("case", [*CASES, "changes", "text"])
def test_equal_results(case, divided, single):
    if case not in divided[0] or (case == "changes" and len(divided) == 4):
        pytest.skip("as many ranks as heads cannot be left with fewer")
    expected = single[case]
    for results in divided:
        assert results[case].keys() == expected.keys()
        for name, tensor in expected.items():
            largest = max(1.0, float(tensor.abs().max()))
            torch.testing.assert_close(
                results[case][name], tensor, rtol=0, atol=1e-5 * largest, msg=lambda text, n=name: f"{n}: {text}"
            )


def _refused_pruning() -> tuple[str, Any, list[int]]:
    model = build("Model", CONFIG, tp=make_tensor_parallel())
    try:
        model.prune_heads({0: [1, 2], 1: [1]})
    except UserError as error:
        return str(error), model.config.pruned_heads, [len(layer.attention.numbers) for layer in model.layer_list()]
    raise AssertionError("three heads were divided among two ranks")


def test_pruning_that_is_refused_changes_nothing():
    for message, pruned, heads in run_world(2, _refused_pruning):
        assert "the number of heads that remain in a layer is 3" in message
        assert not pruned
        assert heads == [4, 4]
