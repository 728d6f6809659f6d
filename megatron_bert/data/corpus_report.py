# SPDX-License-Identifier: Apache-2.0
"""What a corpus holds, for people: sizes, lengths, unknown tokens, languages, how full samples are, and texts."""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bert.data.indexed import IndexedDataset
from megatron_bert.data.indexed_format import corpus_prefix_of
from megatron_bert.data.sentence_pairs import Objective, PairDataset, Sample
from megatron_bert.data.sidecar import check_tokenizer, read_sidecar
from megatron_bert.data.tokenizers import Tokenizer
from parallel.errors import UserError
from parallel.whole_files import reporting, write_picture

BLOCK = 1 << 22
"""Tokens counted at a time."""

TEXT_DOCUMENTS = 2000
"""Documents whose text is decoded to see which characters it has."""

TEXT_TOKENS = 2000
"""Tokens of each of those that are decoded at most."""

SEED = 1234
"""Of everything random in samples that are shown."""

MASK_PROBABILITY = 0.15
"""Share of their tokens to predict."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of documents or sentences.

    Attributes:
        name: What is counted.
        unit: In what.
        values: int [N].
    """

    name: str
    unit: str
    values: np.ndarray

    def __str__(self) -> str:
        low, middle, high, most = np.percentile(self.values, [10, 50, 90, 99])
        return (
            f"{self.unit} per {self.name}: mean {self.values.mean():,.1f}, median {middle:,.0f}, 10% below {low:,.0f}, "
            f"10% above {high:,.0f}, 1% above {most:,.0f}, longest {self.values.max():,}"
        )


@dataclass(frozen=True)
class SampleOptions:
    """How training samples are made, as the settings of the same names in `data` say.

    Attributes:
        seq_length: Tokens per sample, special tokens included.
    """

    seq_length: int = 512
    objective: Objective = "sop"


