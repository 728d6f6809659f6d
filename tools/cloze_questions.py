# SPDX-License-Identifier: Apache-2.0
"""Questions made from plain text: some words around a gap, and what stood in it as the answer, in SQuAD's format.

An encoder that has answered them finds where a question's words stand in a text before it sees the first question that
somebody asked, which matters where there are few of those (as in Lewis et al., arXiv 1906.04980, and Ram et al.,
Splinter, arXiv 2101.00438)::

    python -m tools.cloze_questions books.jsonl cloze.json --questions 90000 --words 30 160
    megatron-bert finetune configs/finetune/squad1.yaml data.train=cloze.json data.valid_fraction=0.01
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_bert.data.rows import decode_row
from megatron_bert.data.text_files import RowReader
from megatron_bert.ending import command
from parallel.errors import UserError
from parallel.whole_files import reporting, write_json

_WORD = re.compile(r"\S+")
#: Words of an answer: short ones more often.
_ANSWER_SIZES = (1, 1, 2, 2, 3, 3, 4, 5, 6, 8)
#: Most words of the text that a question has from either side of the answer, and the share of them that stays.
_MOST_AROUND, _KEPT = 8, (0.5, 0.7, 0.9)
_CLOSING = ".,;:!?\"'”’)"


def question_from(text: str, words: list[tuple[int, int]], name: str, rng: random.Random) -> dict[str, Any] | None:
    """A paragraph of SQuAD's format with one question, or None where the words do not make one.

    Args:
        words: where the words of the passage begin and end in it.
    """
    size = min(rng.choice(_ANSWER_SIZES), len(words))
    at = rng.randint(0, len(words) - size)
    before = words[max(0, at - rng.randint(2, _MOST_AROUND)) : at]
    after = words[at + size : at + size + rng.randint(2, _MOST_AROUND)]
    kept = rng.choice(_KEPT)
    left, right = ([text[a:b] for a, b in side if rng.random() < kept] for side in (before, after))
    start, end = words[at][0], words[at + size - 1][1]
    answer = text[start:end].rstrip(_CLOSING)
    if not answer or not (left or right):
        return None
    asked = [*left, "what", *right] if rng.random() < 0.5 else ["what", *left, *right]
    first = words[0][0]
    return {
        "context": text[first : words[-1][1]],
        "qas": [
            {
                "id": name,
                "question": " ".join(asked) + "?",
                "answers": [{"text": answer, "answer_start": start - first}],
            }
        ],
    }


def questions(texts: list[str], count: int, words: tuple[int, int], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Paragraphs with one question each, from documents in proportion to their length.

    Args:
        count: how many passages are drawn; a few of them make no question.
        words: the least and the most words of a passage.

    Raises:
        UserError: no document has words, no question is asked for, or the least is above the most.
    """
    if count < 1:
        raise UserError(f"--questions is {count}: give 1 or more")
    places = [[match.span() for match in _WORD.finditer(text)] for text in texts]
    if not any(places):
        raise UserError("the input holds no words: give JSON lines with a text, or plain text")
    least, most = words
    if not 2 <= least <= most:
        raise UserError(f"--words is {least} {most}: give the least, 2 or more, and the most words of a passage")
    rng = random.Random(seed)
    for number, index in enumerate(rng.choices(range(len(texts)), [len(spans) for spans in places], k=count)):
        length = min(rng.randint(least, most), len(places[index]))
        first = rng.randint(0, len(places[index]) - length)
        found = question_from(texts[index], places[index][first : first + length], str(number), rng)
        if found is not None:
            yield found


@command("cloze_questions")
def main(given: list[str] | None = None) -> int:
    """Read documents, write questions; 0 on success, 2 for mistakes a user can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="JSON lines or plain text, compressed or not")
    parser.add_argument("output", type=Path, help="JSON file in the format of SQuAD 1.1")
    parser.add_argument("--questions", type=int, default=20_000)
    parser.add_argument("--words", type=int, nargs=2, default=(30, 160), help="least and most words of a passage")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(given)
    texts = [decode_row(row) for row in RowReader(arguments.input)]
    least, most = arguments.words
    paragraphs = list(questions(texts, arguments.questions, (least, most), arguments.seed))
    found = {"version": "1.1", "data": [{"title": arguments.input.name, "paragraphs": paragraphs}]}
    with reporting("written", arguments.output, "give another"):
        write_json(arguments.output, found)
    print(f"{arguments.output}: {len(paragraphs):,} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
