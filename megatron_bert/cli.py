"""The `megatron-bert` command: one subcommand a job."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_bert.convert.commands import add_convert_commands
from megatron_bert.ending import Ending
from megatron_bert.finetuning.commands import add_finetuned_commands
from megatron_bert.launching.commands import add_launch_commands
from megatron_bert.launching.launched import launched_process
from megatron_bert.planning.schedule_command import add_schedule_command


def _train_tokenizer(arguments: argparse.Namespace) -> None:
    from megatron_bert.data.train_tokenizer import train_tokenizer

    train_tokenizer(
        arguments.input,
        arguments.type,
        arguments.vocab_size,
        arguments.output,
        cased=arguments.cased,
        json_key=arguments.json_key,
    )


def _preprocess(arguments: argparse.Namespace) -> None:
    from megatron_bert.data.preprocess import preprocess

    report = preprocess(
        arguments.input,
        arguments.tokenizer,
        arguments.output_prefix,
        workers=arguments.workers,
        json_key=arguments.json_key,
        split_sentences=not arguments.keep_documents,
        append_eod=arguments.append_eod,
        language=arguments.language,
        splitter=arguments.sentence_splitter,
        lowercase={"auto": None, "yes": True, "no": False}[arguments.lowercase],
        on_bad_row=arguments.on_bad_row,
    )
    skipped = report.skipped_empty + report.skipped_bad
    print(
        f"{report.prefix}: {report.documents:,} documents, {report.sentences:,} sentences, {report.tokens:,} tokens "
        f"in {report.seconds:.1f} s"
        + (f"; skipped {report.skipped_empty:,} empty documents, {report.skipped_bad:,} bad rows" if skipped else "")
    )


def _pretrain(arguments: argparse.Namespace) -> int:
    from megatron_bert.config_file import load_settings
    from megatron_bert.training.pretrain import pretrain

    return _run(arguments, load_settings, pretrain)


def _finetune(arguments: argparse.Namespace) -> int:
    from megatron_bert.config_file import load_sections
    from megatron_bert.finetuning.finetune import finetune
    from megatron_bert.finetuning.settings import FinetuneSettings

    return _run(arguments, partial(load_sections, kind=FinetuneSettings), finetune)


def _quantize(arguments: argparse.Namespace) -> int:
    from megatron_bert.config_file import load_sections
    from megatron_bert.quantizing.quantize import quantize
    from megatron_bert.quantizing.settings import QuantizeSettings

    return _run(arguments, partial(load_sections, kind=QuantizeSettings), quantize)


def _run(arguments: argparse.Namespace, load: Callable[..., Any], command: Callable[..., str | None]) -> int:
    """Read the settings of a run, run it, and say by the exit code how it ended."""
    from megatron_bert.training.signals import exit_code

    with launched_process():
        settings = load(arguments.config, arguments.overrides)
        return exit_code(command(settings, ends_process=arguments.own_process))


def _fill_mask(arguments: argparse.Namespace) -> None:
    from megatron_bert.tasks.fill_mask import FillMask

    model = FillMask.from_checkpoint(arguments.model)
    for text in arguments.text:
        print(text)
        for guess in model(text, top=arguments.top):
            print(f"  {guess.probability:6.1%}  {guess.token:<16} {guess.sentence}")


def _config_schema(arguments: argparse.Namespace) -> None:
    from pydantic import BaseModel

    from megatron_bert.config import Settings
    from megatron_bert.finetuning.settings import FinetuneSettings
    from megatron_bert.quantizing.settings import QuantizeSettings

    kinds: dict[str, type[BaseModel]] = {
        "pretrain": Settings,
        "finetune": FinetuneSettings,
        "quantize": QuantizeSettings,
    }
    print(json.dumps(kinds[arguments.of].model_json_schema(), indent=2))


def build_parser() -> argparse.ArgumentParser:
    """All subcommands."""
    parser = argparse.ArgumentParser(
        prog="megatron-bert", description="Pretrain BERT encoders with Megatron parallelism."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    tokenizer = commands.add_parser("train-tokenizer", help="learn a vocabulary from text")
    tokenizer.add_argument(
        "--input",
        nargs="+",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON lines or plain text, .gz and .zst too",
    )
    tokenizer.add_argument("--type", choices=("wordpiece", "sentencepiece", "bpe"), default="wordpiece")
    tokenizer.add_argument("--vocab-size", type=int, required=True, metavar="N")
    tokenizer.add_argument("--output", type=Path, required=True, metavar="DIR")
    tokenizer.add_argument("--cased", action="store_true", help="keep upper case")
    tokenizer.add_argument("--json-key", default="text", help="field of JSON lines that holds the text")
    tokenizer.set_defaults(func=_train_tokenizer)

    preprocess = commands.add_parser("preprocess", help="turn text into a .bin/.idx corpus")
    preprocess.add_argument(
        "--input",
        nargs="+",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON lines, or plain text with blank lines between documents; .gz and .zst too",
    )
    preprocess.add_argument("--tokenizer", type=Path, required=True, metavar="PATH")
    preprocess.add_argument("--output-prefix", type=Path, required=True, metavar="PREFIX")
    preprocess.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one a core)"
    )
    preprocess.add_argument("--json-key", default="text", help="field of JSON lines that holds the text")
    preprocess.add_argument("--language", default="en", metavar="CODE", help="ISO 639 code of the text (default: en)")
    preprocess.add_argument(
        "--sentence-splitter",
        choices=("sentencex", "punkt"),
        help="what splits sentences (default: sentencex; punkt splits as NVIDIA's preprocess_data.py does)",
    )
    preprocess.add_argument(
        "--lowercase",
        choices=("auto", "yes", "no"),
        default="auto",
        help="lower-case text (auto: as tokenizer_config.json says, or else as the vocabulary is)",
    )
    preprocess.add_argument("--keep-documents", action="store_true", help="do not split documents into sentences")
    preprocess.add_argument("--append-eod", action="store_true", help="end every document with a separator token")
    preprocess.add_argument(
        "--on-bad-row", choices=("error", "skip"), default="error", help="what to do with lines that cannot be read"
    )
    preprocess.set_defaults(func=_preprocess)

    for name, help_text, function in (
        ("pretrain", "pretrain an encoder (alone, or under torchrun)", _pretrain),
        ("finetune", "train an encoder for a task (alone, or under torchrun)", _finetune),
        ("quantize", "make a fine-tuned encoder compute in integers, and train it so", _quantize),
    ):
        run = commands.add_parser(name, help=help_text)
        run.add_argument("config", type=Path, metavar="CONFIG.yaml")
        run.add_argument("overrides", nargs="*", metavar="section.key=value")
        run.set_defaults(func=function)

    fill = commands.add_parser("fill-mask", help="guess the masked words of a sentence")
    fill.add_argument("model", type=Path, metavar="RUN", help="a run directory, or one of its checkpoints")
    fill.add_argument("text", nargs="+", help="sentences with a mask token, such as [MASK], for each missing word")
    fill.add_argument("--top", type=int, default=5, metavar="N", help="guesses a mask")
    fill.set_defaults(func=_fill_mask)

    add_schedule_command(commands)
    add_finetuned_commands(commands)
    add_convert_commands(commands)
    add_launch_commands(commands)

    schema = commands.add_parser("config-schema", help="print the JSON schema of the settings, for editors")
    schema.add_argument("of", nargs="?", choices=("pretrain", "finetune", "quantize"), default="pretrain")
    schema.set_defaults(func=_config_schema)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 on success, 2 for mistakes a user can fix, 75 for a run that stopped before its last step.

    :class:`~megatron_bert.ending.Ending` has the others.

    Args:
        arguments: of the command line; None takes those of the process, which then ends with the command.
    """
    with Ending("megatron-bert") as ending:
        parsed = build_parser().parse_args(arguments)
        parsed.own_process = arguments is None
        ending.name = f"megatron-bert {parsed.command}"
        ending.code = parsed.func(parsed) or 0
    return ending.code
