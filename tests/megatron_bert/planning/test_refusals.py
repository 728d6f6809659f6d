# SPDX-License-Identifier: Apache-2.0
"""Planning refuses what a start of the run refuses, in its words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_bert.config_checks import check_settings
from megatron_bert.config_file import load_settings
from megatron_bert.planning.devices import DEVICES, NETWORK
from megatron_bert.planning.layouts import Layout, stages_of
from megatron_bert.planning.machine import Machine
from megatron_bert.planning.memory import rank_memory
from megatron_bert.planning.plan_command import _configured, _judged, run_plan, with_layout
from megatron_bert.planning.planned import load_planned
from megatron_bert.planning.search import search
from parallel.errors import UserError
from tests.megatron_bert.finetuning.support import make_encoder
from tests.megatron_bert.planning.support import CONFIGS, settings_of
from tests.megatron_bert.planning.test_search import arguments

CONFIG = CONFIGS / "bert_345m.yaml"
H100 = Machine(DEVICES["h100"], NETWORK)


@pytest.mark.parametrize(
    "override",
    [
        "data.seq_length=100000",
        "data.max_predictions=513",
        "model.type_vocab_size=1",
        "data.row_samples=4 data.packed=false",
        "learning_rate.warmup_steps=2000000",
        "learning_rate.minimum=1.0",
        "training.spike_threshold=2 checkpoint.every=0",
        "training.cuda_graphs=true data.packed=false",
        "training.device=cpu precision.compute=float16",
    ],
)
def test_what_no_layout_changes_is_refused_as_pretraining_does(override: str) -> None:
    overrides = override.split()
    with pytest.raises(UserError) as refused:
        check_settings(load_settings(CONFIG, overrides), 8)
    with pytest.raises(UserError, match=re.escape(str(refused.value))):
        run_plan(arguments(str(CONFIG), *overrides, "--gpus", "8"))


@pytest.mark.parametrize(
    "override",
    [
        "training.global_batch_size=8",
        "training.global_batch_size=1000",
        "training.global_batch_size=8000000000 training.micro_batch_size=1",
        "parallel.tensor=3",
        "parallel.pipeline=8 parallel.stage_layers=[1,2]",
        "parallel.tensor=2 model.intermediate_size=4097 model.vocab_size_multiple=2",
        "parallel.sharding=hybrid",
        "parallel.pipeline=2 parallel.schedule=zero-bubble-h1 training.compile=true",
    ],
)
def test_the_configured_layout_is_judged_as_pretraining_does(override: str) -> None:
    overrides = ["model.num_hidden_layers=8", *override.split()]
    with pytest.raises(UserError) as refused:
        check_settings(load_settings(CONFIG, overrides), 8)
    assert _judged(_configured(load_planned(CONFIG, overrides), 8, H100), 8) == f"not possible: {refused.value}"


def test_processes_that_would_wait_are_counted() -> None:
    planned = load_planned(CONFIG, ["parallel.elastic=true", "parallel.data=3"])
    assert _judged(_configured(planned, 8, H100), 8).endswith("; 6 of the 8 processes would wait as spares")


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.cuda_graphs=true"],
        ["training.cuda_graphs=true", "model.attention_probs_dropout_prob=0.0"],
        ["training.compile=true", "data.packed=false"],
        ["model.num_attention_heads=2", "training.global_batch_size=24"],
    ],
)
def test_every_layout_in_the_ranking_would_start(overrides: list[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(settings_of(*overrides).dump())
    planned = load_planned(path, [])
    # Of a device so slow, and so full, that layouts of every kind come first.
    for name in ("l40s", "h100"):
        found = search(planned.workload, 8, Machine(DEVICES[name], NETWORK))
        assert found.ranked
        for prediction in found.ranked:
            planned.check(with_layout(planned.settings, prediction), 8)


@pytest.mark.parametrize(
    ("device", "override", "says"),
    [
        ("cpu", "training.cuda_graphs=true", "training.cuda_graphs is true, but a core with AVX-512 is not a GPU"),
        ("cpu", "training.device=cuda", "training.device is cuda, but a core with AVX-512 is not a GPU"),
        ("h100", "training.device=cpu", "training.device is cpu, but H100 SXM is a GPU"),
    ],
)
def test_a_device_on_which_the_run_would_not_start_is_refused(device: str, override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        run_plan(arguments(str(CONFIG), override, "--gpus", "8", "--gpu", device))


@pytest.mark.parametrize(
    ("config", "override", "says"),
    [
        ("finetune/mnli", "task.max_length=100000", "task.max_length is 100000, but the model takes at most"),
        ("finetune/mnli", "training.steps=5 learning_rate.warmup_steps=9", "both say how long the warm-up is"),
        ("quantize/classification", "training.compile=true task.max_length=24", "quantized layers are not compiled"),
    ],
)
def test_tasks_are_refused_as_their_runs_are(config: str, override: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        load_planned(Path(config), [f"model.from={make_encoder(tmp_path)}", *override.split()])


def test_a_task_has_the_length_that_its_table_says(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "task: {name: classification}\nmodel: {from: x}\ndata: {train: x.jsonl}\n"
        "training: {run_dir: y, global_batch_size: 8, micro_batch_size: 8}\n"
    )
    with pytest.raises(UserError, match=r"task\.max_length is 128, but the model takes at most"):
        load_planned(path, [f"model.from={make_encoder(tmp_path)}"])


def test_a_run_is_planned_for_the_device_whatever_its_settings_leave_open() -> None:
    """Kernels for attention that hold no scores are of GPUs."""
    auto = load_planned(CONFIGS / "bert_tiny.yaml", [])
    assert auto.on(DEVICES["h100"]).workload.fused_attention
    on_cpu = auto.on(DEVICES["cpu"]).workload
    assert not on_cpu.fused_attention
    layout = Layout(micro_batch=4)
    said = load_planned(CONFIGS / "bert_tiny.yaml", ["training.device=cpu"]).workload
    peaks = {rank_memory(work, layout, stages_of(work, layout)).peak for work in (on_cpu, said)}
    assert len(peaks) == 1
