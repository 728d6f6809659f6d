# SPDX-License-Identifier: Apache-2.0
"""The `megatron-bert` command: one subcommand a job."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_bert import __version__
from megatron_bert.arguments import given_path
from megatron_bert.convert.commands import add_convert_commands, add_read_options, run_inspect
from megatron_bert.convert.options import ReadOptions
from megatron_bert.data.commands import add_corpus_inspection, add_data_commands
from megatron_bert.ending import Ending
from megatron_bert.exporting.commands import add_export_command
from megatron_bert.finetuning.commands import add_finetuned_commands
from megatron_bert.launching.commands import add_launch_commands
from megatron_bert.launching.launched import launched_process
from megatron_bert.planning.commands import add_bench_command, add_dry_run, add_plan_command, check_dry_run
from megatron_bert.planning.schedule_command import add_schedule_command
from megatron_bert.shipped import choose_shipped, copy_shipped, purpose, shipped_configs, shipped_scripts
from megatron_bert.starting import collect_as_usual
from megatron_bert.tables import RUNS, found_at


def _train(arguments: argparse.Namespace) -> int:
    """Read the settings of a run, run or check it, and say by the exit code how it ended."""
    kind = RUNS[arguments.command]
    if check_dry_run(arguments):
        from megatron_bert.planning.dry_run_command import run_dry_run

        run_dry_run(arguments)
        return 0
    with launched_process():
        from megatron_bert.config_file import load_sections
        from megatron_bert.training.signals import exit_code

        settings_of, run = found_at(kind.settings), found_at(kind.run)
        if arguments.own_process:
            collect_as_usual()
        settings = load_sections(arguments.config, arguments.overrides, settings_of)
        return exit_code(run(settings, ends_process=arguments.own_process))


def _fill_mask(arguments: argparse.Namespace) -> None:
    from megatron_bert.finetuning.fill_mask import FillMask

    model = FillMask.from_checkpoint(arguments.model, arguments.tokenizer, ReadOptions.given(arguments))
    for text in arguments.text:
        print(text)
        for guess in model(text, top=arguments.top):
            print(f"  {guess.probability:6.1%}  {guess.token:<16} {guess.sentence}")


def _inspect(arguments: argparse.Namespace) -> None:
    """A checkpoint, and the integer plan beside it; or a plan alone."""
    from megatron_bert.convert.huggingface import WEIGHTS
    from megatron_bert.ibert.engine.inspection import describe_plan, plan_in

    source: Path = arguments.source
    plan = next((path for path in map(plan_in, (source, source / "model")) if path is not None), None)
    if plan is None:
        return run_inspect(arguments)
    if plan == source or (plan.parent == source and not any((source / name).is_file() for name in WEIGHTS)):
        return print(describe_plan(plan))
    run_inspect(arguments)
    return print(f"\n{describe_plan(plan)}")


def _config_schema(arguments: argparse.Namespace) -> None:
    print(json.dumps(found_at(RUNS[arguments.of].settings).model_json_schema(), indent=2))


def _shipped(known: Callable[[], dict[str, Path]], arguments: argparse.Namespace) -> None:
    files = choose_shipped(known(), arguments.names)
    if arguments.output is not None:
        for path in copy_shipped(files, arguments.output):
            print(path)
        return
    if arguments.names:  # for $(megatron-bert scripts torchrun.sh)
        print("\n".join(str(files[name]) for name in arguments.names))
        return
    width = max(map(len, files))
    print("\n".join(f"{name:<{width}}  {purpose(path)}".rstrip() for name, path in files.items()))


def build_parser() -> argparse.ArgumentParser:
    """All subcommands."""
    parser = argparse.ArgumentParser(
        prog="megatron-bert", description="Pretrain BERT encoders with Megatron parallelism."
    )
    parser.add_argument("--version", action="version", version=f"megatron-bert {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add_data_commands(commands)
    for name, help_text, known in (
        ("configs", "list or copy the settings files that come with megatron-bert", shipped_configs),
        ("scripts", "list or copy scripts and definitions of images to start runs with", shipped_scripts),
    ):
        shipped = commands.add_parser(name, help=help_text)
        shipped.add_argument("names", nargs="*", metavar="NAME", help="of the files (default: all)")
        shipped.add_argument("--output", type=given_path, metavar="DIR", help="copy them there")
        shipped.set_defaults(func=partial(_shipped, known))

    for name, kind in RUNS.items():
        run = commands.add_parser(name, help=kind.purpose)
        run.add_argument("config", type=given_path, metavar="CONFIG", help="a settings file, or a name of `configs`")
        run.add_argument("overrides", nargs="*", metavar="section.key=value")
        run.set_defaults(func=_train)
        add_dry_run(run)

    fill = commands.add_parser("fill-mask", help="guess the masked words of a sentence")
    fill.add_argument("model", type=given_path, metavar="MODEL", help="a run directory, or a checkpoint of any format")
    fill.add_argument("text", nargs="+", help="sentences with a mask token, such as [MASK], for each missing word")
    fill.add_argument("--top", type=int, default=5, metavar="N", help="guesses a mask")
    fill.add_argument(
        "--tokenizer", type=given_path, metavar="PATH", help="vocabulary of a model that has none beside it"
    )
    add_read_options(fill)
    fill.set_defaults(func=_fill_mask)

    add_schedule_command(commands)
    add_plan_command(commands)
    add_bench_command(commands)
    add_finetuned_commands(commands)
    add_convert_commands(commands)
    commands.choices["inspect"].set_defaults(func=_inspect)  # which knows of integer plans too
    add_export_command(commands)
    add_corpus_inspection(commands)
    add_launch_commands(commands)

    schema = commands.add_parser("config-schema", help="print the JSON schema of the settings, for editors")
    schema.add_argument("of", nargs="?", choices=list(RUNS), default="pretrain")
    schema.set_defaults(func=_config_schema)
    return parser


def _parsed(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The command line, in which overrides may also stand behind options, where argparse takes none."""
    parsed, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(parsed, "overrides") or any(each.startswith("-") or "=" not in each for each in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides += rest
    return parsed


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 on success, 2 for mistakes a user can fix, 75 for a run that stopped before its last step.

    :class:`~megatron_bert.ending.Ending` has the others.

    Args:
        arguments: of the command line; None takes those of the process, which then ends with the command.
    """
    with Ending("megatron-bert") as ending:
        parsed = _parsed(build_parser(), arguments)
        parsed.own_process = arguments is None
        ending.name = f"megatron-bert {parsed.command}"
        ending.code = parsed.func(parsed) or 0
    return ending.code
