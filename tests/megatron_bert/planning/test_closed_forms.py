# SPDX-License-Identifier: Apache-2.0
"""Memory, messages and operations in closed form: from first principles, and as a real step has them."""

from __future__ import annotations

import pytest

from megatron_bert.config import Settings
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.planning.communication import step_messages, totals
from megatron_bert.planning.kept import layer_tensors
from megatron_bert.planning.layouts import Layout, stages_of
from megatron_bert.planning.memory import FLAT_STATES, layout_of, rank_memory
from megatron_bert.planning.work import layer_flops, rank_flops
from megatron_bert.planning.workload import Workload, workload_of
from tests.megatron_bert.planning.support import Vocabulary, measured, settings_of


def workload(hidden: int = 1024, layers: int = 24, *, dropout: float = 0.1, length: int = 512) -> Workload:
    config = MegatronBertConfig(
        vocab_size=30522,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        hidden_dropout_prob=dropout,
    )
    return Workload(
        config=config,
        length=length,
        slots=77,
        global_batch=1024,
        steps=1,
        compute="bfloat16",
        compiled=False,
        losses=2,
    )


@pytest.mark.parametrize("tensor", [1, 2, 8])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_are_korthikantis_table_2(tensor: int, dropout: float) -> None:
    """sbh (10 + 24/t), 34 sbh / t with sequence parallelism, 2 sbh with recomputation; 2 of them masks of dropout."""
    work, tokens = workload(dropout=dropout), 4 * 512
    unit = tokens * work.config.hidden_size
    # What the table leaves out: statistics of two norms, and the log of each sum of fused attention.
    small = 2 * 8 * tokens + 4 * 16 / tensor * tokens
    masks = 2 if dropout else 0
    plain = layer_tensors(work, Layout(tensor=tensor, micro_batch=4))
    assert plain.kept == pytest.approx(unit * (8 + masks + 24 / tensor) + small)
    if tensor > 1:
        divided = layer_tensors(work, Layout(tensor=tensor, micro_batch=4, sequence=True))
        small = (2 * 8 + 4 * 16) * tokens / tensor
        assert divided.kept == pytest.approx(unit * (32 + masks) / tensor + small)
    full = layer_tensors(work, Layout(tensor=tensor, micro_batch=4, recompute="full"))
    assert full.kept == pytest.approx(2 * unit, rel=0.005)  # and the keys of dropout
    selective = layer_tensors(work, Layout(tensor=tensor, micro_batch=4, recompute="selective"))
    assert plain.kept - selective.kept == pytest.approx(2 * 4 * unit / tensor)


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_states_are_zeros(ranks: int) -> None:
    """18 bytes per parameter on one rank, 6 + 12 / d on d; 16 and 8 + 8 / d in float32."""
    assert sum(FLAT_STATES[2]) == 18
    assert sum(FLAT_STATES[4]) == 16
    work = workload()
    for sharding, shards in (("none", 1), ("optimizer", ranks)):
        layout = Layout(data=ranks, sharding=sharding, micro_batch=4)  # type: ignore[arg-type]
        stages = stages_of(work, layout)
        parts = rank_memory(work, layout, stages).parts
        states = sum(parts[part] for part in ("weights", "gradients", "optimizer"))
        # Buffers are filled up to sizes that ranks divide evenly.
        assert states / 336_297_858 == pytest.approx(6 + 12 / shards, rel=1e-4)


