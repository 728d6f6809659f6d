# SPDX-License-Identifier: Apache-2.0
"""The subcommands that make corpora: train-tokenizer, preprocess and merge."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_bert.arguments import check_outputs, given_path
from parallel.errors import UserError

# Written out, so that the command line starts without loading the libraries.
INPUT_HELP = (
    "JSON lines, plain text with blank lines between documents, Parquet, Arrow or tar files, a dataset saved to disk, "
    "a directory of such files, a pattern, or - for standard input; .gz, .bz2, .xz and .zst too"
)
KEY_HELP = "field of JSON objects, or column of tables, that holds the text (default: text)"


def add_data_commands(commands: Any) -> None:
    """Add the subcommands.

    Args:
        commands: what ``ArgumentParser.add_subparsers`` returned; each command sets ``func``.
    """
    tokenizer = commands.add_parser("train-tokenizer", help="learn a vocabulary from text")
    tokenizer.add_argument("--input", nargs="+", required=True, metavar="FILE", help=INPUT_HELP)
    tokenizer.add_argument("--type", choices=("wordpiece", "sentencepiece", "bpe"), default="wordpiece")
    tokenizer.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="entries, special tokens included"
    )
    tokenizer.add_argument("--at-most", action="store_true", help="take fewer entries where the text does not fill N")
    tokenizer.add_argument("--output", type=given_path, required=True, metavar="DIR")
    tokenizer.add_argument("--cased", action="store_true", help="keep upper case")
    tokenizer.add_argument("--json-key", default="text", metavar="NAME", help=KEY_HELP)
    tokenizer.set_defaults(func=_train_tokenizer)

    preprocess = commands.add_parser("preprocess", help="turn text into a .bin/.idx corpus")
    add_preprocess_options(preprocess)
    preprocess.set_defaults(func=_preprocess)

    merge = commands.add_parser("merge", help="join the parts of a corpus, or several corpora")
    merge.add_argument(
        "prefixes",
        type=given_path,
        nargs="+",
        metavar="PREFIX",
        help="of a corpus, with or without .idx; parts in any order",
    )
    merge.add_argument("--output", type=given_path, required=True, metavar="PREFIX", help="prefix of the joined corpus")
    merge.set_defaults(func=_merge)


def add_corpus_inspection(commands: Any) -> None:
    """Let `inspect`, which is there already, take corpora too."""
    parser = commands.choices["inspect"]
    group = parser.add_argument_group("corpora", "for SRC the prefix of a corpus, or its .idx file")
    group.add_argument("--sample", type=int, metavar="N", help="print N training samples with their masks")
    group.add_argument("--png", type=given_path, metavar="FILE", help="draw histograms of the lengths")
    group.add_argument("--seq-length", type=int, metavar="N", help="tokens per sample (default: 512)")
    group.add_argument("--pair-objective", choices=("sop", "nsp", "none"), help="of samples (default: sop)")
    group.add_argument(
        "--tokenizer", type=given_path, metavar="PATH", help="that the corpus was made with, to see its text"
    )
    parser.set_defaults(func=partial(_inspect, parser.get_default("func")))


def _inspect(of_checkpoint: Callable[[argparse.Namespace], Any], arguments: argparse.Namespace) -> Any:
    from megatron_bert.data.compression import inner_suffix
    from megatron_bert.data.corpus_report import is_corpus
    from megatron_bert.data.inputs import SUFFIXES

    if is_corpus(str(arguments.source)):
        _inspect_corpus(arguments)
        return None
    for name in ("sample", "png", "seq_length", "pair_objective", "tokenizer"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for corpora, and there is no {arguments.source}.idx.")
    if inner_suffix(str(arguments.source)) in (set(SUFFIXES) - {".tar"}) and arguments.source.is_file():
        raise UserError(
            f"{arguments.source} holds text, of which preprocess makes a corpus: give its prefix, or a checkpoint."
        )
    return of_checkpoint(arguments)


def _inspect_corpus(arguments: argparse.Namespace) -> None:
    from megatron_bert.data.corpus_report import CorpusReport, SampleOptions
    from megatron_bert.data.tokenizers import load_tokenizer

    if arguments.verify:
        raise UserError("--verify is for checkpoints: a corpus is checked whenever it is opened.")
    if arguments.sample is not None and (arguments.sample < 1 or arguments.tokenizer is None):
        raise UserError(
            "--sample needs a number of samples, 1 or more, and --tokenizer, which the corpus was made with."
        )
    for name in ("seq_length", "pair_objective"):
        if getattr(arguments, name) is not None and arguments.tokenizer is None:
            raise UserError(f"--{name.replace('_', '-')} needs --tokenizer, which the corpus was made with.")
    if arguments.seq_length is not None and arguments.seq_length < 8:
        raise UserError(f"--seq-length is {arguments.seq_length}: give 8 or more.")
    corpus = {f"the corpus ({end})": Path(f"{arguments.source}{end}") for end in (".bin", ".idx")}
    check_outputs({"--png": arguments.png}, corpus | {"--tokenizer": arguments.tokenizer})
    tokenizer = None if arguments.tokenizer is None else load_tokenizer(arguments.tokenizer)
    report = CorpusReport(str(arguments.source), tokenizer)
    given = {"seq_length": arguments.seq_length, "objective": arguments.pair_objective}
    options = SampleOptions(**{name: value for name, value in given.items() if value is not None})
    lines = report.lines(options)
    if tokenizer is not None:
        lines += ["", *report.texts(3)]
    if arguments.sample is not None:
        lines += ["", "samples; what is to be predicted is in braces, with what stood there:"]
        lines += report.samples(arguments.sample, options)
    if arguments.png is not None:
        report.draw(arguments.png)
        lines += ["", f"histograms: {arguments.png}"]
    print("\n".join(lines))


def add_preprocess_options(parser: argparse.ArgumentParser) -> None:
    """The options of preprocess."""
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help=INPUT_HELP)
    parser.add_argument("--tokenizer", type=given_path, required=True, metavar="PATH")
    parser.add_argument("--output-prefix", type=given_path, required=True, metavar="PREFIX")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core it may use)")
    parser.add_argument(
        "--part", metavar="K/N", help="make part K of N alone, on this host; `merge` joins the parts of all hosts"
    )
    parser.add_argument("--json-key", default="text", metavar="NAME", help=KEY_HELP)
    parser.add_argument("--language", default="en", metavar="CODE", help="ISO 639 code of the text (default: en)")
    parser.add_argument(
        "--sentence-splitter",
        choices=("sentencex", "punkt"),
        help="what splits sentences (default: sentencex; punkt splits as NVIDIA's preprocess_data.py does)",
    )
    parser.add_argument(
        "--lowercase",
        choices=("auto", "yes", "no"),
        default="auto",
        help="lower-case text (auto: as tokenizer_config.json says, or else as the vocabulary is)",
    )
    parser.add_argument("--keep-documents", action="store_true", help="do not split documents into sentences")
    parser.add_argument("--append-eod", action="store_true", help="end every document with a separator token")
    parser.add_argument(
        "--on-bad-row", choices=("error", "skip"), default="error", help="what to do with rows that cannot be read"
    )


def _train_tokenizer(arguments: argparse.Namespace) -> None:
    from megatron_bert.data.train_tokenizer import train_tokenizer

    train_tokenizer(
        arguments.input,
        arguments.type,
        arguments.vocab_size,
        arguments.output,
        cased=arguments.cased,
        at_most=arguments.at_most,
        json_key=arguments.json_key,
    )


def _preprocess(arguments: argparse.Namespace) -> None:
    from megatron_bert.data.inputs import parse_part
    from megatron_bert.data.preprocess import preprocess

    report = preprocess(
        arguments.input,
        arguments.tokenizer,
        arguments.output_prefix,
        workers=len(os.sched_getaffinity(0)) if arguments.workers is None else arguments.workers,
        json_key=arguments.json_key,
        split_sentences=not arguments.keep_documents,
        append_eod=arguments.append_eod,
        language=arguments.language,
        splitter=arguments.sentence_splitter,
        lowercase={"auto": None, "yes": True, "no": False}[arguments.lowercase],
        on_bad_row=arguments.on_bad_row,
        part=None if arguments.part is None else parse_part(arguments.part),
    )
    skipped = report.skipped_empty + report.skipped_bad
    print(
        f"{_counts(report)} in {report.seconds:.1f} s"
        + (f"; skipped {report.skipped_empty:,} empty documents, {report.skipped_bad:,} bad rows" if skipped else "")
    )
    _print_duplicates(report)


def _merge(arguments: argparse.Namespace) -> None:
    from megatron_bert.data.merging import merge_corpora

    report = merge_corpora(arguments.prefixes, arguments.output)
    print(f"{_counts(report)} of {report.corpora} corpora")
    _print_duplicates(report)
    if not report.noted:
        print(f"note: {report.prefix}.json is not written: a corpus without such a note does not name its tokenizer")


def _counts(report: Any) -> str:
    return f"{report.prefix}: {report.documents:,} documents, {report.sentences:,} sentences, {report.tokens:,} tokens"


def _print_duplicates(report: Any) -> None:
    if report.duplicates:
        share = report.duplicates / report.documents
        print(f"note: {report.duplicates:,} documents ({share:.1%}) equal an earlier one, and were kept")
