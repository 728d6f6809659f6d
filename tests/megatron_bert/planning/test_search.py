# SPDX-License-Identifier: Apache-2.0
"""Layouts compared: the step of a layout, the ranking, and the command."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_bert.cli import build_parser
from megatron_bert.config_checks import check_settings
from megatron_bert.config_file import load_settings
from megatron_bert.planning.commands import DEVICE_NAMES
from megatron_bert.planning.devices import DEVICES, GIB, NETWORK, load_device, load_network
from megatron_bert.planning.divided_weights import Gathering
from megatron_bert.planning.layouts import Layout, layouts, stages_of, why_not
from megatron_bert.planning.machine import Machine
from megatron_bert.planning.plan_command import run_plan, with_layout
from megatron_bert.planning.search import predict, search, usable_bytes
from megatron_bert.planning.step_time import layer_times, stage_times
from megatron_bert.planning.workload import Workload
from parallel.errors import UserError
from parallel.pipeline.schedules import SCHEDULES, build_schedule
from parallel.pipeline.simulate import Costs, simulate
from tests.megatron_bert.finetuning.support import make_encoder
from tests.megatron_bert.planning.support import CONFIGS
from tests.megatron_bert.planning.test_closed_forms import workload

H100 = Machine(DEVICES["h100"], NETWORK)


def test_names_of_devices_are_those_there_are() -> None:
    assert set(DEVICE_NAMES) == set(DEVICES)


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "gpipe"])
def test_many_micro_batches_take_as_long_as_simulated(schedule: str) -> None:
    """Rounds that are alike are added up: within half a percent of a simulation of all."""
    work, ranks = workload(layers=8), 4
    chunks = SCHEDULES[schedule].default_chunks
    layout = Layout(pipeline=ranks, schedule=schedule, chunks=chunks, micro_batch=8)
    stages = stages_of(work, layout)
    times = stage_times(work, layout, stages, H100)
    names = ("forward", "backward_input", "backward_weight")
    costs = Costs(*([getattr(one, name) for one in times] for name in names))
    whole = simulate(build_schedule(schedule, ranks, layout.microbatches(work), chunks), costs)
    found = predict(work, layout, H100).time
    assert found.pipeline == pytest.approx(whole.makespan, rel=0.005)
    assert found.bubble == pytest.approx(whole.bubble, abs=0.005)


def test_the_layer_that_heads_read_takes_less_where_the_rest_is_not_computed() -> None:
    """On a processor, on one tensor rank, as it is: all but query, key, value and attention."""
    work = replace(workload(), fused_attention=False, slots=1, pairs=1)
    assert work.read_tokens(8) == 16
    assert replace(work, slots=512).read_tokens(8) == 8 * 512, "no more than there are"

    def share(work: Workload, **layout: int) -> float:
        """Of a layer's time."""
        chosen, nothing = Layout(micro_batch=256, **layout), Gathering()
        layer, top = (layer_times(work, chosen, H100, nothing, top=top).total for top in (False, True))
        return top / layer

    assert 0.25 < share(work) < 0.6, "query, key and value are a quarter of the products"
    assert share(replace(work, slots=512)) == 1.0
    assert share(replace(work, fused_attention=True)) == 1.0
    assert share(replace(work, compiled=True)) == 1.0
    assert share(work, tensor=2) == 1.0
    layout = Layout(micro_batch=256)
    (stage,) = stage_times(work, layout, stages_of(work, layout), H100)
    (whole,) = stage_times(replace(work, fused_attention=True), layout, stages_of(work, layout), H100)
    assert stage.total < whole.total


def test_what_is_ranked_fits_and_can_be() -> None:
    work = workload(hidden=2560, layers=48)
    found = search(work, 8, H100)
    assert found.ranked
    seconds = [prediction.time.seconds for prediction in found.ranked]
    assert seconds == sorted(seconds)
    for prediction in found.ranked:
        assert why_not(work, prediction.layout) is None
        assert prediction.memory.peak <= usable_bytes(H100)
        assert prediction.layout.world_size == 8
        assert 0 < prediction.mfu < H100.device.product_share
    # A model of 65 GiB of states is on no single device of 31 GiB, whatever the layout.
    assert not search(work, 1, Machine(DEVICES["v100"], NETWORK)).ranked


