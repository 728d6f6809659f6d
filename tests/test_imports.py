# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: torch <- parallel <- megatron_bert <- tools, launch <- benchmarks, tests; and no cycles."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tools.import_graph import modules_of

ROOT = Path(__file__).resolve().parents[1]

#: Package or folder -> what of this project it may import.
MAY_IMPORT = {
    "parallel": {"parallel"},
    "megatron_bert": {"parallel", "megatron_bert"},
    "tools": {"parallel", "megatron_bert", "tools"},
    "benchmarks": {"parallel", "megatron_bert", "tools", "benchmarks"},
    "launch": {"parallel", "megatron_bert", "launch"},
    "tests": {"parallel", "megatron_bert", "tools", "benchmarks", "tests"},
}
#: Room of megatron_bert -> rooms it may not import, directly or through others.
FORBIDDEN = {
    "model": {"config", "config_checks", "config_file", "data", "tasks", "training", "finetuning", "cli"},
    "data": {"training", "cli"},
    "tasks": {"training", "finetuning", "cli"},
    "training": {"tasks", "finetuning", "launching", "cli"},
    "finetuning": {"cli"},
    "convert": {"training", "cli"},
    "family": {"training", "cli"},
    "ibert": {"tasks", "training", "finetuning", "cli"},
    "config": {"training", "cli"},
    "config_checks": {"training", "cli"},
}

#: The same of the project's own files, which are parsed once for all tests.
imports_of = functools.cache(modules_of)


def reverse_edges(folder: str, modules: dict[str, set[str]]) -> list[str]:
    """Imports against the direction the project fixes."""
    refused = MAY_IMPORT.keys() - MAY_IMPORT[folder]
    return [
        f"{module} imports {imported}"
        for module, imports in modules.items()
        for imported in sorted(imports)
        if imported.split(".")[0] in refused
    ]


def room(module: str, package: str) -> str | None:
    """The first name below the package: a sub-package, or a module beside them; None for anything else."""
    parts = module.split(".")
    return parts[1] if parts[0] == package and len(parts) > 1 else None


def room_graph(package: str, modules: dict[str, set[str]]) -> dict[str, set[str]]:
    """Room -> other rooms it imports."""
    graph: dict[str, set[str]] = {}
    for module, imports in modules.items():
        here = room(module, package)
        if here is not None:
            graph.setdefault(here, set()).update({there for i in imports if (there := room(i, package))} - {here})
    return {here: {there for there in rooms if there in graph} for here, rooms in graph.items()}


def module_graph(modules: dict[str, set[str]]) -> dict[str, set[str]]:
    """Module -> modules of the same set it imports (a name imported from a module counts as the module)."""

    def resolve(name: str) -> str | None:
        return name if name in modules else name.rpartition(".")[0] if name.rpartition(".")[0] in modules else None

    return {module: {found for i in imports if (found := resolve(i))} - {module} for module, imports in modules.items()}


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """Everything that ``start`` imports, directly or through others."""
    seen: set[str] = set()
    pending = [start]
    while pending:
        fresh = graph.get(pending.pop(), set()) - seen
        seen |= fresh
        pending.extend(fresh)
    return seen


def in_cycles(graph: dict[str, set[str]]) -> list[str]:
    """Members of cycles."""
    return sorted(node for node in graph if node in reachable(graph, node))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_no_import_against_the_direction(folder):
    assert reverse_edges(folder, imports_of(folder)) == []


@pytest.mark.parametrize("package", ["parallel", "megatron_bert"])
def test_rooms_import_one_way(package):
    assert in_cycles(room_graph(package, imports_of(package))) == []


@pytest.mark.parametrize("package", ["parallel", "megatron_bert"])
def test_modules_import_one_way(package):
    """Not for types either."""
    assert in_cycles(module_graph(imports_of(package))) == []


@pytest.mark.parametrize("here", FORBIDDEN)
def test_rooms_do_not_look_up(here):
    graph = room_graph("megatron_bert", imports_of("megatron_bert"))
    assert here in graph, "the room was renamed: rename it in FORBIDDEN too"
    assert reachable(graph, here) & FORBIDDEN[here] == set()


def test_tasks_load_without_torch():
    """Numpy is enough for files, labels and metrics."""
    modules = imports_of("parallel") | imports_of("megatron_bert")
    tasks = {module for module in modules if module.startswith("megatron_bert.tasks")}
    graph = module_graph(modules)
    below = tasks.union(*(reachable(graph, module) for module in tasks))
    large = {"torch", "transformers"}
    assert [module for module in below if large & {imported.split(".")[0] for imported in modules[module]}] == []


def test_nobody_imports_the_command_line():
    graph = room_graph("megatron_bert", imports_of("megatron_bert"))
    assert [here for here, rooms in graph.items() if "cli" in rooms and here not in {"__main__", "cli"}] == []


def test_settings_are_read_without_what_takes_long_to_load():
    """DTensor and FSDP, which commands that only read settings do not need."""
    modules = imports_of("parallel") | imports_of("megatron_bert")
    assert (
        reachable(module_graph(modules), "megatron_bert.config") & {"parallel.data_parallel", "parallel.sharding"}
        == set()
    )


def test_the_walk_sees_what_it_should(tmp_path):
    package = tmp_path / "parallel"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "__init__.py").write_text("from . import leaf\nfrom ..mesh import x\n")
    (package / "inner" / "leaf.py").write_text("def f():\n    import megatron_bert.cli\n")
    (package / "mesh.py").write_text("from parallel.inner.leaf import f\nimport torch\n")
    modules = modules_of("parallel", tmp_path)
    assert modules["parallel.inner"] == {"parallel.inner.leaf", "parallel.mesh.x"}
    assert reverse_edges("parallel", modules) == ["parallel.inner.leaf imports megatron_bert.cli"]
    assert in_cycles(room_graph("parallel", modules)) == ["inner", "mesh"]
    assert in_cycles(module_graph(modules)) == []
    (package / "inner" / "leaf.py").write_text("from parallel import mesh\n")
    assert in_cycles(module_graph(modules_of("parallel", tmp_path))) == ["parallel.inner.leaf", "parallel.mesh"]
    (package / "inner" / "leaf.py").write_text("if TYPE_CHECKING:\n    from parallel import mesh\n")
    assert in_cycles(module_graph(modules_of("parallel", tmp_path))) == ["parallel.inner.leaf", "parallel.mesh"]
