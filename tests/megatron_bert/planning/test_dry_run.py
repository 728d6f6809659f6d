"""A step of one rank of a simulated world."""

from __future__ import annotations

import torch.distributed as dist

from tests.megatron_bert.planning.support import measured, settings_of


def test_a_rank_of_512_runs_a_step_without_the_others() -> None:
    settings = settings_of(
        "parallel.tensor=4",
        "parallel.sequence=true",
        "parallel.pipeline=2",
        "training.global_batch_size=512",
    )
    step = measured(settings, 17, 512)
    assert not dist.is_initialized()
    assert step.flops > 0
    assert step.peak_bytes > sum(step.resident.values()) > 0
    messages = {(what.kind, what.group, what.size) for what in step.traffic}
    # The first stage of a pipeline in the middle of the world.
    for expected in (
        ("all-gather", "tensor", 4),
        ("reduce-scatter", "tensor", 4),
        ("send", "pipeline", 2),
        ("all-reduce", "tied", 2),
        ("reduce-scatter", "data_shard", 64),
        ("all-gather", "data_shard", 64),
    ):
        assert expected in messages
    sent = sum(entry.bytes for what, entry in step.traffic.items() if what.kind == "send")
    # Two micro batches of 4 x 32 tokens, a fourth of them on each tensor rank, in bfloat16.
    assert sent == 2 * (4 * 32 // 4) * 64 * 2


def test_a_cpu_run_takes_the_path_of_a_cpu() -> None:
    """Attention with dropout is written out there, and what fused attention never holds is held."""
    on = {
        device: measured(settings_of(f"training.device={device}", "data.packed=false"), 0, 1)
        for device in ("cpu", "cuda")
    }
    assert on["cpu"].peak["activations"] > on["cuda"].peak["activations"]
