# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of making a corpus, beside the tokenizer library alone and NVIDIA's way of doing it.

Runs in turns, on the same text with the same vocabulary and as many processes or threads, and compares processor time:

- `preprocess` of whole documents, from the file to the corpus, and the tokenizers library's batch call alone, on texts
  that are in memory already and with nothing done with the tokens;
- `preprocess` of sentences, and what NVIDIA's `preprocess_data.py` is described to do: a pool of processes that each
  take a line at a time, split it by NLTK's Punkt, and tokenize every sentence by the Python program that was published
  with BERT; the parent writes a sentence at a time. Both must give the same tokens.

With `--parquet`, measures instead the peak of memory while a Parquet file of so many megabytes is read, in row groups
of a quarter of it:

    python -m benchmarks.preprocessing TEXT.jsonl VOCAB.txt --pairs 5
    python -m benchmarks.preprocessing TEXT.jsonl VOCAB.txt --parquet 2048
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import punkt

from megatron_bert.data.indexed import IndexedDataset
from megatron_bert.data.preprocess import preprocess
from megatron_bert.data.tokenizers import load_tokenizer
from parallel.whole_files import write_json

READ = """
import re, sys
from megatron_bert.data.inputs import DocumentReader
count = sum(len(text) for text in DocumentReader([sys.argv[1]]))
print(count, re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""
"""The peak of memory is that of the program; getrusage would include what it was forked from."""


@cache
def nvidia_state(path: str) -> tuple[Any, Callable[[str], list[int]]]:
    """What a process splits by, and the ids of a sentence by the program published with BERT."""
    from transformers.models.bert.tokenization_bert_legacy import BasicTokenizer, WordpieceTokenizer, load_vocab

    vocabulary = load_vocab(path)
    words, pieces = BasicTokenizer(), WordpieceTokenizer(vocabulary, "[UNK]")

    def encode(sentence: str) -> list[int]:
        return [vocabulary[piece] for word in words.tokenize(sentence) for piece in pieces.tokenize(word)]

    return punkt.PunktSentenceTokenizer(punkt.load_model("english")), encode


def nvidia_encode(job: tuple[str, str]) -> list[list[int]]:
    """Ids of the sentences of one line."""
    line, vocabulary_path = job
    splitter, encode = nvidia_state(vocabulary_path)
    sentences = (sentence for part in json.loads(line)["text"].split("\n") for sentence in splitter.tokenize(part))
    return [ids for sentence in sentences if (ids := encode(sentence))]


def nvidia(text: Path, vocabulary: Path, output: Path, workers: int) -> int:
    """The whole run; returns the tokens written."""
    count = 0
    with text.open(encoding="utf-8") as lines, output.open("wb") as file, get_context("spawn").Pool(workers) as pool:
        for sentences in pool.imap(nvidia_encode, ((line, str(vocabulary)) for line in lines), 32):
            for ids in sentences:
                file.write(np.array(ids, dtype=np.uint16).tobytes())
                count += len(ids)
    return count


def seconds(work: Callable[[], Any]) -> float:
    """Processor time of some work, in all of its processes and threads; other programs may run beside it."""

    def used() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    began = used()
    work()
    return used() - began


def summary(ours: list[float], theirs: list[float], tokens: int) -> dict[str, Any]:
    """Tokens per second of processor time of both, and the median of how many times as fast ours is in a pair."""
    ratios = sorted(theirs_one / ours_one for ours_one, theirs_one in zip(ours, theirs, strict=True))
    return {
        "tokens": tokens,
        "tokens_per_processor_second": round(tokens / statistics.median(ours)),
        "tokens_per_processor_second_of_peer": round(tokens / statistics.median(theirs)),
        "times_as_fast": round(statistics.median(ratios), 3),
        "least_and_most": [round(ratios[0], 3), round(ratios[-1], 3)],
    }


def documents(path: Path) -> Iterator[str]:
    """Texts of a file of JSON lines."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All pairs."""
    workers = arguments.workers
    content = arguments.text.read_bytes()
    many, few = folder / "many.jsonl", folder / "few.jsonl"
    many.write_bytes(content * arguments.repeat)
    few.write_bytes(b"".join(content.splitlines(keepends=True)[:: arguments.every]))
    library = load_tokenizer(arguments.vocabulary)._backend  # type: ignore[attr-defined]
    texts = list(documents(many))
    options: dict[str, Any] = {"workers": workers, "progress": False}

    def whole() -> None:
        preprocess([many], arguments.vocabulary, folder / "whole", split_sentences=False, **options)

    def alone() -> None:
        for begin in range(0, len(texts), 1024):
            library.encode_batch_fast(texts[begin : begin + 1024], add_special_tokens=False)

    def sentences() -> None:
        preprocess([few], arguments.vocabulary, folder / "split", splitter="punkt", **options)

    def rerun() -> None:
        nvidia(few, arguments.vocabulary, folder / "nvidia.bin", workers)

    results: dict[str, Any] = {}
    for name, ours, theirs, corpus in (
        ("documents_beside_library_call", whole, alone, "whole_text_document"),
        ("sentences_beside_nvidia", sentences, rerun, "split_text_sentence"),
    ):
        pairs = [(seconds(ours), seconds(theirs)) for _ in range(arguments.pairs)]
        tokens = int(IndexedDataset(folder / corpus).sizes.sum())
        results[name] = summary([pair[0] for pair in pairs], [pair[1] for pair in pairs], tokens)
        print(name, results[name], flush=True)
    same = (folder / "nvidia.bin").read_bytes() == (folder / "split_text_sentence.bin").read_bytes()
    results["sentences_beside_nvidia"]["same_tokens"] = same
    return results


