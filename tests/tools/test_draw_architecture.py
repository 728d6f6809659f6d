# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from tools.draw_architecture import arrows, picture, reachable, room_graph, rows
from tools.import_graph import ROOT


def test_the_picture_is_that_of_the_sources() -> None:
    again = "run python -m tools.draw_architecture docs/images/architecture.svg"
    assert (ROOT / "docs" / "images" / "architecture.svg").read_text(encoding="utf-8") == picture(), again


def test_what_is_drawn() -> None:
    graph = {"a": {"b", "c", "d"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert reachable(graph) == {"a": {"b", "c", "d"}, "b": {"b", "c", "d"}, "c": {"b", "c", "d"}, "d": set()}
    assert rows(graph) == [["d"], ["b", "c"], ["a"]]
    assert arrows(graph) == [("a", "b"), ("a", "c"), ("b", "c"), ("c", "b"), ("c", "d")]
    assert reachable(dict(arrows_as_graph(graph))) == reachable(graph), "nothing is lost"


def arrows_as_graph(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    drawn: dict[str, set[str]] = {name: set() for name in graph}
    for name, imported in arrows(graph):
        drawn[name].add(imported)
    return drawn


def test_the_rows_are_those_of_the_design() -> None:
    levels = rows(room_graph())
    assert levels[0] == ["parallel"]
    assert levels[-1] == ["megatron_bert.cli"]