def test_operations_of_a_layer_by_hand() -> None:
    work = workload()
    tokens, hidden = 4 * 512, 1024
    products, scores = 24 * tokens * hidden**2, 4 * tokens * 512 * hidden
    assert layer_flops(work, Layout(micro_batch=4)) == (products + scores, 2 * products + 5 * scores // 2)


@pytest.mark.parametrize(
    ("sequence", "expected"),
    [(False, {"all-reduce": 4}), (True, {"all-gather": 6, "reduce-scatter": 4})],
)
def test_tensor_messages_of_a_layer_are_megatrons(sequence: bool, expected: dict[str, int]) -> None:
    work = workload(layers=2)
    few, more = (
        totals(step_messages(w, layout, stages_of(w, layout)))
        for w in (work, workload(layers=3))
        for layout in [Layout(tensor=4, sequence=sequence, micro_batch=1024)]
    )
    added = {what[0]: more[what][0] - few[what][0] for what in few if more[what][0] != few[what][0]}
    assert added == expected


#: A rank, a number of ranks, and settings: every schedule, sharding and recomputation, and ranks within the axes.
CASES = [
    (0, 1, ["training.global_batch_size=16"]),
    (0, 1, ["training.global_batch_size=8", "training.recompute=full"]),
    (0, 1, ["training.global_batch_size=8", "training.recompute=selective", "model.hidden_dropout_prob=0.0"]),
    (3, 4, ["training.global_batch_size=32", "parallel.sharding=none"]),
    (5, 8, ["parallel.tensor=2"]),
    (7, 8, ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"]),
    (1, 8, ["parallel.tensor=4", "parallel.sequence=true", "parallel.pipeline=2", "training.recompute=full"]),
    (17, 64, ["parallel.tensor=2", "parallel.sequence=true", "training.micro_batch_size=2"]),  # a rank of no biases
    (1, 4, ["parallel.pipeline=4", "parallel.schedule=zero-bubble-h1"]),
    (0, 4, ["parallel.pipeline=2", "parallel.schedule=zero-bubble-h1", "parallel.tensor=2", "parallel.sequence=true"]),
    (1, 4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.schedule=zero-bubble-v"]),
    (1, 2, ["parallel.pipeline=2", "parallel.schedule=interleaved-1f1b", "parallel.virtual_stages=2"]),
    (2, 4, ["parallel.sharding=full"]),
    (6, 8, ["parallel.tensor=2", "parallel.sequence=true", "parallel.sharding=hybrid", "parallel.shard_size=2"]),
    (2, 4, ["data.pair_objective=none", "data.packed=false", "precision.compute=float32"]),
    (5, 8, ["parallel.sharding=none", "parallel.pipeline=2"]),  # a data rank beyond the first, of copies
    (3, 4, ["parallel.sharding=none", "parallel.tensor=2", "parallel.sequence=true"]),
    (3, 4, ["parallel.pipeline=4", "parallel.schedule=zero-bubble-h1", "training.recompute=full"]),
    (1, 2, ["parallel.pipeline=2", "parallel.schedule=zero-bubble-v", "training.recompute=selective"]),
    (0, 1, ["precision.compute=float32"]),  # rows without a kernel of their own
    (1, 2, ["precision.compute=float32", "parallel.tensor=2", "training.recompute=full"]),
    (0, 1, ["training.device=cpu"]),
    (1, 2, ["training.device=cpu", "precision.compute=float32", "parallel.tensor=2", "training.recompute=selective"]),
    (0, 1, ["training.device=cpu", "precision.compute=float32", "model.attention_probs_dropout_prob=0.0"]),
    (1, 2, ["parallel.sharding=full", "data.seq_length=32", "training.micro_batch_size=2"]),
    (2, 4, ["parallel.sharding=full", "data.seq_length=32", "training.micro_batch_size=16"]),
    (2, 4, ["parallel.sharding=full", "data.seq_length=32", "training.micro_batch_size=16", "training.recompute=full"]),
    (1, 8, ["parallel.sharding=hybrid", "parallel.shard_size=2", "data.seq_length=32"]),
    *(
        (1, 8, ["parallel.tensor=8", "model.num_attention_heads=8", "training.micro_batch_size=32", *more])
        for more in (
            ["parallel.sequence=true"],
            ["parallel.sequence=true", "training.recompute=selective"],
            ["parallel.sequence=true", "training.recompute=full"],
            ["data.packed=false"],
            ["training.recompute=full"],
        )
    ),
    # Whole matrices are large beside a rank's share of them.
    (
        3,
        16,
        [
            "parallel.tensor=8",
            "parallel.sequence=true",
            "parallel.sharding=full",
            "model.num_attention_heads=8",
            "model.hidden_size=512",
            "training.micro_batch_size=1",
            "training.recompute=full",
        ],
    ),
]


def _sizes(ranks: int, *overrides: str) -> Settings:
    """Large enough that what grows with neither tokens nor features does not show.

    As few micro batches as a pipeline has phases, and two layers where none are divided: those between are alike.
    """
    sizes = ["model.hidden_size=256", "data.seq_length=256", "training.micro_batch_size=8"]
    settings = settings_of(*sizes, *overrides)
    layout = settings.layout(ranks)
    batch = 2 * layout.pipeline * layout.data * settings.training.micro_batch_size
    divided = layout.tensor * layout.pipeline > 1 or settings.parallel.sharding in ("full", "hybrid")
    sizes += [f"model.num_hidden_layers={4 if divided else 2}", f"training.global_batch_size={batch}"]
    return settings_of(*sizes, *overrides)


@pytest.mark.parametrize(
    ("rank", "ranks", "overrides"), CASES, ids=lambda value: " ".join(value) if isinstance(value, list) else str(value)
)
def test_agrees_with_a_real_step(rank: int, ranks: int, overrides: list[str]) -> None:
    settings = _sizes(ranks, *overrides)
    work = workload_of(settings, settings.model_config_for(Vocabulary.vocab_size, 0), 1, settings.data.seq_length)
    layout = layout_of(settings, ranks)
    stages = stages_of(work, layout)
    place, in_stage = divmod(rank, ranks // layout.pipeline)
    step = measured(settings, rank, ranks)
    assert rank_flops(work, layout, stages, place) == step.flops
    expected = totals(step_messages(work, layout, stages, place, in_stage // layout.tensor))
    assert expected == {tuple(what): (seen.count, seen.bytes) for what, seen in step.traffic.items()}
    memory = rank_memory(work, layout, stages, place)
    assert memory.peak == pytest.approx(step.peak_bytes, rel=0.03)
    assert memory.needed == pytest.approx(max(step.peak_bytes, step.building), rel=0.03)
    if layout.flat:  # no more than what stays, in which a step's activations have yet to find room
        assert step.building <= 1.01 * sum(step.resident.values())


@pytest.mark.parametrize(
    ("rank", "ranks", "overrides"),
    [
        (0, 1, ["training.micro_batch_size=1"]),
        (0, 1, ["training.micro_batch_size=2", "training.recompute=full"]),
        (1, 2, ["training.micro_batch_size=1", "parallel.pipeline=2"]),
        (0, 8, ["training.micro_batch_size=2", "parallel.tensor=8", "model.num_attention_heads=8"]),
    ],
    ids=["one", "recompute", "last", "tensor"],
)
def test_gradients_of_a_large_vocabulary(
    rank: int, ranks: int, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of embeddings and of the head, and both of them added up where one rank has both."""
    monkeypatch.setattr(Vocabulary, "vocab_size", 30522)
    settings = _sizes(ranks, *overrides)
    work = workload_of(settings, settings.model_config_for(30522, 0), 1, settings.data.seq_length)
    layout = layout_of(settings, ranks)
    memory = rank_memory(work, layout, stages_of(work, layout), rank // (ranks // layout.pipeline))
    assert memory.peak == pytest.approx(measured(settings, rank, ranks).peak_bytes, rel=0.01)
