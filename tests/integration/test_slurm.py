# SPDX-License-Identifier: Apache-2.0
"""Runs on a private Slurm, disturbed in every way it knows, end with the weights of a run that nobody disturbed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from parallel.checkpoint import latest_checkpoint
from tests.integration.cluster_support import need, once, shared_folder
from tests.integration.slurm_cluster import CORES, PROGRAMS
from tests.integration.slurm_runs import DOCUMENTED, HOLD_STEP, STEPS, run_everything
from tests.megatron_bert.training.runs import assert_same_checkpoint, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, testrun_uid: str) -> Path:
    """Of all runs. Whichever worker comes first makes them, all at once; they outlive the cluster."""
    need(PROGRAMS, "slurmctld slurmd slurm-client munge")
    return once(shared_folder(tmp_path_factory) / f"slurm-{testrun_uid}", run_everything)


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def output(folder: Path, name: str) -> str:
    """What the jobs of a run wrote, first to last."""
    return "".join(path.read_text() for path in sorted((folder / name / "logs").glob("slurm-*.out")))


def assert_undisturbed(folder: Path, name: str, ranks: int) -> None:
    """Every step once, in order, with its losses, and the final checkpoint, equal to the last bit."""
    whole = folder / f"whole_{ranks}"
    assert rows(folder / name) == rows(whole)
    assert [row["step"] for row in rows(whole)] == [*range(1, STEPS + 1), STEPS]
    mine, theirs = (latest_checkpoint(run / "checkpoints") for run in (folder / name, whole))
    assert mine is not None
    assert theirs is not None
    assert mine.name == theirs.name == f"step_{STEPS:08d}"
    assert_same_checkpoint(mine, theirs)
    assert not (folder / name / "stopped.json").exists()


def assert_completed(record: dict[str, Any]) -> None:
    assert (record["JobState"], record["ExitCode"]) == ("COMPLETED", "0:0")


def test_time_limit_on_two_nodes_by_torchrun(folder: Path, results: dict[str, Any]) -> None:
    (job,) = results["time_limit"]
    assert_completed(job)
    assert int(job["Restarts"]) == 1
    text = output(folder, "time_limit")
    assert "asked to stop; the ranks save a checkpoint" in text
    assert "stopped by SIGUSR1 after step" in text
    assert text.count("there is more to do; requeued") == 1
    assert text.count("resuming from time_limit/checkpoints/step_") == 1
    assert_undisturbed(folder, "time_limit", 2)


def test_preemption_of_two_nodes_by_srun(folder: Path, results: dict[str, Any]) -> None:
    low = results["preemption"][1]
    assert_completed(low)
    assert int(low["Restarts"]) == 1
    text = output(folder, "preempted")
    assert "DUE TO PREEMPTION" in text
    assert f"stopped by SIGTERM after step {HOLD_STEP}" in text
    assert f"resuming from preempted/checkpoints/step_{HOLD_STEP:08d}" in text
    assert_undisturbed(folder, "preempted", 2)


def test_four_nodes_by_torchrun(folder: Path, results: dict[str, Any]) -> None:
    high = results["preemption"][0]
    assert_completed(high)
    assert (high["Restarts"], high["Partition"]) == ("0", "high")
    assert_undisturbed(folder, "preempting", 4)


def test_node_down_with_two_processes_a_node_by_srun(folder: Path, results: dict[str, Any]) -> None:
    lost, job, _ = results["lost_node"]
    assert_completed(job)
    assert int(job["Restarts"]) == 1
    text = output(folder, "lost_node")
    assert f"Node failure on {lost['lost']}" in text
    assert f"resuming from lost_node/checkpoints/step_{HOLD_STEP:08d}" in text
    starts = [line for line in text.splitlines() if ": pretrain on 2 of 2 nodes" in line]
    assert len(starts) == 2
    assert_undisturbed(folder, "lost_node", 4)


def test_fewer_nodes_than_asked_for(folder: Path, results: dict[str, Any]) -> None:
    # Of four nodes one is down, and one may still be cleaning up; on three the batch would not come out even.
    assert_completed(results["lost_node"][2])
    assert re.search(r": pretrain on 2 of [23] nodes", output(folder, "elastic"))
    assert_undisturbed(folder, "elastic", 2)


def test_rank_that_fails_is_named_and_started_again(folder: Path, results: dict[str, Any]) -> None:
    (job,) = results["failure"]
    assert_completed(job)
    assert job["Restarts"] == "0"  # within the job
    text = output(folder, "failure")
    lines = text.splitlines()
    (index,) = [i for i, line in enumerate(lines) if line.startswith("failed first: ")]
    assert lines[index].startswith("failed first: rank 1 on n")
    assert lines[index].endswith("ArithmeticError: this rank fails here")
    assert lines[index + 3].startswith("lost the connection after it: rank 0 on n")
    logs = folder / "failure" / "logs"
    assert "this rank fails here" in next(logs.glob("*.0/rank_00001.log")).read_text()
    assert "raise ArithmeticError" not in text  # rank 0 alone is in the output of the job, and names what it heard of
    assert_undisturbed(folder, "failure", 2)


@pytest.mark.parametrize(("index", "style"), [(0, "srun"), (1, "torchrun")])
def test_what_is_refused_is_started_once(folder: Path, results: dict[str, Any], index: int, style: str) -> None:
    """Under a directory with a space, too."""
    job = results["refusal"][index]
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
    text = output(folder, f"refused by {style}")
    assert text.count("another start would not help: it was refused with the sentence above") == 1
    (record,) = (folder / f"refused by {style}" / "logs").glob("*.0/rank_00000.jsonl")
    assert record.read_text().count('"started"') == 1


def test_array_of_parts_of_one_run(folder: Path, results: dict[str, Any]) -> None:
    parts = results["arrays"][:3]
    for part in parts:
        assert_completed(part)
    text = output(folder, "chain")
    # Where the machine is slow, the clock comes before the step that the first part would wait in.
    stopped = re.search(r"stopped by training.max_minutes after step (\d+)", text)
    assert stopped is not None
    assert f"resuming from chain/checkpoints/step_{int(stopped[1]):08d}" in text
    assert "requeued" not in text
    assert_undisturbed(folder, "chain", 1)


def test_array_of_runs(folder: Path, results: dict[str, Any]) -> None:
    losses = []
    for task, record in zip((8, 7), results["arrays"][3:], strict=True):
        assert_completed(record)
        found = rows(folder / "sweep" / str(task))
        assert len(found) == STEPS + 1
        losses.append(found[0]["loss"])
    assert losses[0] != losses[1]


def test_batch_script_of_the_checkout(folder: Path, results: dict[str, Any]) -> None:
    assert_completed(results["without_submit"][0])
    assert_undisturbed(folder, "by_hand", 1)


def test_doctor_as_tasks_of_srun(results: dict[str, Any]) -> None:
    report = results["without_submit"][1]["doctor"]
    assert "ok      processes     2 on 2 hosts: n14, n15" in report
    assert "1 of 1 pairs of hosts" in report


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_scripts_are_accepted(results: dict[str, Any], name: str) -> None:
    code, said = results["documented_scripts"][name]
    assert code == 0, said
    assert f"using {DOCUMENTED[name] * CORES} processors" in said  # whole nodes


def test_a_corpus_in_parts(folder: Path, results: dict[str, Any]) -> None:
    for job in results["corpus"]:
        assert_completed(job)
    assert sum(int(job["Restarts"]) for job in results["corpus"]) == 1, "of the part that was killed"
    place = folder / "corpus" / "out"
    for suffix in (".bin", ".idx", ".json"):
        parts, whole = (place / f"{name}_text_sentence{suffix}" for name in ("apart", "whole"))
        assert parts.read_bytes() == whole.read_bytes()