class CorpusReport:
    """Opens a corpus and says what it holds.

    Args:
        prefix: Of the corpus, with or without .idx or .bin.
        tokenizer: That the corpus was made with; None leaves out what needs it.

    Raises:
        UserError: The corpus is missing, damaged, empty or of another tokenizer.
    """

    def __init__(self, prefix: str, tokenizer: Tokenizer | None) -> None:
        self.prefix = corpus_prefix_of(prefix)
        self.corpus = IndexedDataset(self.prefix)
        if not len(self.corpus):
            raise UserError(f"{self.prefix} holds no sentence: there is nothing to report.")
        if self.corpus.dtype.kind not in "iu":
            raise UserError(f"{self.corpus.tokens_path} holds {self.corpus.dtype} values: token ids must be integers.")
        self.note = read_sidecar(self.prefix)
        self.tokenizer = tokenizer
        self._datasets: dict[SampleOptions, PairDataset] = {}
        if tokenizer is not None:
            check_tokenizer(self.prefix, tokenizer)
        bounds = np.array(self.corpus.document_indices)
        ends = np.concatenate([[0], np.cumsum(self.corpus.sizes, dtype=np.int64)])
        self.lengths = [
            Lengths("document", "tokens", np.diff(ends[bounds])),
            Lengths("document", "sentences", np.diff(bounds)),
            Lengths("sentence", "tokens", np.array(self.corpus.sizes)),
        ]

    def lines(self, options: SampleOptions) -> list[str]:
        """The report, a line for each fact.

        Raises:
            UserError: A token id lies outside the vocabulary.
        """
        documents, tokens = len(self.corpus.document_indices) - 1, int(self.lengths[0].values.sum())
        lines = [
            f"{self.prefix}: a corpus of {documents:,} documents, {len(self.corpus):,} sentences, {tokens:,} tokens "
            f"({self.corpus.dtype}, {self.corpus.tokens_path.stat().st_size / 1e6:,.1f} MB)"
        ]
        if self.note is None:
            lines.append("tokenizer: not known; there is no note beside it, so another program may have made it")
        else:
            made = [f"tokenizer of {self.note['vocab_size']:,} entries ({self.note['tokenizer'][:12]})"]
            made += [f"language {self.note['language']}"] if "language" in self.note else []
            splitter = self.note.get("sentence_splitter")
            made.append(f"sentences by {splitter}" if splitter else "documents not split into sentences")
            lines.append("made with: " + ", ".join(made))
            if "part" in self.note:
                lines.append(f"part: {self.note['part']['number']} of {self.note['part']['count']}; merge all of them")
            repeated = self.note.get("duplicate_documents")
            if repeated is not None:
                lines.append(
                    f"duplicates: {repeated:,} documents ({repeated / max(1, documents):.1%}) equal an earlier one"
                )
        lines += map(str, self.lengths)
        if self.tokenizer is None:
            return [*lines, "text: give --tokenizer to see unknown tokens, languages, samples and texts"]
        return [*lines, *self._vocabulary(self.tokenizer), *self._languages(self.tokenizer), self._fullness(options)]

    def texts(self, count: int) -> list[str]:
        """Beginnings of some documents, evenly spread, decoded."""
        assert self.tokenizer is not None
        bounds = self.corpus.document_indices
        found = []
        for document in _spread(len(bounds) - 1, count):
            ids = self.corpus.tokens(int(bounds[document]), int(bounds[document + 1]))
            ending = " ..." if len(ids) > 60 else ""
            found.append(f"document {document:,}: {self.tokenizer.decode(ids[:60].tolist())}{ending}")
        return found

    def samples(self, count: int, options: SampleOptions) -> list[str]:
        """Training samples as the model sees them, with what it is to predict.

        Raises:
            UserError: The corpus gives no sample, or the options are out of range.
        """
        dataset = self._dataset(options)
        assert self.tokenizer is not None
        return [
            show_sample(dataset.sample(0, index), self.tokenizer, options.objective)
            for index in _spread(len(dataset), count)
        ]

    def draw(self, path: Path) -> None:
        """Draw the lengths as histograms with logarithmic bins.

        Raises:
            UserError: The file cannot be written.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 3.6), layout="constrained")
        for axis, lengths in zip(figure.subplots(1, 3), self.lengths, strict=True):
            values = lengths.values[lengths.values > 0]
            edges = np.unique(np.round(np.geomspace(1, max(2, int(values.max()) + 1), 50)))
            axis.hist(values, bins=edges, color="#4c78a8")
            axis.set(xscale="log", xlabel=f"{lengths.unit} per {lengths.name}", ylabel=f"{lengths.name}s")
        figure.suptitle(self.prefix)
        with reporting("written", path, "give another name"):
            write_picture(path, figure, dpi=110)

    def _vocabulary(self, tokenizer: Tokenizer) -> list[str]:
        counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        tokens = np.memmap(self.corpus.tokens_path, dtype=self.corpus.dtype, mode="r")
        for begin in range(0, len(tokens), BLOCK):
            block = tokens[begin : begin + BLOCK]
            if int(block.min()) < 0 or int(block.max()) >= tokenizer.vocab_size:
                raise UserError(
                    f"{self.corpus.tokens_path} holds token ids from {block.min()} to {block.max()} but the vocabulary "
                    f"has {tokenizer.vocab_size} entries: give the tokenizer the corpus was made with."
                )
            counts += np.bincount(block, minlength=tokenizer.vocab_size)
        unknown, used = int(counts[tokenizer.unk_id]), int(np.count_nonzero(counts))
        pieces = len(tokens) / max(1, int(counts[tokenizer.word_starts].sum()))
        return [
            f"unknown tokens: {unknown:,} ({unknown / len(tokens):.3%})",
            f"vocabulary: {used:,} of {tokenizer.vocab_size:,} entries occur; {pieces:.2f} tokens per word",
        ]

    def _languages(self, tokenizer: Tokenizer) -> list[str]:
        """Shares of the characters by language, as py3langid takes each document's to be, and by script."""
        import py3langid  # reads its model

        bounds = self.corpus.document_indices
        count = len(bounds) - 1
        chosen = _spread(count, min(count, TEXT_DOCUMENTS))
        languages: Counter[str] = Counter()
        scripts: Counter[str] = Counter()
        for document in chosen:
            ids = self.corpus.tokens(int(bounds[document]), int(bounds[document + 1]))[:TEXT_TOKENS]
            text = tokenizer.decode(ids.tolist())
            found = {character: times for character, times in Counter(text).items() if not character.isspace()}
            languages[py3langid.classify(text)[0]] += sum(found.values())
            for character, times in found.items():
                scripts[_script(character)] += times
        return [
            f"characters by {name} (of {len(chosen):,} documents): {_shares(counts)}"
            for name, counts in (("language", languages), ("script", scripts))
        ]

    def _fullness(self, options: SampleOptions) -> str:
        try:
            dataset = self._dataset(options)
        except UserError as error:
            return f"samples: {error}"
        use = dataset.use()
        kept = use.tokens - use.skipped_tokens - use.truncated_tokens
        special = len(dataset) * (2 if options.objective == "none" else 3)
        places = len(dataset) * options.seq_length
        return (
            f"samples of {options.seq_length} tokens (pair_objective {options.objective}): {use.samples:,} an epoch, "
            f"{(kept + special) / places:.1%} full; {kept / max(1, use.tokens):.1%} of the tokens are used"
        )

    def _dataset(self, options: SampleOptions) -> PairDataset:
        """The samples of the whole corpus, whose index is built once: that goes through all of its sentences."""
        assert self.tokenizer is not None
        if options not in self._datasets:
            self._datasets[options] = PairDataset(
                self.corpus,
                (0, len(self.corpus.document_indices) - 1),
                self.tokenizer,
                seq_length=options.seq_length,
                max_predictions=max(1, round(MASK_PROBABILITY * options.seq_length)),
                mask_probability=MASK_PROBABILITY,
                objective=options.objective,
                seed=SEED,
            )
        return self._datasets[options]


