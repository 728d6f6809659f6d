# SPDX-License-Identifier: Apache-2.0
"""Draw the loss curve of a run again, with the entropy of the corpus's word frequencies as a yardstick.

A model that knows how often each word occurs, and nothing of the context, cannot do better on the held-out text than
the entropy of the text's own word frequencies. What a run is below that line, it has learned from context.

    python tools/draw_curves.py runs/quickstart/run
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import yaml

from megatron_bert.config import Settings
from megatron_bert.config_file import load_settings
from megatron_bert.data.indexed import IndexedDataset
from megatron_bert.data.sample_index import split_documents
from megatron_bert.ending import command
from megatron_bert.training.curves import draw_curves
from megatron_bert.training.metrics_file import METRICS_FILE, read_metrics
from parallel.errors import UserError


def held_out_tokens(settings: Settings) -> np.ndarray:
    """All tokens a run is evaluated on."""
    data = settings.data
    parts = []
    for corpus in data.valid or data.train:
        indexed = IndexedDataset(corpus.prefix)
        boundaries = indexed.document_indices
        first, last = 0, len(boundaries) - 1
        if data.valid is None:
            first, last = split_documents(data.split, last)[1]
        parts.append(indexed.tokens(int(boundaries[first]), int(boundaries[last])))
    return np.concatenate(parts)


def entropy(tokens: np.ndarray) -> float:
    """Entropy of the token frequencies, in nats."""
    counts = np.bincount(tokens)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


@command("draw_curves")
def main() -> int:
    """Draw the picture and print the numbers."""
    parser = argparse.ArgumentParser(description="Draw a run's curves with the entropy of its word frequencies.")
    parser.add_argument("run", type=Path, help="run directory")
    run = parser.parse_args().run
    try:
        tokens = held_out_tokens(load_settings(run / "config.yaml", []))
        scores = [row for row in read_metrics(run / METRICS_FILE) if "valid_mlm_loss" in row]
    except (UserError, OSError, yaml.YAMLError) as error:
        print(f"draw_curves: {error}", file=sys.stderr)
        return 2
    line = entropy(tokens)
    picture = draw_curves(run, unigram_entropy=line)
    print(f"entropy of the word frequencies: {line:.3f} nats, over {tokens.size:,} held-out tokens")
    if scores:
        loss, step = scores[-1]["valid_mlm_loss"], scores[-1]["step"]
        side = "below" if loss < line else "above"
        print(f"held-out loss of masked tokens:  {loss:.3f} nats after step {step}, {abs(line - loss):.3f} {side} that")
    if picture:
        print(f"loss curve:                      {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
