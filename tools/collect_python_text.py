# SPDX-License-Identifier: Apache-2.0
"""English prose out of the Python installation: a real corpus that needs no download.

Python ships the prose of its language reference (`pydoc_data.topics`), and the sources of the standard library and of
installed packages hold megabytes of documentation in their docstrings. Paragraphs that are not prose (examples,
signatures, tables, headings, lists of parameters) are left out, markup is removed, and a paragraph is kept once. Each
module becomes a document; documents are in a fixed random order, so that a held-out part is a fair sample of all.

    python tools/collect_python_text.py corpus.txt
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

from megatron_bert.ending import command
from parallel.whole_files import write_text

#: Packages whose docstrings are read when they are installed; torch brings most of them.
PACKAGES = ("torch", "numpy", "matplotlib", "sympy", "networkx")

#: Folders without documentation for people.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "testing", "idlelib", "lib2to3", "__pycache__"}

#: Ten times faster than parsing the whole source, which would cost a minute for torch alone.
_LITERAL = re.compile(r"""(?P<prefix>[A-Za-z]{0,2})(?P<quotes>\"{3}|'{3})(?:[^\\]|\\.)*?(?P=quotes)""", re.DOTALL)

_MARKUP = [
    (re.compile(r":[a-z:]+:`~?([^`<]+?)(?:\s*<[^`>]*>)?`"), r"\1"),  # :class:`~Name`, :ref:`text <target>`
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_+"), r"\1"),  # `text <address>`_
    (re.compile(r"``?([^`]+?)``?_?_?"), r"\1"),  # ``code`` and `name`
    (re.compile(r"\s*\[[\w.-]{1,12}\]_?"), ""),  # citations [1]_
    (re.compile(r"(?<!\w)\*{1,2}(?=\w)|(?<=\w)\*{1,2}(?!\w)"), ""),  # *emphasis*
    (re.compile(r"\s+"), " "),
]
_WORD = re.compile(r"[A-Za-z][a-z]*(?:['-][a-z]+)*[.,;:!?)]*")
_CODE = re.compile(r"^(?:>>>|\.\.\.|\.\. |[:@$#|+=~^*-]|\d+[.)] |Traceback|import |from \S+ import )")


def clean_paragraph(paragraph: str) -> str | None:
    """A paragraph without markup on one line, or None when it is not prose."""
    lines = paragraph.splitlines()
    indents = {len(line) - len(line.lstrip()) for line in lines}
    if len(indents) > 1 or any(_CODE.match(line.lstrip()) for line in lines):
        return None  # definitions, lists, examples, tables
    text = " ".join(line.strip() for line in lines)
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    text = text.strip()
    text = re.sub(r"(?:: *)+$", ".", text)
    words = text.split()
    plain = sum(1 for word in words if _WORD.fullmatch(word.strip("\"'(")))
    if len(words) < 8 or not text[0].isupper() or text[-1] not in ".!?" or plain < 0.8 * len(words):
        return None
    return text if text.isascii() else None


def prose(text: str) -> list[str]:
    """The paragraphs of a text that are prose."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(text.expandtabs()))
    return [clean for paragraph in paragraphs if (clean := clean_paragraph(paragraph))]


def module_prose(path: Path) -> list[str]:
    """The prose in the docstrings, and in other triple-quoted strings, of a source file."""
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    found: list[str] = []
    for literal in _LITERAL.finditer(source):
        if "f" not in literal["prefix"].lower() and "b" not in literal["prefix"].lower():
            found += prose(_value(literal[0]))
    return found


def _value(literal: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            return str(ast.literal_eval(literal))
    except (SyntaxError, ValueError):
        return ""


def source_files() -> Iterator[Path]:
    """Sources of the standard library and of PACKAGES, in a fixed order."""
    roots = [Path(sysconfig.get_path("stdlib"))]
    for name in PACKAGES:
        spec = find_spec(name)
        if spec is not None:
            roots += [Path(place) for place in spec.submodule_search_locations or ()]
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if not _SKIPPED.intersection(path.relative_to(root).parts):
                yield path


def documents(groups: Iterable[list[str]]) -> Iterator[str]:
    """One document a group, a paragraph per line, without paragraphs that came before."""
    seen: set[bytes] = set()
    for paragraphs in groups:
        new = []
        for paragraph in paragraphs:
            digest = hashlib.sha1(re.sub(r"\W+", " ", paragraph.lower()).encode()).digest()
            if digest not in seen:
                seen.add(digest)
                new.append(paragraph)
        if sum(map(len, new)) >= 200:
            yield "\n".join(new)


def collect() -> list[str]:
    """All documents, in a fixed random order."""
    with ProcessPoolExecutor() as pool:
        modules = pool.map(module_prose, source_files(), chunksize=32)
        found = list(documents([*(prose(text) for _, text in sorted(topics.items())), *modules]))
    random.Random(0).shuffle(found)
    return found


@command("collect_python_text")
def main() -> int:
    """Write the corpus: a paragraph per line, a blank line between documents."""
    parser = argparse.ArgumentParser(description="Collect English prose from the Python installation.")
    parser.add_argument("output", type=Path, help="text file to write")
    output = parser.parse_args().output
    found = collect()
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, "\n\n".join(found) + "\n")
    words = sum(len(document.split()) for document in found)
    print(f"{output}: {len(found):,} documents, {words:,} words, {output.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
