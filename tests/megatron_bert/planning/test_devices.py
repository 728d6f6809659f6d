# SPDX-License-Identifier: Apache-2.0
"""Files of devices and networks hold what devices and networks can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_bert.planning.devices import DEVICES, Device, Link, load_device, load_network
from parallel.errors import UserError

DEVICE = DEVICES["cpu"].model_dump()
LINK = {"gigabytes_per_second": 1.0, "latency_microseconds": 1.0}
#: Settings that are numbers, by a device's and a link's.
OF_DEVICE, OF_LINK = (
    [name for name, field in kind.model_fields.items() if field.annotation in (int, float, int | None, float | None)]
    for kind in (Device, Link)
)
SHARES = ("processor_share", "product_share", "attention_share", "attention_dropout_share", "memory_share")


def refusal(folder: Path, content: Any, *, network: bool = False) -> str:
    path = folder / "mine.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(UserError) as refused:
        load_network(path) if network else load_device(str(path))
    return str(refused.value).removeprefix(f"{path}")


@pytest.mark.parametrize("name", [*OF_DEVICE, "peak_tflops"])
@pytest.mark.parametrize("value", [-1.0, 7.5e13, float("nan"), float("inf"), True])
def test_numbers_of_devices_have_ranges(name: str, value: float, tmp_path: Path) -> None:
    wanted = {"float32": value} if name == "peak_tflops" else value
    assert name in refusal(tmp_path, {"device": DEVICE | {name: wanted}})
    if name in SHARES:
        assert name in refusal(tmp_path, DEVICE | {name: 1.1})


@pytest.mark.parametrize("name", [*OF_LINK, "latency_by_ranks"])
@pytest.mark.parametrize("value", [-1.0, 7.5e13, float("nan"), float("inf"), True])
def test_numbers_of_links_have_ranges(name: str, value: float, tmp_path: Path) -> None:
    """Also of those for a kind of message, and for a number of ranks."""
    link = LINK | {name: {2: value} if name == "latency_by_ranks" else value}
    assert name in refusal(tmp_path, link, network=True)
    assert name in refusal(tmp_path, {"link": LINK | {"by_kind": {"send": link}}}, network=True)
    assert name in refusal(tmp_path, DEVICE | {"link": link})
    if name in SHARES:
        assert name in refusal(tmp_path, LINK | {name: 7}, network=True)
        assert name in refusal(tmp_path, LINK | {"by_ranks": {2: LINK | {name: 7}}}, network=True)


@pytest.mark.parametrize("name", ["name", "note"])
def test_what_is_printed_is_printable(name: str, tmp_path: Path) -> None:
    assert f"{name}: Value error, it has characters that cannot be printed" in refusal(
        tmp_path, DEVICE | {name: "red\x1b[31m"}
    )


def test_no_more_ranks_compute_at_once_than_there_are(tmp_path: Path) -> None:
    assert "ranks_at_once 9 is above devices_per_node 8" in refusal(tmp_path, DEVICE | {"ranks_at_once": 9})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("device: [", " is not valid YAML: expected the node content, but found '<stream end>' in line 1, column 10"),
        ("link: {a: 1,\n  b: [}", " is not valid YAML: "),
        ("name: a\nname: b", " is not valid YAML: name is set twice: remove one of the two in line 2, column 1"),
        ("- 1", " holds a list, not a mapping of sections: write it with `megatron-bert bench`"),
        ("\0", " is not valid YAML: unacceptable character"),
        ("", ": name: Field required; write it with `megatron-bert bench`"),
    ],
)
def test_what_is_no_such_file_is_said_in_a_sentence(content: str, says: str, tmp_path: Path) -> None:
    said = refusal(tmp_path, content)
    assert said.startswith(says)
    assert said.isprintable()
