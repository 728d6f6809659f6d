# SPDX-License-Identifier: Apache-2.0
"""A whole training step of this project's trainer beside transformers' class, alternating in one run.

The same model sizes, batch, number format, clipping and fused AdamW; sequences of full length, so that nobody has
padding to skip. The kinds take turns, and ratios are taken turn by turn: a machine whose speed drifts favors none.

    python -m benchmarks.training --size tiny
    python -m benchmarks.training --size 345m --size 1.3b --size 3.9b --device cuda --dtype bfloat16 \
        --attention-dropout 0.1 --attention-dropout 0 --seconds 420 --output benchmarks/training_gpu.json
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import provenance, publish, ratios, spread
from benchmarks.our_trainer import make_batch, our_trainer, step_settings
from benchmarks.peers import their_model, transformers
from benchmarks.throughput import their_inputs
from benchmarks.timing import seconds
from megatron_bert.config import Settings
from megatron_bert.ending import command
from megatron_bert.model.batch import MicroBatch
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.flops import parameter_count, peak_tflops, training_flops
from megatron_bert.planning.this_machine import memory_bytes
from parallel.captured import on_own_stream
from parallel.process_group import World, process_group
from parallel.whole_files import write_json

VOCABULARY = 30522


class Size(NamedTuple):
    """A model and the batch that it is measured with."""

    layers: int
    hidden: int
    heads: int
    length: int
    micro_batch: int
    micro_batches: int


SIZES = {
    "tiny": Size(2, 64, 4, 64, 4, 2),
    "small": Size(4, 256, 4, 128, 8, 2),
    "medium": Size(4, 512, 8, 128, 8, 2),
    "345m": Size(24, 1024, 16, 512, 32, 2),
    "1.3b": Size(24, 2048, 32, 512, 16, 2),
    "3.9b": Size(48, 2560, 40, 512, 8, 2),
}
#: Our kinds: what is compiled, and whether micro batches are replayed as a CUDA graph.
OURS: dict[str, tuple[bool | str, bool]] = {
    "ours": (False, False),
    "ours, compiled": (True, False),
    "ours, all compiled": ("all", False),
    "ours, CUDA graphs": ("all", True),
}
THEIRS = ("transformers", "transformers' Trainer", "transformers, compiled")
#: In the order in which they are opened: what takes longest to compile, and graphs, which could leave a device that
#: takes no more work, come last.
KINDS = (*(kind for kind, (_, graphs) in OURS.items() if not graphs), *THEIRS, "ours, CUDA graphs")

#: Steps that are counted of a kind, however little time is left.
_LEAST_STEPS = 3

Step = Callable[[], Any]


def settings_of(size: Size, options: argparse.Namespace, run_dir: Path, kind: str = "ours") -> Settings:
    """Of a pretraining run on one rank."""
    compiled, graphs = OURS[kind]
    model = {
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "attention_probs_dropout_prob": options.attention_dropout,
        "hidden_dropout_prob": options.dropout,
    }
    how = {"compile": compiled, "cuda_graphs": graphs, "device": options.device}
    return step_settings(run_dir, model, size.length, size.micro_batch, size.micro_batches, options.dtype, **how)


def config_of(size: Size, options: argparse.Namespace) -> MegatronBertConfig:
    """Of the model of such a run."""
    return settings_of(size, options, Path("unused")).model_config_for(VOCABULARY, 0)


@contextmanager
def our_step(size: Size, options: argparse.Namespace, world: World, kind: str) -> Iterator[Step]:
    """One step of the trainer: gradients of all micro batches, norm, clipping, optimizer."""
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(size, options, Path(folder), kind)
        with our_trainer(settings, VOCABULARY, world) as trainer:
            batch = make_batch(trainer.config, size.micro_batch, size.length).to(world.device)
            yield lambda: trainer.train_step([batch] * size.micro_batches)


def with_mask(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs with the mask that data loaders give, of no padding."""
    return inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}


@contextmanager
def their_step(size: Size, options: argparse.Namespace, batch: MicroBatch, *, compiled: bool) -> Iterator[Step]:
    """The same step of transformers' model, in a loop as its examples have it."""
    model = their_model(config_of(size, options)).to(options.device).train()
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    device = torch.device(options.device)
    inputs = with_mask(their_inputs(batch, device))
    dtype = getattr(torch, options.dtype)

    def step() -> None:
        for _ in range(size.micro_batches):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = run(**inputs).loss / size.micro_batches
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    yield step