def measure_parquet(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Peak memory of reading a large Parquet file."""
    import pyarrow as pa
    from pyarrow import parquet

    path, texts = folder / "large.parquet", list(documents(arguments.text))
    schema = pa.schema({"text": pa.string(), "id": pa.int64()})
    size = sum(len(text.encode()) for text in texts)
    rounds = max(1, arguments.parquet * 2**20 // size // 4)
    with parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for _ in range(4):
            writer.write_table(
                pa.table([texts * rounds, range(len(texts) * rounds)], schema=schema), len(texts) * rounds
            )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True, check=True)
    characters, peak = map(int, done.stdout.split())
    return {
        "megabytes": round(path.stat().st_size / 2**20),
        "row_groups": parquet.ParquetFile(path).num_row_groups,
        "characters": characters,
        "peak_megabytes_of_memory": round(peak / 1024),
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("text", type=Path, help="JSON lines with a text field")
    parser.add_argument("vocabulary", type=Path, help="an uncased vocab.txt")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=1, help="how often the text is there beside the library's call")
    parser.add_argument("--every", type=int, default=1, help="every how many-th document is used beside NVIDIA's way")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--parquet", type=int, metavar="MEGABYTES")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(arguments.workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    name = "reading_parquet" if arguments.parquet else "speed"
    with tempfile.TemporaryDirectory() as folder:
        result = (measure_parquet if arguments.parquet else measure)(arguments, Path(folder))
    given = ["TEXT.jsonl", "VOCAB.txt", *sys.argv[3:]]
    words = [word for i, word in enumerate(given) if "--output" not in (word, given[i - 1])]
    # Here, since it loads torch, which the workers, that load this file, do not need.
    from benchmarks.harness import earlier_report, provenance

    report = earlier_report(arguments.output)
    report[name] = {
        **provenance("preprocessing", "tokenizers", "transformers", "numpy", arguments=words),
        "workers": arguments.workers,
        "text": {
            "megabytes": round(arguments.text.stat().st_size / 1e6, 1),
            "documents": len(list(documents(arguments.text))),
        },
        "results": result,
    }
    write_json(arguments.output, report)
    print(json.dumps(report[name], indent=2))


if __name__ == "__main__":
    main()
