# SPDX-License-Identifier: Apache-2.0
"""The doctor's judgment of made-up machines and links, and an examination of real processes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_bert.cli import main
from megatron_bert.launching.doctor.examination import examine
from megatron_bert.launching.doctor.findings import Finding
from megatron_bert.launching.doctor.machine import Machine, compare
from megatron_bert.launching.doctor.network import judge_clocks, judge_links, rounds_of_pairs
from megatron_bert.launching.doctor.storage import check_storage
from parallel.process_group import World
from tests.worlds import CPU, run_world

MACHINE = Machine(
    host="n0",
    versions={"torch": "2.13", "driver": "570"},
    gpus=["H100"] * 8,
    gpu_memory=(79 * 2**30, 80 * 2**30),
    open_files=2**20,
    shared_memory=2**36,
)
HOSTS = [f"n{number}" for number in range(6)]


def machines(*changed: Machine) -> list[Machine]:
    return [replace(MACHINE, host=f"n{number}") for number in range(3)] + list(changed)


def poor(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.grade, finding.text) for finding in findings if finding.grade != "ok"]


class TestMachines:
    def test_alike(self) -> None:
        findings = compare(machines())
        assert poor(findings) == []
        assert "8 x H100 on each host" in [finding.text for finding in findings]

    def test_versions_differ(self) -> None:
        other = replace(MACHINE, host="n3", versions={"torch": "2.12", "driver": "550"})
        first, second = poor(compare(machines(other)))
        assert first[0] == "failed"
        assert first[1].startswith("torch differs: 2.13 on n0, n1, n2; 2.12 on n3;")
        assert second[0] == "warning"

    def test_a_gpu_is_missing(self) -> None:
        ((grade, text),) = poor(compare(machines(replace(MACHINE, host="n3", gpus=["H100"] * 7))))
        assert grade == "failed"
        assert "on n3" in text

    def test_memory_is_taken(self) -> None:
        ((grade, text),) = poor(compare(machines(replace(MACHINE, host="n3", gpu_memory=(2**30, 80 * 2**30)))))
        assert grade == "warning"
        assert text.startswith("rank 3 on n3 has 1.0 of 80.0 GiB free")

    def test_limits(self) -> None:
        texts = poor(compare(machines(replace(MACHINE, host="n3", open_files=1024, shared_memory=2**26))))
        assert [text.split(" on n3: ")[0] for _, text in texts] == [
            "open files are limited to 1024",
            "/dev/shm has 64 MiB",
        ]


class TestLinks:
    @pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
    def test_every_pair_once_and_no_host_twice_at_a_time(self, count: int) -> None:
        rounds = rounds_of_pairs(count)
        assert sorted(itertools.chain(*rounds)) == list(itertools.combinations(range(count), 2))
        for pairs in rounds:
            hosts = list(itertools.chain(*pairs))
            assert len(hosts) == len(set(hosts))

    def speeds(self, **slow: float) -> dict[tuple[int, int], float]:
        named = {tuple(int(part) for part in name[1:].split("_")): speed for name, speed in slow.items()}
        return {pair: named.get(pair, 10.0) for pair in itertools.combinations(range(6), 2)}

    def test_all_alike(self) -> None:
        (finding,) = judge_links(HOSTS, self.speeds(n1_4=8.0))
        assert finding.grade == "ok"
        assert "15 of 15 pairs of hosts, median 10.00 GB/s each way, slowest n1 <-> n4 8.00" in finding.text

    def test_one_link(self) -> None:
        (finding,) = judge_links(HOSTS, self.speeds(n1_4=2.0))
        assert finding.grade == "warning"
        assert finding.text.startswith("slow: n1 <-> n4 2.00 GB/s (")

    def test_one_host(self) -> None:
        (finding,) = judge_links(HOSTS, self.speeds(n0_3=1.0, n1_3=1.0, n2_3=1.5, n3_4=1.0, n3_5=1.0))
        assert finding.text.startswith("n3 is slow: 1.00 to 1.50 GB/s to every other host")

    def test_two_links_of_a_host_that_is_well(self) -> None:
        (finding,) = judge_links(HOSTS, self.speeds(n1_4=2.0, n1_5=1.0))
        assert finding.text.startswith("slow: n1 <-> n5 1.00 GB/s, n1 <-> n4 2.00 GB/s")


def test_clocks() -> None:
    assert judge_clocks(HOSTS[:3], [0.0, 0.001, -0.2])[0].grade == "ok"
    (finding,) = judge_clocks(HOSTS[:3], [0.0, 0.1, -7.0])
    assert (finding.grade, finding.text.split(";")[0]) == ("warning", "off: n2 by -7.0 s")
    # The first host's own clock may be the wrong one.
    assert judge_clocks(HOSTS[:3], [0.0, 5.0, 5.0])[0].text.startswith("off: n0 by -5.0 s")


def world() -> World:
    return World(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=0, device=CPU)


def examination(folder: Path) -> list[Finding]:
    import os

    os.environ["SLURMD_NODENAME"] = f"n{dist.get_rank() // 2}"  # two ranks on each of three hosts
    return examine(world(), folder / "runs", megabytes=1)


def test_several_hosts(tmp_path: Path) -> None:
    reports = run_world(6, examination, tmp_path)
    assert all(report == reports[0] for report in reports)
    checks = [finding.check for finding in reports[0]]
    assert [name for name in ("all-reduce", "links", "clocks") if name in checks] == ["all-reduce", "links", "clocks"]
    assert "6 on 3 hosts: n0, n1, n2" in [finding.text for finding in reports[0]]
    assert [finding for finding in reports[0] if finding.grade == "failed"] == []
    assert list((tmp_path / "runs").iterdir()) == []


def blind(folder: Path) -> list[Finding]:
    """Rank 1 looks at another directory of the same name, as on a disk of its own."""
    import os

    from megatron_bert.launching.doctor import storage

    storage._PATIENCE = 0.2
    os.environ["SLURMD_NODENAME"] = f"n{dist.get_rank()}"
    return check_storage(folder / ("own" if dist.get_rank() else "first"))


def test_files_that_are_not_shared(tmp_path: Path) -> None:
    findings = run_world(2, blind, tmp_path)[0]
    assert findings[0].grade == "failed"
    assert "is not shared: n1 do not see" in findings[0].text


def test_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert main(["doctor", "--dir", str(tmp_path / "runs"), "--device", "cpu"]) == 0
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert f"{tmp_path / 'runs'} can be written" in out
    assert "all-reduce" not in out


def test_directory_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["doctor", "--dir", str(tmp_path / "file" / "runs"), "--device", "cpu"]) == 1
    assert "cannot be written by" in capsys.readouterr().out
