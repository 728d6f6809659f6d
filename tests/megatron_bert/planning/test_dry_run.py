# SPDX-License-Identifier: Apache-2.0
"""A step of one rank of a simulated world."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from megatron_bert.cli import main
from megatron_bert.data.preprocess import preprocess
from megatron_bert.model.flops import parameter_count
from megatron_bert.planning.communication import step_messages, totals
from megatron_bert.planning.devices import DEVICES
from megatron_bert.planning.dry_run_command import measure
from megatron_bert.planning.layouts import stages_of
from megatron_bert.planning.measuring import StepMeter
from megatron_bert.planning.memory import layout_of
from megatron_bert.planning.simulation import simulated_world, tensors_without_numbers
from megatron_bert.planning.workload import workload_of
from parallel.collectives import start_all_gather, start_reduce_scatter, wait
from parallel.flat_buffers import ALIGNMENT
from tests.megatron_bert.planning.support import CONFIGS, Vocabulary, measured, settings_of
from tests.worlds import run_world


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


@pytest.mark.parametrize("sharding", ["optimizer", "full"])
def test_a_step_in_float16_is_one_that_its_loss_scale_does_not_skip(sharding: str) -> None:
    """It takes as much as one in bfloat16, the update included."""
    settings = ["parallel.pipeline=2", f"parallel.sharding={sharding}", "optimizer.name=lamb"]
    settings.append("training.global_batch_size=16")
    steps = [measured(settings_of(f"precision.compute={name}", *settings), 2, 4) for name in ("float16", "bfloat16")]
    assert steps[0].peak == steps[1].peak
    assert steps[0].flops == steps[1].flops
    sent = [
        {(what.kind, what.group, what.dtype.replace("bfloat16", "float16")): seen for what, seen in one.traffic.items()}
        for one in steps
    ]
    assert sent[0] == sent[1]


def test_a_cpu_run_takes_the_path_of_a_cpu() -> None:
    """Attention with dropout is written out there, and what fused attention never holds is held."""
    on = {
        device: measured(
            settings_of(f"training.device={device}", "data.packed=false", "training.micro_batch_size=32"), 0, 1
        )
        for device in ("cpu", "cuda")
    }
    assert on["cpu"].peak["activations"] > on["cuda"].peak["activations"]
    packed = measured(settings_of("training.device=cpu", "training.micro_batch_size=32", "parallel.tensor=2"), 0, 2)
    assert packed.peak["activations"] > 0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A vocabulary and a corpus."""
    folder = tmp_path_factory.mktemp("dry")
    words = [f"w{number}" for number in range(40)]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *words]), encoding="utf-8")
    text = folder / "text.txt"
    text.write_text("\n\n".join("\n".join(f"w{i} w{i + 1} w{i + 2} ." for i in range(9)) for _ in range(20)))
    report = preprocess([text], vocabulary, folder / "corpus", lowercase=True, progress=False)
    return [f"tokenizer.path={vocabulary}", "tokenizer.lowercase=true", f"data.train={report.prefix}"]


SMALL = [
    "model.hidden_size=64",
    "model.num_hidden_layers=4",
    "model.num_attention_heads=4",
    "data.seq_length=32",
    "training.global_batch_size=32",
    "training.micro_batch_size=4",
]