@pytest.mark.parametrize(("batch", "micro_batch"), [(72, 12), (2**6 * 3**3 * 5, 80)])
def test_nothing_ranked_first_is_slower_than_what_is_configured(batch: int, micro_batch: int) -> None:
    """Few sizes of micro batches are all tried; of many, powers of two and those like the configured one."""
    work = replace(workload(), global_batch=batch)
    configured = predict(work, Layout(data=6, sharding="optimizer", micro_batch=micro_batch // 2), H100)
    assert search(work, 6, H100, configured).ranked[0].time.seconds <= configured.time.seconds
    sizes = {layout.micro_batch for layout in layouts(work, 6, micro_batch)}
    assert micro_batch in sizes
    assert micro_batch // 2 in sizes


@pytest.mark.parametrize("batch", [20000, 2**10 * 3**4, 2520, 997, 4096])
def test_some_micro_batch_of_every_magnitude_is_tried(batch: int) -> None:
    """One is tried of at least half of any size that a data rank could take."""
    sizes = sorted({layout.micro_batch for layout in layouts(replace(workload(), global_batch=batch), 1, 1)})
    possible = [size for size in range(1, 257) if batch % size == 0]
    assert all(any(size / 2 <= tried <= size for tried in sizes) for size in possible)
    assert sizes[-1] == possible[-1]


def test_a_layout_that_no_search_tries_is_ranked_as_it_is_configured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stages of given sizes, which the written settings keep."""
    work = workload()
    layout = Layout(pipeline=2, micro_batch=8)
    uneven, hybrid = (
        predict(work, layout, H100, [10, 14]),
        predict(work, Layout(data=2, sharding="hybrid", shard_size=1), H100),
    )
    tried = search(work, 2, H100).tried
    for configured, more in ((uneven, 0), (hybrid, 1)):
        found = search(work, 2, H100, configured)
        assert configured in found.ranked
        assert found.tried == tried + more
    settings = with_layout(load_settings(CONFIGS / "bert_345m.yaml", []), uneven)
    assert settings.parallel.stage_layers == [10, 14]
    assert settings.layout(2).pipeline == 2


def test_more_bandwidth_is_never_slower_and_recomputation_never_larger() -> None:
    work, layout = workload(), Layout(tensor=2, sequence=True, data=4, sharding="optimizer", micro_batch=16)
    slow = Machine(DEVICES["h100"].model_copy(update={"memory_gb_per_second": 1000.0}), NETWORK)
    assert predict(work, layout, slow).time.seconds > predict(work, layout, H100).time.seconds
    peaks = [
        predict(work, Layout(micro_batch=16, recompute=recompute), H100).memory.peak  # type: ignore[arg-type]
        for recompute in ("none", "selective", "full")
    ]
    assert peaks == sorted(peaks, reverse=True)


def test_thousands_of_layouts_of_512_ranks() -> None:
    work = workload(hidden=2560, layers=48)
    began = time.process_time()
    found = search(work, 512, H100)
    assert found.tried > 10_000
    assert time.process_time() - began < 60  # some 6 seconds; far more would be of another order


def arguments(*given: str) -> argparse.Namespace:
    return build_parser().parse_args(["plan", *given])


def test_the_plan_is_written_as_settings_that_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written, picture = tmp_path / "fast.yaml", tmp_path / "plan.png"
    run_plan(
        arguments(
            str(CONFIGS / "bert_1.3b.yaml"),
            *("--gpus", "16", "--gpu", "a100", "--explain", "--top", "3"),
            *("--write", str(written), "--png", str(picture)),
        )
    )
    said = capsys.readouterr().out
    for words in (
        "as configured:",
        "tokens/s",
        "the others are out",
        "checkpoints: 15.4 GB",
        "host memory:",
        "published",
    ):
        assert words in said
    settings = load_settings(written, [])
    assert check_settings(settings, 16).world_size == 16
    assert f"micro batch {settings.training.micro_batch_size}" in said
    assert picture.stat().st_size > 10_000


def test_fine_tuning_is_planned_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = make_encoder(tmp_path)
    run_plan(
        arguments(str(CONFIGS / "finetune" / "mnli.yaml"), f"model.from={encoder}", "task.max_length=24", "--gpus", "2")
    )
    said = capsys.readouterr().out
    assert "training.steps is not set" in said
    assert "days" not in said
    assert "GPU h" not in said
    assert " in 1 step" not in said
    run_plan(
        arguments(
            str(CONFIGS / "finetune" / "mnli.yaml"),
            *(f"model.from={encoder}", "task.max_length=24", "training.steps=100", "--gpus", "2"),
        )
    )
    said = capsys.readouterr().out
    assert "days" in said
    assert "in 100 steps" in said


def test_as_many_layouts_are_shown_as_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """More than are simulated otherwise; with how many fit, even if all do."""
    small = ("model.hidden_size=64", "model.num_attention_heads=4", "model.num_hidden_layers=2", "data.seq_length=32")
    given = (str(CONFIGS / "bert_345m.yaml"), *small, "training.compile=false", "--explain")
    run_plan(arguments(*given, "--gpus", "1", "--top", "1000"))
    said = capsys.readouterr().out
    header, *rows = said.split("\n\n")[2].splitlines()
    assert header.startswith("tensor")
    whole = f"{len(rows)} layouts, all of which fit"
    assert whole in said
    run_plan(arguments(*given, "--gpus", "2", "--top", "50"))
    assert len(capsys.readouterr().out.split("\n\n")[2].splitlines()) == 51


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--gpus", "0"), "--gpus is 0"),
        (("--gpus", "8", "--gpu", "tpu"), "--gpu is 'tpu'"),
        (("--gpus", "8", "--gpu", "v100"), "precision.compute is bfloat16"),
        (("--gpus", "1", "--gpu", "l40s"), "no layout fits on 1 x L40S"),
        (("--gpus", "97"), "no layout is possible on 97"),
        (("--gpus", "8", "--write", "nowhere/x.yaml"), "--write nowhere/x.yaml cannot be written"),
        (
            ("--gpus", "8", "--write", "new", "--png", "./new"),
            "--png new is the file of --write, too: give --png another",
        ),
        (("--gpus", "8", "--png", str(CONFIGS / "bert_3.9b.yaml")), "bert_3.9b.yaml is the file of CONFIG, too"),
        (("--gpus", "8", "--png", "plan.pdf"), "plan.pdf has the ending of another format: .* ends in .png"),
        (("parallel.schedule=foo", "--gpus", "1"), "parallel.schedule is 'foo': choose one of gpipe, 1f1b"),
        (("--gpus", "8", "--png", "/dev/null"), "--png /dev/null cannot be written"),  # a device is not replaced
        (("--gpus", "8", "--network", "nowhere"), "--network is 'nowhere'"),
        (("--gpus", "8", "--write", str(CONFIGS / "bert_345m.yaml")), "is there already: name a new file"),
    ],
)
def test_what_cannot_be_planned_is_said(given: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        run_plan(arguments(str(CONFIGS / "bert_3.9b.yaml"), *given))


def test_files_of_devices(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    values = DEVICES["h100"].model_dump() | {"name": "mine", "source": "measured"}
    path.write_text(yaml.safe_dump({"device": values, "link": NETWORK.model_dump()}))
    assert load_device(str(path)).name == "mine"
    assert load_network(path) == NETWORK
    path.write_text("device: {name: mine}")
    with pytest.raises(UserError, match=r"memory_gib: Field required"):
        load_device(str(path))
    path.write_text("device: [")
    with pytest.raises(UserError, match="is not valid YAML: expected the node content"):
        load_device(str(path))
    assert usable_bytes(H100) < 79 * GIB
