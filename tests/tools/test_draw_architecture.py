# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from tools.draw_architecture import GUIDE, PICTURE, arrows, picture, reachable, room_graph, room_list, rows, with_rooms


def test_picture_and_list_are_those_of_the_sources() -> None:
    again = "run python -m tools.draw_architecture"
    assert PICTURE.read_text(encoding="utf-8") == picture(), again
    guide = GUIDE.read_text(encoding="utf-8")
    assert guide == with_rooms(guide), again


def test_every_package_says_what_it_is() -> None:
    lines = room_list().splitlines()
    assert (
        "- `megatron_bert/convert/`: Checkpoint conversion: everything Megatron BERT was ever saved as, in and out."
        in lines
    )
    assert any(line.startswith("  - `parallel/pipeline/`: ") for line in lines)
    assert not [line for line in lines if line.endswith(": .")]


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
