# SPDX-License-Identifier: Apache-2.0
"""``megatron-bert bench``: what the machine at hand can do, as the file that `megatron-bert plan` reads.

Ranks measure at the same time, as they compute in a run: processes of one host share its memory. Where there are more
of them than can compute at once, as many do, and what it costs to take turns is counted where steps are.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from megatron_bert.arguments import check_outputs
from megatron_bert.model.activations import ACTIVATIONS
from megatron_bert.model.attention import SelfAttention
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.flops import peak_tflops
from megatron_bert.model.layer import TransformerLayer
from megatron_bert.model.sequences import SequenceLayout
from megatron_bert.planning.bench_link import measure_link
from megatron_bert.planning.devices import GIB, Device, Link
from megatron_bert.planning.step_time import OPERATORS
from megatron_bert.planning.this_machine import memory_bytes, processor_name, run_ranks
from megatron_bert.planning.timed import Ranks
from parallel.dropout import keyed_dropout
from parallel.errors import UserError, called, counted
from parallel.first_order import first_order
from parallel.gradients import sums_of_squares
from parallel.process_group import choose_device, process_group
from parallel.sharding import initialize
from parallel.whole_files import reporting, write_text

#: Rows of the products and tokens of the layers that are measured, on a processor and on a GPU.
_ROWS = {"cpu": 512, "cuda": 8192}
_WIDTHS = {"cpu": (64, 128, 256, 512, 1024), "cuda": (256, 512, 1024, 2048, 4096)}
_LENGTH, _HEAD = 128, 64
#: Moved by the elementwise operators of a layer without a compiler: see `step_time.layer_times`.
_WASTE = 1.5


#: Said where what was measured cannot be.
_DISTURBED = "; other programs disturbed the measurement of messages: measure again without them"


def run_bench(arguments: argparse.Namespace) -> None:
    """Run the subcommand.

    Raises:
        UserError: a number or a file that cannot be, or a device that is not there.
    """
    if arguments.ranks < 1:
        raise UserError(f"--ranks is {arguments.ranks}: give 1 or more")
    output: Path | None = arguments.output
    check_outputs({"--output": output})
    with called(device="--device"):
        if choose_device(arguments.device, 0).type == "cuda" and arguments.ranks > torch.cuda.device_count():
            raise UserError(f"--ranks is {arguments.ranks}: this host has {torch.cuda.device_count()} GPUs, one a rank")
    device, link = bench(arguments.ranks, arguments.device)
    found = {"device": device.model_dump()} | ({} if link is None else {"link": link.model_dump()})
    text = yaml.safe_dump(found, sort_keys=False)
    print(text, end="")
    if link is None:
        print(
            "note: a single rank has no link to measure: to plan for several in a node, measure with --ranks N",
            file=sys.stderr,
        )
    if output is not None:
        with reporting("written", output, "give --output another file"):
            write_text(output, text)


def bench(ranks: int, device: str = "auto") -> tuple[Device, Link | None]:
    """Measure a device and the link between ranks of this host, which a single one does not have.

    Raises:
        UserError: the device is not there.
    """
    if ranks == 1:
        found = _measure(device)
    else:
        queue: Any = torch.multiprocessing.get_context("spawn").SimpleQueue()
        run_ranks(ranks, _rank, device, queue)
        found = queue.get()
    measured = Device.model_validate(found)
    return measured, measured.link


def _rank(rank: int, device: str, queue: Any) -> None:
    found = _measure(device)
    if rank == 0:
        queue.put(found)


def _measure(name: str) -> dict[str, Any]:
    with process_group(name) as world:
        device = world.device
        formats = ["float32", "bfloat16", *(["float16"] if device.type == "cuda" else [])]
        ranks = Ranks.of(device)
        products = {compute: _products(ranks, getattr(torch, compute)) for compute in formats}
        half = "bfloat16" if device.type == "cuda" else "float32"
        plain, dropped = (_attention(ranks, getattr(torch, half), chance) for chance in (0.0, 0.1))
        reached = products[half][0]
        # The MFU is of the maker's peak, where that is known.
        published = peak_tflops(torch.cuda.get_device_name(device), half) if device.type == "cuda" else None
        share = 1.0 if published is None else min(1.0, reached / published)
        moved = _moving(ranks, getattr(torch, half))
        link, disturbed = measure_link(ranks)
        return {
            "name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name() or "a processor",
            "source": "measured",
            "note": f"megatron-bert bench --ranks {world.size}, torch {torch.__version__}, "
            f"{counted(torch.get_num_threads(), 'thread')} per rank{_DISTURBED if disturbed else ''}",
            "memory_gib": _memory(device) / world.size if device.type == "cpu" else _memory(device),
            "peak_tflops": {compute: found[0] / share for compute, found in products.items()},
            "product_share": share,
            "product_size": products[half][1],
            "attention_share": min(1.0, plain * share / reached),
            "attention_dropout_share": min(1.0, dropped * share / reached),
            "memory_gb_per_second": moved,
            "memory_share": 1.0,
            "optimizer_gb_per_second": _optimizer(ranks),
            "launch_microseconds": _launch(ranks),
            "asynchronous": device.type == "cuda",
            "devices_per_node": world.size,
            "ranks_at_once": ranks.at_once if ranks.at_once < world.size else None,
            "link": link,
        }


#: Bytes of operands that pass through between two uses of the same: more than the cache of a core.
_BEYOND_CACHE = 2**24


def _not_cached(make: Callable[[], tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """Operands one after the other, over and over, so that none is still in the nearest cache, as in a model."""
    first = make()
    if first[0].device.type == "cuda":
        return itertools.repeat(first)
    size = sum(tensor.nbytes for tensor in first)
    return itertools.cycle([first, *(make() for _ in range(_BEYOND_CACHE // size))])


def _operands(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Of a product and its gradients: ``[rows, width]``, weight, bias, and the gradient of the result."""
    x, weight = (
        torch.randn(*shape, device=device, dtype=dtype, requires_grad=True) for shape in ((rows, width), (width, width))
    )
    bias = torch.zeros(width, device=device, dtype=dtype, requires_grad=True)
    return x, weight, bias, torch.ones_like(x)


