# SPDX-License-Identifier: Apache-2.0
"""Inference and training of the public classes beside transformers' eager ones, in pairs in one process.

Steps are a forward pass (``inference``), a whole step of plain PyTorch with dropout and fused AdamW (``training``), a
step of transformers' Trainer (``trainer``), and one that trains adapters of rank 8 in query and value alone (``lora``).

Both have the same weights and read the same batch; their steps alternate and the ratio is taken pair by pair, so that a
machine whose speed drifts does not favor one. ``full`` batches have no padding; ``ragged`` ones have sequences of an
eighth of the length to all of it, padded to the longest as transformers takes them.

    python -m benchmarks.family --output benchmarks/family_cpu.json

The file keeps its other runs: those of other shapes, models, steps, batches and sizes.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

import megatron_bert
from benchmarks.harness import earlier_report, provenance, ratios
from benchmarks.peers import transformers
from benchmarks.timing import clock, training_step
from megatron_bert import MegatronBertConfig
from megatron_bert.ending import command
from parallel.whole_files import write_json

#: Name -> class, whether padding is skipped.
MODELS = {
    "classification": ("ForSequenceClassification", None),
    "masked-lm": ("ForMaskedLM", None),
    "masked-lm, skip_padding": ("ForMaskedLM", True),
}
STEPS = ("inference", "training", "trainer", "lora")
BATCHES = ("full", "ragged")
#: Steps in one call of Trainer.train, which begins and ends with other work.
_TRAINER_STEPS = 2
#: Name -> hidden size, heads.
SHAPES = {"hidden-512": (512, 8), "bert-large": (1024, 16)}


def make_batch(head: str, config: MegatronBertConfig, batch: int, length: int, ragged: bool) -> dict[str, Tensor]:
    """Inputs and labels of a class."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(length / 8, length, batch).long() if ragged else torch.full((batch,), length)
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(5, config.vocab_size, (batch, length), generator=generator) * mask
    if head == "ForSequenceClassification":
        labels = torch.randint(0, config.num_labels, (batch,), generator=generator)
    else:
        chosen = (torch.rand(batch, length, generator=generator) < 0.15) & mask.bool()
        labels = ids.masked_fill(~chosen, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def make_step(model: Any, batch: dict[str, Tensor], kind: str, dtype: torch.dtype) -> Callable[[], Any]:
    """What is timed: a forward pass, or a whole training step with dropout."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    mixed = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    model.train(kind != "inference")
    if kind == "inference":
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}

        def infer() -> Any:
            with torch.inference_mode(), mixed:
                return model(**inputs)

        return infer
    if kind == "trainer":
        return trainer_steps(model, batch, dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss() -> Any:
        with mixed:
            return model(**batch).loss

    return training_step(trained, loss, 1e-5)


def trainer_steps(model: Any, batch: dict[str, Tensor], dtype: torch.dtype) -> Callable[[], Any]:
    """Steps of transformers' Trainer on the rows of a batch."""
    rows = [{name: tensor[row].cpu() for name, tensor in batch.items()} for row in range(len(batch["input_ids"]))]
    arguments = transformers.TrainingArguments(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=len(rows),
        max_steps=_TRAINER_STEPS,
        learning_rate=1e-5,
        optim="adamw_torch_fused",
        bf16=dtype == torch.bfloat16,
        use_cpu=batch["input_ids"].device.type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer.train


def both_models(head: str, config: MegatronBertConfig, device: torch.device) -> tuple[Any, Any]:
    """Ours, and transformers' with the same weights."""
    ours = getattr(megatron_bert, f"MegatronBert{head}")(config)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        kind = getattr(transformers, f"MegatronBert{head}")
        theirs = kind.from_pretrained(folder, attn_implementation="eager")
    return ours.to(device), theirs.to(device)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case in turn."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    results = []
    for shape, name in itertools.product(arguments.shapes, arguments.models):
        head, skip = MODELS[name]
        hidden, heads = SHAPES[shape]
        config = MegatronBertConfig(
            vocab_size=arguments.vocab_size,
            hidden_size=hidden,
            num_attention_heads=heads,
            num_hidden_layers=arguments.layers,
            intermediate_size=4 * hidden,
            max_position_embeddings=arguments.length,
        )
        ours, theirs = both_models(head, config, device)
        ours.skip_padding = skip
        for kind, shown in itertools.product(arguments.steps, arguments.batches):
            if skip and (shown == "full" or kind in ("trainer", "lora")):
                continue  # nothing to skip, or skipped without being asked
            batch = make_batch(head, config, arguments.batch, arguments.length, shown == "ragged")
            models = [with_adapters(model) if kind == "lora" else model for model in (ours, theirs)]
            steps = [make_step(model, batch, kind, dtype) for model in models]
            for step in steps * arguments.warmup:
                step()
            timed = clock(arguments.clock, device)
            count = _TRAINER_STEPS if kind == "trainer" else 1
            pairs = [[timed(step) / count for step in steps] for _ in range(arguments.pairs)]
            ours_took, theirs_took = zip(*pairs, strict=True)
            results.append(
                {
                    "shape": shape,
                    "model": name,
                    "step": kind,
                    "batch": shown,
                    "seconds": {
                        "megatron_bert": statistics.median(ours_took),
                        "transformers": statistics.median(theirs_took),
                    },
                    "ratio": ratios(theirs_took, ours_took),
                }
            )
            print(*(results[-1][key] for key in ("shape", "model", "step", "batch", "ratio")), flush=True)
    return results


def with_adapters(model: Any) -> Any:
    """The model with adapters that alone are trained; one that has them already is taken as it is."""
    if hasattr(model, "peft_config"):
        return model
    model.add_adapter(peft.LoraConfig(r=8, lora_dropout=0.1, target_modules=["query", "value"]))
    return model


def add_run(path: Path, run: dict[str, Any]) -> None:
    """Write a run into a file, beside the others there, in place of one of the same command."""
    runs = [other for other in earlier_report(path).get("runs", []) if other["command"] != run["command"]]
    write_json(path, {"runs": [*runs, run]})


@command("benchmarks.family")
def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--batches", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=29056)
    parser.add_argument("--length", type=int, default=128, help="tokens of the longest sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--clock", default="wall", choices=("wall", "processor"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--warmup", type=int, default=1, help="pairs not counted")
    parser.add_argument("--pairs", type=int, default=7, help="pairs counted")
    parser.add_argument("--output", type=Path, help="JSON file to add the run to")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    transformers.logging.disable_progress_bar()
    options = shlex.split(shlex.join(sys.argv[1:]).partition(" --output")[0])
    result = {
        **provenance("family", "transformers", arguments=options, device=torch.device(arguments.device)),
        "layers": arguments.layers,
        "vocab": arguments.vocab_size,
        "batch": {"sequences": arguments.batch, "longest": arguments.length},
        "dtype": arguments.dtype,
        "pairs": arguments.pairs,
        "clock": arguments.clock,
        "cases": measure(arguments),
    }
    if arguments.output is not None:
        add_run(arguments.output, result)


if __name__ == "__main__":
    main()
