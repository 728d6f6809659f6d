# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import json

import pytest

from megatron_bert.planning.schedule_command import add_schedule_command
from parallel.errors import UserError


def run(*arguments):
    parser = argparse.ArgumentParser()
    add_schedule_command(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["schedule", *map(str, arguments)])
    parsed.func(parsed)


def test_one_schedule_prints_its_grid_and_numbers(capsys):
    run("--pipeline", 2, "--microbatches", 3, "--schedule", "1f1b")
    output = capsys.readouterr().out
    assert "rank 1|      1F0  1B0 -----" in output
    row = next(line.split() for line in output.splitlines() if line.startswith("1f1b"))
    assert row == ["1f1b", "1", "12", "25.0%", "25.0%", "2", "2", "6"]


def test_all_schedules_are_compared(capsys):
    run("--pipeline", 4, "--microbatches", 8, "--schedule", "all")
    output = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines() if "%" in line}
    assert rows == {
        "gpipe": ["1", "33", "27.3%", "27.3%", "8", "8", "48"],
        "1f1b": ["1", "33", "27.3%", "27.3%", "4", "4", "48"],
        "interleaved-1f1b": ["2", "28.5", "15.8%", "15.8%", "5.5", "5.5", "112"],
        "zero-bubble-h1": ["1", "27", "11.1%", "11.1%", "4", "4", "48"],
        "zero-bubble-v": ["2", "25.5", "5.9%", "5.9%", "4", "4", "96"],
    }
    assert "rank 0|" not in output


def test_virtual_stages_apply_where_there_is_a_choice(capsys):
    run("--pipeline", 4, "--microbatches", 8, "--schedule", "1f1b,interleaved-1f1b", "--virtual-stages", 4)
    rows = {line.split()[0]: line.split()[1:4] for line in capsys.readouterr().out.splitlines() if "%" in line}
    assert rows == {"1f1b": ["1", "33", "27.3%"], "interleaved-1f1b": ["4", "26.25", "8.6%"]}


def test_costs_and_communication(capsys):
    run("--pipeline", 2, "--microbatches", 1, "--schedule", "gpipe", "--costs", "1,2,3", "--communication", 0.5)
    assert next(line for line in capsys.readouterr().out.splitlines() if "%" in line).split()[2] == "13"


def test_png_and_trace(tmp_path):
    png, trace = tmp_path / "chart.png", tmp_path / "trace.json"
    run("--pipeline", 2, "--microbatches", 2, "--schedule", "gpipe", "--png", png, "--trace", trace)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert any(event["name"] == "1B1" for event in json.loads(trace.read_text())["traceEvents"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "1f2b"], "unknown pipeline schedule '1f2b': choose one of gpipe"),
        (["--schedule", "1f1b,"], "unknown pipeline schedule ''"),
        (["--schedule", "1f1b", "--virtual-stages", "2"], "takes exactly 1"),
        (["--schedule", "gpipe,1f1b", "--virtual-stages", "2"], "none of gpipe, 1f1b has a choice"),
        (["--schedule", "1f1b", "--microbatches", "0"], "given 0 microbatches"),
        (
            ["--schedule", "1f1b", "--microbatches", "10000000"],
            "given 10,000,000 microbatches on 4 stages: a step has 262,144",
        ),
        (["--schedule", "1f1b", "--costs", "1,2"], "give three numbers F,B,W"),
        (["--schedule", "1f1b", "--costs", "1,x,2"], "give three numbers F,B,W"),
        (["--schedule", "1f1b", "--costs", "1,-1,2"], "give three times above 0"),
        (["--schedule", "1f1b", "--communication", "-1"], "communication costs were given as -1"),
        (["--schedule", "all", "--trace", "trace.json"], "--trace writes one schedule and 5 were named"),
        (["--schedule", "1f1b", "--png", "a", "--trace", "./a"], "--trace a is the file of --png, too"),
        (["--schedule", "1f1b", "--png", "no/such/folder/chart.png"], "cannot be written: name a file in a folder"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(arguments, message, capsys):
    with pytest.raises(UserError, match=message):
        run("--pipeline", "4", "--microbatches", "8", *arguments)
    assert capsys.readouterr().out == ""