def _product_and_gradients(x: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor) -> None:
    torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), gradient)


def _products(ranks: Ranks, dtype: torch.dtype) -> tuple[float, float]:
    """TFLOP/s of large products and their gradients, and the size of rows or columns at which half of it is reached."""
    device = ranks.device
    rows, rates = _ROWS[device.type], {}
    for width in _WIDTHS[device.type]:
        made = _not_cached(partial(_operands, rows, width, device, dtype))
        work = lambda made=made: _product_and_gradients(*next(made))  # noqa: E731
        rates[width] = 6 * rows * width * width / ranks.seconds(work) / 1e12
    best = (float("inf"), 0.0, 0.0)
    for half in range(0, 257, 2):
        shares = {w: (w / (w + half)) ** 2 * rows / (rows + half) for w in rates}
        peak = statistics.geometric_mean(rate / shares[w] for w, rate in rates.items())
        error = sum((rate / (peak * shares[w]) - 1) ** 2 for w, rate in rates.items())
        best = min(best, (error, peak, float(half)))
    return best[1], best[2]


def _attention(ranks: Ranks, dtype: torch.dtype, dropout: float) -> float:
    """TFLOP/s of attention itself, forward and backward: of a module, without its products."""
    device = ranks.device
    tokens, heads = _ROWS[device.type], 4
    hidden = heads * _HEAD
    config = MegatronBertConfig(
        vocab_size=128,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        attention_probs_dropout_prob=dropout,
    )
    with device:
        module = SelfAttention(config)
    initialize(module, 1)
    module = module.to(dtype)
    layout = SequenceLayout.packed(torch.full((tokens // _LENGTH,), _LENGTH), _LENGTH).to(device)
    keys = torch.arange(tokens, device=device) if dropout else None
    made = _not_cached(lambda: (torch.randn(tokens, 3 * hidden, device=device, dtype=dtype),))

    class Given(nn.Module):
        """In place of the product that makes query, key and value."""

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden

    module.query_key_value = Given()  # type: ignore[assignment]
    module.output = Given()

    @first_order()
    def work() -> None:
        given = next(made)[0].detach().requires_grad_()
        out = module(given, layout, keys)
        assert isinstance(out, Tensor)
        out.backward(out.detach())

    return 14 * tokens * _LENGTH * hidden / ranks.seconds(work) / 1e12


def _moving(ranks: Ranks, dtype: torch.dtype) -> float:
    """GB/s of the elementwise operators of a layer, forward and backward."""
    device = ranks.device
    tokens = _ROWS[device.type]
    hidden = 256 if device.type == "cpu" else 1024
    number = torch.empty(0, dtype=dtype).element_size()
    weight, bias = (torch.ones(hidden, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    made = _not_cached(
        lambda: (
            torch.randn(tokens, hidden, device=device, dtype=dtype),
            torch.randn(tokens, 4 * hidden, device=device, dtype=dtype),
        )
    )
    keys = torch.arange(tokens, device=device)

    @first_order()
    def work() -> None:
        stream, wide = next(made)
        x, y = stream.detach().requires_grad_(), wide.detach().requires_grad_()
        for _ in range(2):
            x = keyed_dropout(F.layer_norm(x, (hidden,), weight, bias), 0.1, keys, residual=x)
        torch.autograd.backward([x, ACTIVATIONS["gelu"](y)], [stream, wide])

    forward = hidden * (10 * number + 2) + 4 * hidden * 2 * number
    backward = hidden * (16 * number + 2) + 4 * hidden * 3 * number
    return _WASTE * tokens * (forward + backward) / ranks.seconds(work) / 1e9


def _optimizer(ranks: Ranks) -> float:
    """GB/s of the norm, the fused update, and forgetting the gradients, of what `step_time` counts of them."""
    device = ranks.device
    count = 2**22 if device.type == "cpu" else 2**26
    parameter = nn.Parameter(torch.zeros(count, device=device))
    parameter.grad = torch.ones_like(parameter)
    adam = torch.optim.AdamW([parameter], lr=1e-4, fused=True)
    gradient = parameter.grad
    work = lambda: (sums_of_squares([gradient]), adam.step(), gradient.zero_())  # noqa: E731
    return 36 * count / ranks.seconds(work) / 1e9


def _launch(ranks: Ranks) -> float:
    """Microseconds of the host for an operator of a layer: of a layer so small that its numbers cost nothing."""
    config = MegatronBertConfig(
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
    )
    device = ranks.device
    with device:
        layer = TransformerLayer(config)
    initialize(layer, 1)
    layout = SequenceLayout.packed(torch.full((2,), 8), 8).to(device)
    keys, hidden = torch.arange(16, device=device), torch.randn(16, 32, device=device, requires_grad=True)

    def work() -> None:
        out = layer(hidden, layout, keys)
        assert isinstance(out, Tensor)
        out.sum().backward()

    return max(ranks.seconds(work) / sum(OPERATORS) * 1e6, 0.5)


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] / GIB
    return memory_bytes() / GIB
