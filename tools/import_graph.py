# SPDX-License-Identifier: Apache-2.0
"""Which modules of this project import which, read from their sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def imported_modules(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Every module that ``source`` imports anywhere, also in functions or for types; relative ones made absolute.

    ``from a.b import c`` gives ``a.b.c``, whether c is a module or a name in one.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                kept = len(parents) - node.level + is_package
                base = ".".join(filter(None, [*parents[:kept], base]))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def modules_of(folder: str, root: Path = ROOT) -> dict[str, set[str]]:
    """Module name -> modules it imports, for all of a package or folder."""
    modules = {}
    for path in sorted((root / folder).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules[name] = set(imported_modules(path.read_text(encoding="utf-8"), name, is_package))
    return modules
