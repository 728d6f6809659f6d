# SPDX-License-Identifier: Apache-2.0
"""That the engine is what it says: integers alone from ids to logits, and the same bits everywhere."""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import sys

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from megatron_bert.ibert.engine import reference
from megatron_bert.ibert.engine.backend import Executable
from megatron_bert.ibert.engine.backends import BACKENDS, backend_by_name
from megatron_bert.ibert.engine.plan import Plan
from megatron_bert.ibert.family.ranges import save_ranges
from parallel.errors import UserError
from tests.megatron_bert.ibert.engine_plans import WORDS, random_plan
from tests.megatron_bert.ibert.literal_reader import Classifier
from tests.megatron_bert.ibert.test_integer_model import quantized

HEADS = ("pooler", "classifier", "pair", "masked")
#: SHA-256 of the hidden states and of all heads' results of two fixed plans, on every machine.
GOLDEN = {
    False: "d0205c5145fa5cec9eaada382176153fefda5b2400aa87e4f6d5c2463be2d2f9",
    True: "7e7bde4e41b9e5d0ec99acff9eda3d8e00b26fdb4ddfc332f700cbf76fac089e",
}


def _ids(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    total = sum(lengths)
    tokens = torch.randint(0, WORDS, (total,), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])
    types = torch.randint(0, 2, (total,), generator=generator)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return tokens.int(), positions.int(), types.int(), starts.int()


def _results(executable: Executable, given: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Tensor]:
    hidden = executable.encode(*given)
    return [hidden, *(executable.head(name, hidden) for name in HEADS)]


def _backends() -> list[str]:
    found = []
    for name in BACKENDS:
        try:
            backend_by_name(name)
        except UserError:
            continue
        found.append(name)
    return found


@pytest.mark.parametrize("post", [False, True])
def test_the_graph_from_ids_to_logits_has_no_floating_point(post):
    """No node, no constant, no number: by tracing every operation."""
    plan, given = random_plan(post=post), _ids((9, 4))
    executable = reference.ReferenceBackend().prepare(plan)
    _results(executable, given)  # what is cached is computed

    def run(tokens: Tensor, positions: Tensor, types: Tensor) -> list[Tensor]:
        return _results(executable, (tokens, positions, types, given[3]))

    graph = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(*given[:3])
    assert _floating(graph) == []
    assert len(graph.graph.nodes) > 500

    def planted(tokens: Tensor) -> Tensor:
        return (tokens.float() * 0.5).int()

    assert len(_floating(make_fx(planted, tracing_mode="fake")(given[0]))) == 2


def _floating(graph: torch.fx.GraphModule) -> list[str]:
    found = []
    for node in graph.graph.nodes:
        values = torch.utils._pytree.tree_leaves((node.meta.get("val"), node.args, node.kwargs))
        if any(isinstance(value, (float, complex)) or _is_floating(value) for value in values):
            found.append(str(node))
    constants = {**dict(graph.named_buffers()), **dict(graph.named_parameters()), **vars(graph)}
    return found + [name for name, value in constants.items() if _is_floating(value)]


def _is_floating(value: object) -> bool:
    if isinstance(value, torch.dtype):
        return value.is_floating_point or value.is_complex
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the status of Linux's mathematics library")
def test_no_status_flag_of_floating_point_is_raised():
    """A single inexact operation would raise one."""
    library = ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6")
    everything = 0x3D  # invalid, divide by zero, overflow, underflow, inexact
    plan, given = random_plan(), _ids((30, 7))
    executable = reference.ReferenceBackend().prepare(plan)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # flags are a thread's own
    try:
        library.feclearexcept(everything)
        _results(executable, given)
        assert library.fetestexcept(everything) == 0
        torch.tensor([1.0, 3.0]).div(3.0)
        assert library.fetestexcept(everything) != 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("name", list(BACKENDS))
def test_golden_hashes(name, post):
    if name not in _backends():
        pytest.skip(f"the {name} backend does not run here")
    plan = random_plan(post=post, seed=7)
    digest = hashlib.sha256()
    for result in _results(backend_by_name(name).prepare(plan), _ids((30, 1, 12))):
        digest.update(result.contiguous().numpy().tobytes())
    assert digest.hexdigest() == GOLDEN[post]


@pytest.mark.parametrize("exact", [True, False], ids=["products of 8 bits", "products of 32 bits"])
def test_batches_and_kinds_of_products_change_nothing(exact, monkeypatch):
    """Whatever stands beside a sequence, and where torch's 8-bit products would saturate."""
    plan: Plan = random_plan(seed=2, left=True)
    lengths = (17, 1, 40)
    tokens, positions, types, starts = _ids(lengths)
    executable = reference.ReferenceBackend().prepare(plan)
    together = executable.encode(tokens, positions, types, starts)
    monkeypatch.setattr(reference, "_exact_short_products", lambda: exact)
    for first, last in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        alone = [part[first:last] for part in (tokens, positions, types)]
        found = executable.encode(*alone, torch.tensor([0, last - first], dtype=torch.int32))
        assert torch.equal(found, together[first:last])


@pytest.mark.parametrize("name", ["MegatronBertForSequenceClassification", "IBertForSequenceClassification"])
def test_a_literal_reader_of_a_models_files_gives_the_logits(name, tmp_path):
    """The document and the files are enough: nothing of the package reads or computes there."""
    model, given, expected = quantized(name)
    model.save_pretrained(tmp_path)
    save_ranges(model, tmp_path)
    reader = Classifier(tmp_path)
    for ids, mask, logits in zip(given["input_ids"], given["attention_mask"], expected.logits, strict=True):
        with torch.no_grad():
            alone = model(ids[mask.bool()][None]).logits[0]
        assert reader.logits(ids[mask.bool()].numpy())[0].tolist() == (alone * 2**12).tolist()
        if not given["token_type_ids"].any():
            assert torch.equal(alone, logits)