def test_the_command_checks_a_run_and_leaves_nothing(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    given = [*SMALL, *files, f"training.run_dir={run_dir}", "parallel.pipeline=2", "training.cuda_graphs=true"]
    given += ["--dry-run", "--gpus", "4"]
    assert main(["pretrain", str(CONFIGS / "bert_345m.yaml"), *given, "--gpu", "h100"]) == 0
    said = capsys.readouterr().out
    for words in (
        "rank 0 of 4",
        "rank 2 of 4",
        "by closed form",
        "as CUDA graphs",
        "send over 2 (pipeline)",
        "epochs",
        "warning:",
    ):
        assert words in said
    assert not run_dir.exists()


def test_the_fullest_rank_is_measured_wherever_it_is(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*SMALL, *files, f"training.run_dir={tmp_path / 'run'}", "parallel.pipeline=4", "parallel.schedule=1f1b"]
    given += ["model.num_hidden_layers=8", "parallel.stage_layers=[1,5,1,1]", "training.compile=false"]
    assert main(["pretrain", str(CONFIGS / "bert_345m.yaml"), *given, "--dry-run", "--gpus", "8"]) == 0
    said = capsys.readouterr().out
    assert "of 4 pipeline ranks, 1 takes most memory by closed form: it begins with rank 2" in said
    measured_ranks = [int(line.split()[1]) for line in said.splitlines() if line.startswith("rank ")]
    assert measured_ranks == [0, 2, 6]
    # Layers are large beside the usual vocabulary that is assumed.
    given += ["model.hidden_size=512", "training.global_batch_size=256", "training.micro_batch_size=64"]
    lines = measure("pretrain", CONFIGS / "bert_345m.yaml", given, 8)
    assert [line.split()[3] for line in lines] == ["0", "2", "6"], "before a job is queued, too"


def test_a_run_of_cuda_graphs_is_refused_by_what_these_take(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which is more than the step that is measured without them."""
    given = [*SMALL, *files, f"training.run_dir={tmp_path / 'run'}", "training.cuda_graphs=true"]
    given += ["parallel.pipeline=2", "training.global_batch_size=128", "training.micro_batch_size=32"]
    command = ["pretrain", str(CONFIGS / "bert_345m.yaml"), *given, "--dry-run", "--gpus", "2"]
    assert main(command) == 0
    said = capsys.readouterr().out
    found = [re.search(words, said) for words in (r"rank 0 of 2: ([\d.]+) MiB at", r"of their own, ([\d.]+) MiB")]
    plain, graphs = (float(match[1]) for match in found if match is not None)
    assert plain * 1.05 < graphs
    device = tmp_path / "between.yaml"
    values = DEVICES["cpu"].model_dump() | {"memory_gib": (plain + graphs) / 2 / 1024}
    device.write_text(yaml.safe_dump({"device": values}))
    assert main([*command, "--gpu", str(device)]) == 2
    assert f"rank 0 needs {graphs:.1f} MiB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--dry-run", "--gpus", "3"], "does not divide the 3 processes"),
        (["--dry-run", "--gpus", "4", "--rank", "4"], "--rank is 4: give 0 to 3"),
        (["--dry-run", "--gpus", "4", "--gpu", "FILE"], "are usable"),
        (["data.train=nowhere", "--dry-run", "--gpus", "4"], "nowhere"),
        (["--gpus", "4"], "--gpus is an option of --dry-run"),
        (['optimizer.weight_decay_by_name={"none.*": 0}', "--dry-run", "--gpus", "4"], "matches no parameter"),
        (["training.run_dir=/proc/run", "--dry-run", "--gpus", "4"], "training.run_dir /proc/run cannot be written to"),
    ],
)
def test_what_a_dry_run_refuses(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], says: str
) -> None:
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump({"device": DEVICES["cpu"].model_dump() | {"memory_gib": 0.001}}))
    given = [str(small) if word == "FILE" else word for word in given]
    overrides = [*SMALL, *files, f"training.run_dir={tmp_path / 'run'}", "parallel.pipeline=2"]
    assert main(["pretrain", str(CONFIGS / "bert_345m.yaml"), *overrides, *given]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ranks", "sharding", "compute"),
    [
        (8, "optimizer", "bfloat16"),
        (512, "optimizer", "bfloat16"),
        (64, "none", "bfloat16"),
        (8, "optimizer", "float32"),
    ],
)
def test_what_data_parallelism_holds_and_sends(ranks: int, sharding: str, compute: str) -> None:
    """6 + 12/d bytes per parameter in bfloat16, 18 undivided, 8 + 8/d in float32; every byte is sent once."""
    settings = settings_of(
        f"training.global_batch_size={4 * ranks}",
        f"parallel.sharding={sharding}",
        f"precision.compute={compute}",
        "training.micro_batch_size=2",
    )
    step = measured(settings, 1, ranks)
    parameters = parameter_count(settings.model_config_for(Vocabulary.vocab_size, Vocabulary.pad_id))
    axis = "data_shard" if sharding == "optimizer" else "data_replicate"
    divided = ranks if sharding == "optimizer" else 1
    elements = step.resident["gradients"] // 4
    # Every parameter and every one of three buckets is filled up.
    assert parameters <= elements <= parameters + ALIGNMENT * (16 * 4 + 20 + 3 * divided)
    width = 2 if compute == "bfloat16" else 4
    assert step.resident["weights"] == width * elements
    states = (12 if compute == "bfloat16" else 8) * elements / divided
    assert 0.7 * states <= step.resident["optimizer"] <= states + 4096
    sent = {(what.kind, what.dtype): entry for what, entry in step.traffic.items() if what.group == axis}
    counts = sent.pop(("all-reduce", "int64"))
    assert counts.count == 1  # of masked tokens and pairs
    whole = sent["all-reduce", "float32"]
    if sharding == "optimizer":
        assert (whole.count, whole.bytes) == (1, 4)  # the norm
        reduced, gathered = sent["reduce-scatter", "float32"], sent["all-gather", compute]
        assert (reduced.count, reduced.bytes) == (2, 4 * elements)
        assert (gathered.count, gathered.bytes) == (2, width * elements)
    else:
        assert (whole.count, whole.bytes) == (1 + 2, 4 + 4 * elements)
    assert len(sent) == (3 if sharding == "optimizer" else 1)


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (8, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.schedule=zero-bubble-h1"]),
        (
            64,
            [
                "parallel.tensor=4",
                "parallel.sequence=true",
                "parallel.pipeline=2",
                "parallel.sharding=none",
                "training.global_batch_size=128",
            ],
        ),
        (
            512,
            [
                "parallel.tensor=8",
                "parallel.sequence=true",
                "parallel.pipeline=4",
                "model.num_attention_heads=8",
                "training.global_batch_size=256",
            ],
        ),
    ],
    ids=["t2p2d2", "t4p2d8", "t8p4d16"],
)
def test_every_message_of_mixed_layouts(ranks: int, overrides: list[str]) -> None:
    """Of the first and the last stage: kinds, numbers and bytes are those of closed forms, so nothing is sent twice."""
    settings = settings_of(*overrides)
    work = workload_of(settings, settings.model_config_for(Vocabulary.vocab_size, 0), 1, settings.data.seq_length)
    layout = layout_of(settings, ranks)
    stages = stages_of(work, layout)
    per_stage = ranks // layout.pipeline
    for rank in (1, ranks - 1):  # beyond the first tensor rank and, on the last stage, beyond the first data rank
        step = measured(settings, rank, ranks)
        place, in_stage = divmod(rank, per_stage)
        expected = totals(step_messages(work, layout, stages, place, in_stage // layout.tensor))
        assert expected == {tuple(what): (seen.count, seen.bytes) for what, seen in step.traffic.items()}
        groups = {what.group for what in step.traffic}
        assert {"tensor", "pipeline", "data_shard" if layout.shards > 1 else "data_replicate", "tied"} <= groups
        # Every element of the flat buffers is in one sum over data ranks, once a step.
        kind = "reduce-scatter" if layout.shards > 1 else "all-reduce"
        buckets = [bucket.size for stage in stages if stage.number == place for bucket in stage.buckets]
        sent = sum(
            seen.bytes
            for what, seen in step.traffic.items()
            if (what.kind, what.size, what.dtype) == (kind, layout.data, "float32") and what.group.startswith("data")
        )
        assert sent - 4 * sum(buckets) in (0, 4), "and one number of the norm"


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (4, ["parallel.sharding=none"]),
        (4, ["parallel.sharding=full"]),
        (8, ["parallel.sharding=optimizer", "parallel.tensor=2"]),
        (8, ["parallel.sharding=hybrid", "parallel.shard_size=2", "parallel.tensor=2", "parallel.sequence=true"]),
        (8, ["parallel.sharding=hybrid", "parallel.shard_size=2", "parallel.pipeline=2"]),
        (8, ["parallel.pipeline=4", "parallel.schedule=zero-bubble-h1"]),
        (8, ["parallel.pipeline=2", "parallel.tensor=2", "parallel.schedule=zero-bubble-v"]),  # both ends on a rank
        (4, ["parallel.pipeline=2", "parallel.schedule=interleaved-1f1b", "parallel.virtual_stages=2"]),
        (4, ["parallel.sharding=full", 'optimizer.weight_decay_by_name={"*.bias": 0.1, "*": 0}']),
        # The heads are on the last stage alone.
        (4, ["parallel.pipeline=2", "parallel.sharding=full", 'optimizer.weight_decay_by_name={"masked_head.*": 0}']),
        (4, ["parallel.sharding=full", "optimizer.weight_decay=0"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_every_message_of_lamb(ranks: int, overrides: list[str]) -> None:
    """The norms of weights and steps, in sums over the ranks that divide them; copies of the embeddings alone."""
    # Norms are of parameters, whatever the micro batches; layers are as many as stages take.
    layers = 4 if any("pipeline" in given for given in overrides) else 2
    few = [f"model.num_hidden_layers={layers}", "training.global_batch_size=16"]
    settings = settings_of("optimizer.name=lamb", *few, *overrides)
    work = workload_of(settings, settings.model_config_for(Vocabulary.vocab_size, 0), 1, settings.data.seq_length)
    layout = layout_of(settings, ranks)
    stages = stages_of(work, layout)
    for rank in sorted({0, ranks - ranks // layout.pipeline}):
        step, place = measured(settings, rank, ranks), rank // (ranks // layout.pipeline)
        expected = totals(step_messages(work, layout, stages, place))
        assert expected == {tuple(what): (seen.count, seen.bytes) for what, seen in step.traffic.items()}


def gathered_in_place() -> None:
    started = start_all_gather(torch.ones(2, 4), 2, dist.group.WORLD.group_name)
    assert wait(started).data_ptr() == started.data_ptr()


def test_waiting_takes_no_memory() -> None:
    """What was started is what comes back, with numbers or without."""
    run_world(2, gathered_in_place)
    meter = StepMeter({})
    with simulated_world(0, 2), tensors_without_numbers(gpu=True), meter.counting():
        group = dist.group.WORLD.group_name
        wait(start_all_gather(torch.ones(256, 4), 2, group))
        wait(start_reduce_scatter(torch.ones(512, 4), 2, group))
    assert meter.finish().peak_bytes == 3 * 256 * 4 * 4
