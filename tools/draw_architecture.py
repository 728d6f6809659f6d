# SPDX-License-Identifier: Apache-2.0
"""The packages of this project and who imports whom, drawn from the sources, and their list in CONTRIBUTING.md.

    python -m tools.draw_architecture

A box is a package, with the first line of its documentation; modules beside the packages of `megatron_bert` stand
together. A box imports those that its arrows lead down to, directly or through others. Packages that import each other
share a row.
"""

from __future__ import annotations

import argparse
import ast
import sys
from html import escape
from pathlib import Path
from textwrap import wrap

import networkx as nx

from parallel.whole_files import write_text
from tools.import_graph import ROOT, modules_of

WIDTH, BOX, HEIGHT, GAP, MARGIN = 1180, 176, 62, 44, 20
COLORS = {"parallel": "#dbe9f6", "megatron_bert": "#e4f1df", "tools": "#fbe8d3", "launch": "#fbe8d3"}

PICTURE, GUIDE = ROOT / "docs" / "images" / "architecture.svg", ROOT / "CONTRIBUTING.md"
#: Around the list of packages in CONTRIBUTING.md.
BEGIN, END = "<!-- packages: written by tools/draw_architecture.py -->", "<!-- end of packages -->"

Graph = dict[str, set[str]]


def room_of(module: str, packages: set[str]) -> str:
    """The box of a module: its package below `megatron_bert`, or its top-level package."""
    parts = module.split(".")
    if parts[0] != "megatron_bert":
        return parts[0]
    if len(parts) > 1 and ".".join(parts[:2]) in packages:
        return ".".join(parts[:2])
    return "megatron_bert.cli" if module in ("megatron_bert.cli", "megatron_bert.__main__") else "megatron_bert.config"


def room_graph(root: Path = ROOT) -> Graph:
    """Box -> boxes it imports."""
    modules = {
        name: imports
        for folder in ("parallel", "megatron_bert", "tools")
        for name, imports in modules_of(folder, root).items()
    }
    packages = {f"megatron_bert.{path.parent.name}" for path in (root / "megatron_bert").glob("*/__init__.py")}
    graph: Graph = {}
    for name, imports in modules.items():
        # What megatron_bert itself offers comes from its packages, on demand.
        if name in ("megatron_bert", "parallel"):
            continue
        own = graph.setdefault(room_of(name, packages), set())
        for imported in imports:
            if imported.split(".")[0] in ("parallel", "megatron_bert", "tools"):
                own.add(room_of(imported, packages))
    return {name: found - {name} for name, found in sorted(graph.items())}


def reachable(graph: Graph) -> Graph:
    """Box -> all boxes it imports, directly or through others."""
    found = nx.transitive_closure(nx.DiGraph(graph))
    return {name: set(found[name]) for name in graph}


def rows(graph: Graph) -> list[list[str]]:
    """Boxes from the lowest row up; those that import each other are in one row."""
    mutual = nx.condensation(nx.DiGraph(graph))
    levels = nx.topological_generations(mutual.reverse())
    return [sorted(name for group in level for name in mutual.nodes[group]["members"]) for level in levels]


def arrows(graph: Graph) -> list[tuple[str, str]]:
    """Imports that no chain of others implies, from the importing box to the imported one."""
    below = reachable(graph)

    def implied(name: str, imported: str) -> bool:
        others = graph[name] - {imported}
        return any(imported in below[one] and one not in below[imported] and name not in below[one] for one in others)

    return [(name, one) for name, imports in graph.items() for one in sorted(imports) if not implied(name, one)]


def description(room: str, root: Path = ROOT) -> str:
    """The first line of a package's documentation."""
    special = {"megatron_bert.cli": "the command line", "megatron_bert.config": "settings, and what all packages share"}
    if room in special:
        return special[room]
    path = root.joinpath(*room.split("."), "__init__.py")
    if not path.is_file():
        return "scripts for those who operate the project"
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0].rstrip(".")


def room_list(root: Path = ROOT) -> str:
    """All packages with the first lines of their documentation, in Markdown; those inside of others are indented."""
    folders = [
        path.parent.relative_to(root)
        for top in ("parallel", "megatron_bert")
        for path in (root / top).rglob("__init__.py")
    ]
    lines = []
    for folder in sorted(folders, key=lambda path: (path.parts[0] != "parallel", path.parts)):
        room = ".".join(folder.parts)
        depth = len(folder.parts) - (2 if folder.parts[0] == "megatron_bert" and len(folder.parts) > 1 else 1)
        lines.append(f"{'  ' * depth}- `{folder}/`: {description(room, root)}.\n")
    return "".join(lines)


def with_rooms(guide: str, root: Path = ROOT) -> str:
    """The text of CONTRIBUTING.md with the list as it should be, between the marks."""
    before, after = guide.split(BEGIN)[0], guide.split(END)[1]
    return f"{before}{BEGIN}\n{room_list(root)}{END}{after}"


def picture(root: Path = ROOT) -> str:
    """The drawing, as SVG."""
    graph = room_graph(root)
    levels = rows(graph)
    places: dict[str, tuple[float, float]] = {}
    total = MARGIN * 2 + len(levels) * (HEIGHT + GAP) - GAP
    for number, names in enumerate(levels):
        step = WIDTH / len(names)
        for column, name in enumerate(names):
            places[name] = step * (column + 0.5), total - MARGIN - HEIGHT - number * (HEIGHT + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" font-family="sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#777"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{total}" fill="white"/>',
    ]
    for name, imported in arrows(graph):
        (x, y), (to_x, to_y) = places[name], places[imported]
        if y == to_y:  # of those that import each other
            sign = 1 if to_x > x else -1
            ends = f"M{x + sign * BOX / 2:.0f} {y + HEIGHT / 2:.0f}L{to_x - sign * BOX / 2:.0f} {to_y + HEIGHT / 2:.0f}"
        else:
            middle = (y + HEIGHT + to_y) / 2
            ends = f"M{x:.0f} {y + HEIGHT:.0f}C{x:.0f} {middle:.0f} {to_x:.0f} {middle:.0f} {to_x:.0f} {to_y:.0f}"
        parts.append(f'<path d="{ends}" fill="none" stroke="#999" stroke-width="1.2" marker-end="url(#tip)"/>')
    for name, (x, y) in places.items():
        look = f'rx="6" fill="{COLORS[name.split(".")[0]]}" stroke="#888"'
        parts.append(f'<rect x="{x - BOX / 2:.0f}" y="{y:.0f}" width="{BOX}" height="{HEIGHT}" {look}/>')
        title = name.removeprefix("megatron_bert.")
        parts.append(
            f'<text x="{x:.0f}" y="{y + 15:.0f}" font-size="13" font-weight="bold" text-anchor="middle">{title}</text>'
        )
        for line, text in enumerate(wrap(description(name, root), 30, max_lines=3, placeholder=" ...")):
            place = f'x="{x:.0f}" y="{y + 29 + 12 * line:.0f}"'
            parts.append(f'<text {place} font-size="10.5" text-anchor="middle" fill="#333">{escape(text)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main(given: list[str] | None = None) -> int:
    """Write both files of the checkout."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(given)
    write_text(PICTURE, picture())
    write_text(GUIDE, with_rooms(GUIDE.read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