@contextmanager
def trainer_step(size: Size, options: argparse.Namespace, batch: MicroBatch) -> Iterator[Step]:
    """Steps of transformers' Trainer: one call trains for one, by pausing its loop in a generator."""
    given = with_mask(their_inputs(batch, torch.device("cpu")))
    rows = [{name: tensor[row] for name, tensor in given.items()} for row in range(size.micro_batch)]

    class Endless(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return size.micro_batch * size.micro_batches

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return rows[index % size.micro_batch]

    model = their_model(config_of(size, options)).to(options.device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=size.micro_batch,
            gradient_accumulation_steps=size.micro_batches,
            max_steps=1,
            bf16=options.dtype == "bfloat16",
            use_cpu=options.device == "cpu",
            optim="adamw_torch_fused",
            weight_decay=0.01,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=Endless())
        trainer.create_optimizer_and_scheduler(num_training_steps=1)
        # Its own step and loop; what it does once before the first step is not counted.
        trainer.train()
        accelerator, prepared, optimizer = trainer.accelerator, trainer.model_wrapped, trainer.optimizer
        batches = [{n: t.to(arguments.device) for n, t in given.items()} for _ in range(size.micro_batches)]

        def step() -> None:
            prepared.train()
            trainer.current_gradient_accumulation_steps = size.micro_batches
            for number, one in enumerate(batches):
                accelerator.gradient_state._set_sync_gradients(number + 1 == len(batches))
                trainer.training_step(prepared, dict(one))
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            prepared.zero_grad()

        yield step


def opened(kind: str, size: Size, options: argparse.Namespace, world: World) -> Any:
    """What measures a kind of step."""
    if kind in OURS:
        return our_step(size, options, world, kind)
    batch = make_batch(MegatronBertConfig(vocab_size=VOCABULARY), size.micro_batch, size.length)
    if kind == "transformers' Trainer":
        return trainer_step(size, options, batch)
    return their_step(size, options, batch, compiled=kind.endswith("compiled"))


def measure(name: str, options: argparse.Namespace, world: World, budget: float) -> dict[str, Any]:
    """Let the kinds take turns for so many seconds, opening and compiling included.

    Step by step where all models fit in memory together; else one model after the other, each for a few steps. A kind
    that is not open when the time is over is left out, and one that is gets three steps at least.
    """
    size, kinds = SIZES[name], list(options.kind or KINDS)
    failures: dict[str, str] = {}
    if world.device.type == "cpu":
        failures = {kind: "graphs need a GPU" for kind in kinds if kind in OURS and OURS[kind][1]}
        kinds = [kind for kind in kinds if kind not in failures]
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    peaks: dict[str, int | None] = dict.fromkeys(kinds)
    deadline = time.perf_counter() + budget
    steps: dict[str, Step] = {}

    def failed(kind: str, error: Exception) -> None:
        """Leave a kind out, whatever is wrong with it: the others are still worth measuring."""
        failures[kind] = (str(error) or type(error).__name__).splitlines()[0]
        times[kind] = []
        steps.pop(kind, None)

    with ExitStack() as stack:
        together = _fit_together(size, options, len(kinds), world)
        for kind in kinds:
            before = _clear(world)
            if time.perf_counter() > deadline:
                failures[kind] = "no time was left"
                continue
            try:
                steps[kind] = stack.enter_context(opened(kind, size, options, world))
                for _ in range(options.warmup):
                    steps[kind]()
                for number in range(0 if together else options.steps):
                    if number >= _LEAST_STEPS and time.perf_counter() > deadline:
                        break
                    times[kind].append(seconds(steps[kind], world.device))
            except Exception as error:
                failed(kind, error)
            if world.device.type == "cuda":
                peaks[kind] = torch.cuda.max_memory_allocated() - before
            if not together:
                steps.clear()
                stack.close()
        for number in range(options.steps if together else 0):
            if number >= _LEAST_STEPS and time.perf_counter() > deadline:
                break
            for kind, step in list(steps.items()):
                try:
                    times[kind].append(seconds(step, world.device))
                except Exception as error:
                    failed(kind, error)
    found = {kind: measured for kind, measured in times.items() if measured}
    for kind, measured in found.items():
        print(f"{name:6s}{kind:26s}{statistics.median(measured) * 1000:10.1f} ms", flush=True)
    summary = _summary(size, options, found, peaks, world)
    how = {"together": together, "attention_dropout": options.attention_dropout}
    return {"size": name, **size._asdict(), **how, "failures": failures, "kinds": summary}


def _fit_together(size: Size, options: argparse.Namespace, kinds: int, world: World) -> bool:
    """Whether all models fit in 0.7 of the memory: 18 bytes per parameter each, and four times that for activations.

    Those are of the kind whose turn it is, and of graphs.
    """
    config = config_of(size, options)
    if world.device.type == "cuda":
        room = torch.cuda.get_device_properties(world.device).total_memory
    else:
        room = memory_bytes()
    return 18 * parameter_count(config) * (kinds + 4) < 0.7 * room


def _clear(world: World) -> int:
    """Free what is not used, and begin to count the peak; bytes that are used."""
    gc.collect()
    if world.device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _summary(
    size: Size, options: argparse.Namespace, times: dict[str, list[float]], peaks: dict[str, int | None], world: World
) -> dict[str, Any]:
    """Tokens per second, MFU and peak memory of each kind, and how many times as fast as each other one ours is."""
    config = config_of(size, options)
    sequences = size.micro_batch * size.micro_batches
    tokens = sequences * size.length
    masked = round(0.15 * size.length) * sequences
    flops = training_flops(config, tokens, tokens * size.length, masked, sequences)
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
    peak = peak_tflops(device, options.dtype)
    medians = {kind: statistics.median(found) for kind, found in times.items()}
    ours = min((kind for kind in medians if kind in OURS), key=medians.__getitem__, default=None)
    summary: dict[str, Any] = {"parameters": parameter_count(config)}
    for kind, found in times.items():
        middle = medians[kind]
        summary[kind] = {
            "step_seconds": spread(found),
            "tokens_per_second": tokens / middle,
            "mfu": None if peak is None else flops / middle / (peak * 1e12),
            "peak_bytes": peaks[kind],
        }
        if ours is not None and kind not in OURS:
            pairs = min(len(found), len(times[ours]))
            summary[kind]["times_as_long_as_ours"] = ratios(found[:pairs], times[ours][:pairs])
    return summary


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """The options of a command line; those of this process by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", choices=SIZES, help="repeatable; small by default")
    parser.add_argument("--kind", action="append", choices=KINDS, help="repeatable; all by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--dropout", type=float, default=0.1, help="of the hidden states")
    parser.add_argument(
        "--attention-dropout",
        type=float,
        action="append",
        help="of the attention probabilities, repeatable; 0.1 by default",
    )
    parser.add_argument("--warmup", type=int, default=3, help="steps of each kind that are not counted")
    parser.add_argument("--steps", type=int, default=10, help="steps of each kind that are counted")
    parser.add_argument("--seconds", type=float, default=420.0, help="for all sizes, opening and compiling included")
    small = "all at tiny size on the CPU, however long it takes: a rehearsal of the command"
    parser.add_argument("--small", action="store_true", help=small)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if options.small:
        options.device, options.size, options.seconds = "cpu", ["tiny"] * len(options.size or [""]), math.inf
    return options


@command("benchmarks.training")
def main(arguments: list[str] | None = None) -> None:
    """Measure, print and save."""
    options = options_of(arguments)
    sizes = options.size or ["small"]
    dropouts = options.attention_dropout or [0.1]
    cases = [(name, argparse.Namespace(**vars(options) | {"attention_dropout": p})) for p in dropouts for name in sizes]
    with process_group(options.device) as world:
        on_own_stream(world.device)  # all kinds on one, that of graphs too
        measured: list[dict[str, Any]] = []
        report = {
            **provenance("training", "transformers", arguments=arguments, device=world.device),
            "dtype": options.dtype,
            "dropout": options.dropout,
            "sizes": measured,
        }
        deadline = time.perf_counter() + options.seconds
        for left, (name, case) in zip(range(len(cases), 0, -1), cases, strict=True):
            measured.append(measure(name, case, world, (deadline - time.perf_counter()) / left))
            if options.output is not None:  # what is there stays, whatever becomes of the rest
                write_json(options.output, report)
    publish(report, None)


if __name__ == "__main__":
    raise SystemExit(main())
