# SPDX-License-Identifier: Apache-2.0
"""Predictions beside runs that others published; docs/planning.md has the table, with the error of each."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.planning.devices import DEVICES, NETWORK
from megatron_bert.planning.layouts import Layout
from megatron_bert.planning.machine import Machine
from megatron_bert.planning.search import predict
from megatron_bert.planning.workload import Workload
from tests.megatron_bert.planning.support import CONFIGS

DOCUMENT = (CONFIGS.parent / "docs" / "planning.md").read_text(encoding="utf-8")


class Run(NamedTuple):
    """A published run: sizes, where and how, and tokens per second of all devices."""

    name: str
    sizes: tuple[int, int, int]
    length: int
    slots: int
    dropout: float
    device: str
    layout: Layout
    published: float
    compute: str = "bfloat16"
    words: int = 30522


def _data(ranks: int, micro: int, **more: object) -> Layout:
    return Layout(data=ranks, micro_batch=micro, sharding="optimizer" if ranks > 1 else "none", **more)  # type: ignore[arg-type]


def _foundry(mfu: float, sizes: tuple[int, int, int]) -> float:
    """Tokens per second of eight H100s at an MFU, in operations of an encoder that scores every position."""
    config = _config(sizes, 50368, 512, 0.0)
    work = Workload(
        config=config, length=512, slots=512, global_batch=1, steps=1, compute="bfloat16", compiled=True, losses=1
    )
    return mfu * 8 * 989e12 / (work.step_flops / 512)


def _megatron(teraflops: float, sizes: tuple[int, int, int], ranks: int) -> float:
    """Tokens a second at so many TFLOP/s a device, which count the recomputation (arXiv 2104.04473, section 3.4)."""
    hidden, layers, _ = sizes
    of_token = 96 * layers * hidden**2 * (1 + 2048 / (6 * hidden) + 51200 / (16 * layers * hidden))
    return teraflops * 1e12 * ranks / of_token


def _megatron_run(
    name: str, sizes: tuple[int, int, int], tensor: int, pipeline: int, ranks: int, teraflops: float
) -> Run:
    layout = Layout(
        tensor=tensor,
        pipeline=pipeline,
        data=ranks // tensor // pipeline,
        schedule="interleaved-1f1b" if pipeline > 1 else "1f1b",
        chunks=3 if pipeline > 1 else 1,
        micro_batch=4,
        recompute="full",
    )
    published = _megatron(teraflops, sizes, ranks)
    return Run(f"Megatron-LM, {name}, {ranks} A100", sizes, 2048, 2048, 0.1, "a100", layout, published, words=51200)


def _core_run(name: str, sizes: tuple[int, int, int], tensor: int, pipeline: int, teraflops: float) -> Run:
    """A GPT of Megatron-Core's table, whose operations count half of the scores; data ranks are as of its largest."""
    hidden, layers, _ = sizes
    layout = Layout(
        tensor=tensor,
        pipeline=pipeline,
        data=48,
        sequence=tensor > 1,
        schedule="interleaved-1f1b" if pipeline > 1 else "1f1b",
        chunks=2 if pipeline > 1 else 1,
        micro_batch=1,
        sharding="optimizer",
    )
    of_token = 72 * layers * hidden**2 * (1 + 4096 / (12 * hidden)) + 6 * hidden * 131072
    published = teraflops * 1e12 * layout.world_size / of_token
    ranks = layout.world_size
    return Run(f"Megatron-Core, {name}, {ranks} H100", sizes, 4096, 4096, 0.0, "h100", layout, published, words=131072)


def _config(sizes: tuple[int, int, int], words: int, length: int, dropout: float) -> MegatronBertConfig:
    hidden, layers, heads = sizes
    return MegatronBertConfig(
        vocab_size=words,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=length,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )


#: Global batches of Megatron-LM's runs.
BATCHES = {32: 512, 64: 512, 128: 512, 256: 1024, 512: 1536}
LARGE, FOUR = (1024, 24, 16), (2560, 48, 40)
RUNS = [
    *(
        Run(f"NeMo, 4B BERT, {ranks} A100", FOUR, 512, 512, 0.1, "a100", _data(ranks, 8, recompute="selective"), tokens)
        for ranks, tokens in ((8, 57287), (16, 108695), (32, 215358), (64, 393167), (128, 728178))
    ),
    Run("MLPerf v4.0, BERT-large, 8 H100, FP8", LARGE, 512, 77, 0.1, "h100", _data(8, 48), 238e3 * 8),
    Run("MLPerf v4.0, BERT-large, 8 H200, FP8", LARGE, 512, 77, 0.1, "h200", _data(8, 48), 254e3 * 8),
    *(
        Run(
            f"LLM-foundry, {name}, 8 H100",
            sizes,
            512,
            512,
            0.0,
            "h100",
            Layout(data=8, micro_batch=32, sharding="full"),
            _foundry(mfu, sizes),
            words=50368,
        )
        for name, sizes, mfu in (
            ("760M", (1536, 24, 12), 0.404),
            ("1.3B", (2048, 24, 16), 0.432),
            ("2.6B", (2560, 32, 20), 0.463),
        )
    ),
    *(
        _megatron_run(*run)
        for run in (
            ("1.7B", (2304, 24, 24), 1, 1, 32, 137),
            ("3.6B", (3072, 30, 32), 2, 1, 64, 138),
            ("7.5B", (4096, 36, 32), 4, 1, 128, 142),
            ("18.4B", (6144, 40, 48), 8, 1, 256, 135),
            ("39.1B", (8192, 48, 64), 8, 2, 512, 138),
        )
    ),
    *(
        _core_run(*run)
        for run in (
            ("1.7B", (2048, 24, 16), 1, 1, 409),
            ("7.1B", (4096, 30, 32), 2, 1, 466),
            ("16B", (6144, 32, 48), 4, 1, 489),
            ("32B", (8192, 37, 64), 8, 1, 460),
            ("70B", (8192, 84, 64), 8, 2, 420),
            ("177B", (12288, 96, 96), 8, 6, 433),
            ("314B", (16384, 96, 128), 8, 8, 474),
            ("462B", (18432, 112, 144), 8, 16, 460),
        )
    ),
    Run("DeepSpeed, BERT-large, V100, s=128", LARGE, 128, 20, 0.1, "v100", _data(1, 64), 272 * 128, "float16"),
    Run("DeepSpeed, BERT-large, V100, s=512", LARGE, 512, 77, 0.1, "v100", _data(1, 16), 52 * 512, "float16"),
]


def _global_batch(run: Run) -> int:
    if run.words == 51200:
        return BATCHES[run.layout.world_size]
    return run.layout.data * run.layout.micro_batch * (64 if run.words == 131072 else 4)


def predicted(run: Run) -> float:
    """Tokens per second."""
    layout = run.layout
    work = Workload(
        config=_config(run.sizes, run.words, run.length, run.dropout),
        length=run.length,
        slots=run.slots,
        global_batch=_global_batch(run),
        steps=1,
        compute=run.compute,
        compiled=True,
        losses=2,
    )
    return predict(work, layout, Machine(DEVICES[run.device], NETWORK)).tokens_per_second


def line(run: Run) -> str:
    """The run's line of the table."""
    tokens = predicted(run)
    return f"| {run.name} | {run.published:,.0f} | {tokens:,.0f} | {tokens / run.published - 1:+.0%} |"


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_error_is_stated(run: Run) -> None:
    assert line(run) in DOCUMENT, line(run)