def show_sample(sample: Sample, tokenizer: Tokenizer, objective: Objective) -> str:
    """A sample as the model sees it: its pieces, those to predict in braces with what they are."""
    wanted = dict(zip(sample.mask_positions.tolist(), sample.mask_labels.tolist(), strict=True))
    shown = []
    for place, token in enumerate(sample.tokens.tolist()):
        piece = tokenizer.id_to_token(token)
        if place in wanted:
            hidden = tokenizer.id_to_token(wanted[place])
            piece = f"{{{piece}={hidden}}}" if piece != hidden else f"{{{piece}}}"
        shown.append(piece)
    pair = ""
    if objective == "sop":
        pair = f"; the segments are {('in order', 'swapped')[sample.pair_label]}"
    if objective == "nsp":
        pair = f"; the second segment is {('the next sentences', 'of another document')[sample.pair_label]}"
    return f"{len(shown)} tokens, {len(wanted)} to predict{pair}\n  {' '.join(shown)}"


def is_corpus(source: str) -> bool:
    """Whether a path names a corpus: its prefix, or one of its two files."""
    return Path(f"{corpus_prefix_of(source)}.idx").is_file()


def _spread(total: int, count: int) -> list[int]:
    """So many of the numbers below a total, evenly spread from the first to the last; fewer where there are fewer."""
    return np.unique(np.linspace(0, total - 1, count).astype(np.int64)).tolist()


def _shares(counts: Counter[str]) -> str:
    """The largest shares, largest first."""
    total = max(1, counts.total())
    return ", ".join(f"{name} {times / total:.1%}" for name, times in counts.most_common(8))


@lru_cache(1 << 16)
def _script(character: str) -> str:
    """The script of a character, by the first word of its name; digits and signs are of none."""
    if not unicodedata.category(character).startswith(("L", "M")):
        return "digits and signs"
    name: Any = unicodedata.name(character, "other").split()[0]
    return {"CJK": "Chinese"}.get(name, name.capitalize())
