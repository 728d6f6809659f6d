# SPDX-License-Identifier: Apache-2.0
"""Time and memory of cutting a large corpus into samples.

Makes up the sentence sizes of a corpus (geometric, 22 tokens per sentence and 20 sentences per document on average),
builds the sample index as pretraining does, and writes what it took to `index_building.json` next to this file:

    python -m benchmarks.index_building --sentences 100_000_000
"""

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np

from megatron_bert.data.sentence_pairs import build_samples
from parallel.whole_files import write_json

TOKENS_PER_SENTENCE, SENTENCES_PER_DOCUMENT = 22, 20
SEQ_LENGTH, SHORT_SEQUENCE_PROBABILITY, SEED = 512, 0.1, 1234


def make_corpus(sentences: int, long_document: int) -> tuple[np.ndarray, np.ndarray]:
    """Sizes [S] and document boundaries [D] of a corpus; the last document may be a very long one."""
    rng = np.random.default_rng(0)
    sizes = rng.geometric(1 / TOKENS_PER_SENTENCE, size=sentences + long_document).astype(np.int32)
    counts = rng.geometric(1 / SENTENCES_PER_DOCUMENT, size=int(1.1 * sentences / SENTENCES_PER_DOCUMENT) + 10)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    bounds = np.append(bounds[bounds < sentences], sentences)
    return sizes, np.append(bounds, sentences + long_document) if long_document else bounds


def measure(sizes: np.ndarray, bounds: np.ndarray) -> dict[str, float]:
    """Build the index once."""
    started = time.perf_counter()
    samples = build_samples(
        sizes,
        bounds,
        (0, len(bounds) - 1),
        max_tokens=SEQ_LENGTH - 3,
        short_sequence_probability=SHORT_SEQUENCE_PROBABILITY,
        pairs=True,
        seed=SEED,
    )
    seconds = time.perf_counter() - started
    return {
        "sentences": len(sizes),
        "documents": len(bounds) - 1,
        "samples": len(samples),
        "seconds": round(seconds, 2),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sentences", type=int, default=100_000_000)
    parser.add_argument("--long-document", type=int, default=1_000_000, help="sentences of one document measured alone")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    # The long document first: the peak of memory is that of the process, and the other one is larger.
    results = {
        "one_long_document": measure(*make_corpus(0, arguments.long_document)),
        "corpus": measure(*make_corpus(arguments.sentences, 0)),
    }
    from benchmarks.harness import provenance  # loads torch, whose memory does not count

    report = {
        **provenance("index_building", "numpy"),
        "settings": {"seq_length": SEQ_LENGTH, "short_sequence_probability": SHORT_SEQUENCE_PROBABILITY, "seed": SEED},
        "results": results,
    }
    write_json(arguments.output, report)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
