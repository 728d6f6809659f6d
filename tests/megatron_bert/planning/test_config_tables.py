# SPDX-License-Identifier: Apache-2.0
"""The tables in the comments of the shipped settings are what `megatron-bert plan` says of them."""

from __future__ import annotations

import pytest
import yaml

from megatron_bert.config_file import load_sections, load_settings
from megatron_bert.finetuning.settings import FinetuneSettings
from megatron_bert.planning.devices import DEVICES, GIB, NETWORK
from megatron_bert.planning.fullest import fullest
from megatron_bert.planning.layouts import stages_of
from megatron_bert.planning.machine import Machine
from megatron_bert.planning.memory import layout_of
from megatron_bert.planning.search import predict, usable_bytes
from megatron_bert.planning.workload import TaskHead, workload_of
from megatron_bert.quantizing.settings import QuantizeSettings
from tests.megatron_bert.planning.support import CONFIGS
from tests.test_configs import WORLD_SIZES

H100 = Machine(DEVICES["h100"], NETWORK)
#: What the comments recommend for smaller devices, whose memory they name: GB of the smallest, GPUs, settings.
SMALLER = {
    "bert_345m": (16, 1, ["training.micro_batch_size=4", "training.recompute=selective"]),
    "bert_345m_fast": (16, 1, ["training.micro_batch_size=4", "training.recompute=selective"]),
    "bert_1.3b": (32, 8, ["parallel.tensor=2", "parallel.sequence=true", "training.micro_batch_size=8"]),
    "bert_3.9b": (32, 8, ["parallel.tensor=8", "training.micro_batch_size=4"]),
}


def table(name: str) -> list[str]:
    """The lines of a file's table."""
    settings = load_settings(CONFIGS / f"{name}.yaml", [])
    work = workload_of(settings, settings.model_config_for(30522, 0), settings.training.steps, settings.data.seq_length)
    lines = ["# H100s   layout                        micro batches   GiB   tokens/s    MFU   days"]
    for ranks in WORLD_SIZES[name]:
        layout = layout_of(settings, ranks)
        found = predict(work, layout, H100)
        assert found.memory.peak < usable_bytes(H100)
        what = f"tensor {layout.tensor}{' (sequence)' if layout.sequence else ''}, data {layout.data}"
        lines.append(
            f"# {ranks:>5}   {what:<28}  {layout.microbatches(work):>13}  {found.memory.peak / GIB:>4.1f}  "
            f"{found.tokens_per_second / 1000:>8,.0f}k  {found.mfu:>5.1%}  {found.days:>5,.0f}"
        )
    return lines


@pytest.mark.parametrize("name", [name for name in WORLD_SIZES if name != "bert_tiny"])
def test_table_is_what_plan_says(name: str) -> None:
    expected = "\n".join(table(name))
    assert expected in (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"), f"the table is\n{expected}"


@pytest.mark.parametrize("name", SMALLER)
def test_what_is_said_of_smaller_devices_fits(name: str) -> None:
    gigabytes, ranks, overrides = SMALLER[name]
    text = " ".join((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").replace("#", " ").split())
    assert all(override in text for override in overrides)
    settings = load_settings(CONFIGS / f"{name}.yaml", overrides)
    work = workload_of(settings, settings.model_config_for(30522, 0), 1, settings.data.seq_length)
    layout = layout_of(settings, ranks)
    small = Machine(H100.device.model_copy(update={"memory_gib": gigabytes * 1e9 / GIB}), NETWORK)
    assert fullest(work, layout, stages_of(work, layout))[1].peak < usable_bytes(small)


#: Files whose comments have no table, and why.
WITHOUT = {
    "bert_tiny": "it is for processors, of which `plan` knows nothing until `bench` has measured them",
    "finetune": "sizes are those of the model to start from, steps those of the data",
    "quantize": "sizes are those of the model to start from, steps those of the data",
}
ALL = {str(path.relative_to(CONFIGS).with_suffix("")): path for path in CONFIGS.rglob("*.yaml")}
TASKS = [name for name in ALL if name.split("/")[0] in ("finetune", "quantize")]


def test_every_file_has_a_table_or_a_reason_for_none() -> None:
    for name, path in ALL.items():
        with_table = "# H100s " in path.read_text(encoding="utf-8")
        assert with_table != (name.split("/")[0] in WITHOUT), name


@pytest.mark.parametrize("name", TASKS)
def test_files_of_tasks_say_nothing_of_sizes_and_fit_each_size_on_a_gpu(name: str) -> None:
    sections = yaml.safe_load(ALL[name].read_text(encoding="utf-8"))
    assert "from" in sections["model"]
    assert not {"hidden_size", "num_hidden_layers"} & set(sections["model"])
    kind = QuantizeSettings if name.startswith("quantize") else FinetuneSettings
    for size in ("bert_345m", "bert_1.3b", "bert_3.9b"):
        ranks = 8 if size == "bert_3.9b" else 1
        settings = load_sections(ALL[name], ["precision.compute=bfloat16", f"parallel.tensor={ranks}"], kind)
        source = load_settings(CONFIGS / f"{size}.yaml", [])
        config = source.model_config_for(30522, 0)
        length = min(settings.task.max_length, config.max_position_embeddings)
        choices = 4 if settings.task.name == "multiple_choice" else 1
        work = workload_of(settings, config, 1, length, TaskHead(sequences=choices))
        layout = layout_of(settings, ranks)
        assert fullest(work, layout, stages_of(work, layout))[1].needed < usable_bytes(H100), f"{name} of {size}"
