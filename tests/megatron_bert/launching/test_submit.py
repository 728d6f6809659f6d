# SPDX-License-Identifier: Apache-2.0
"""Jobs before they are queued: what is checked, and the script that comes of it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from megatron_bert.cli import main
from megatron_bert.launching.job import check_array, seconds_of
from megatron_bert.launching.slurm_environment import meeting_port
from megatron_bert.tables import RUNS
from parallel.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
CONFIG = str(ROOT / "configs" / "bert_345m.yaml")
SIZE = ["--nodes", "2", "--gpus-per-node", "8", "--time", "24:00:00"]


class Submit:
    """Runs `megatron-bert submit`."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def dry(self, *arguments: str) -> str:
        """The script of a dry run."""
        assert main(["submit", CONFIG, *arguments, "--dry-run"]) == 0
        return self.capsys.readouterr().out

    def refused(self, *arguments: str) -> str:
        assert main(["submit", CONFIG, *arguments]) == 2
        out, err = self.capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err


@pytest.fixture
def submit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Submit:
    monkeypatch.delenv("MEGATRON_BERT_SITE", raising=False)
    return Submit(capsys)


def options(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def values(script: str) -> dict[str, list[str]]:
    """What bash makes of the values in a script, with the number 5 for the task of an array."""
    lines = [line for line in script.split("# ---- from here")[0].splitlines() if not line.startswith("#")]
    names = [line.split("=")[0] for line in lines if line.split("=")[0].isupper()]
    shown = "".join(f"printf '%s\\0' {name} ${{{name}[@]+\"${{{name}[@]}}\"}}; echo;" for name in names)
    program = "module() { :; }\n" + "\n".join(lines) + "\n" + shown
    done = subprocess.run(
        ["bash", "-euc", program], env={**os.environ, "SLURM_ARRAY_TASK_ID": "5"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    words = [line.rstrip("\0").split("\0") for line in done.stdout.splitlines()]
    return {name: rest for name, *rest in words}


class TestScript:
    def test_options_and_values(self, submit: Submit) -> None:
        script = submit.dry("parallel.tensor=2", "data.train=a b", *SIZE, "--partition", "gpu", "--account", "lab")
        assert options(script) == [
            "--job-name=bert_345m",
            "--nodes=2",
            "--ntasks-per-node=1",
            "--gpus-per-node=8",
            "--exclusive",
            "--partition=gpu",
            "--account=lab",
            "--time=24:00:00",
            "--signal=B:USR1@300",
            "--requeue",
            "--open-mode=append",
            "--output=runs/bert_345m/logs/slurm-%j.out",
        ]
        found = values(script)
        assert found["OVERRIDES"] == ["parallel.tensor=2", "data.train=a b"]
        assert (found["NODE_COUNTS"], found["STYLE"], found["REQUEUE"]) == (["2"], ["torchrun"], ["1"])

    def test_its_comment_makes_it_again(self, submit: Submit) -> None:
        script = submit.dry("data.train=a b", *SIZE, "--style", "srun", "--dependency", "afterok:12", "--name", "x")
        command = shlex.split(script.splitlines()[1].removeprefix("# "))
        assert main([*command[1:], "--dry-run"]) == 0
        assert submit.capsys.readouterr().out == script

    def test_one_task_a_gpu(self, submit: Submit, tmp_path: Path) -> None:
        site = tmp_path / "site.yaml"
        site.write_text("cpus_per_gpu: 12\ngpu_request: gres\ngpu_type: h100\n")
        script = submit.dry(*SIZE, "--style", "srun", "--site", str(site))
        assert {"--ntasks-per-node=8", "--cpus-per-task=12", "--gres=gpu:h100:8"} <= set(options(script))
        assert "--exclusive" not in options(script)

    def test_site(self, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        site = tmp_path / "site.yaml"
        site.write_text(
            "partition: gpu\nqos: long\nmemory: 0\nmodules: [cuda/12, gcc]\nsetup: ['source \"$HOME\"/env']\n"
            "python: /opt/python\nnetwork_interface: ib0\nenvironment: {NCCL_DEBUG: WARN, FAST: true, N: 3, S: a b}\n"
            "container: {image: /img/bert.sif, runtime: apptainer, mounts: ['/data:/data']}\n"
            "options: [--mail-type=FAIL]\n"
        )
        monkeypatch.setenv("MEGATRON_BERT_SITE", str(site))
        script = submit.dry(*SIZE, "--partition", "other")
        assert {"--partition=other", "--qos=long", "--mem=0", "--mail-type=FAIL"} <= set(options(script))
        lines = script.splitlines()
        assert lines.index("module load cuda/12") < lines.index("module load gcc") < lines.index('source "$HOME"/env')
        for line in (
            "NCCL_DEBUG=WARN",
            "FAST=true",
            "N=3",
            "S='a b'",
            "GLOO_SOCKET_IFNAME=ib0",
            "NCCL_SOCKET_IFNAME=ib0",
        ):
            assert f"export {line}" in lines
        assert values(script.replace('source "$HOME"/env', ""))["CONTAINER"] == [
            *("apptainer", "exec", "--nv", "--bind", "/data:/data", "/img/bert.sif")
        ]

    def test_values_of_a_site_stay_as_written(self, submit: Submit, tmp_path: Path) -> None:
        site = tmp_path / "site.yaml"
        site.write_text("partition: 0123\naccount: 1:30\nqos: no\nconstraint: null\nenvironment: {A: yes, B: 010}\n")
        script = submit.dry(*SIZE, "--site", str(site))
        assert {"--partition=0123", "--account=1:30", "--qos=no"} <= set(options(script))
        assert "constraint" not in script
        assert "export A=yes" in script
        assert "export B=010" in script

    @pytest.mark.parametrize("run_dir", ["runs/my first", "it's", 'a "b" #1', "back\\slash", "100%j"])
    def test_run_directories_that_sbatch_would_take_apart(self, submit: Submit, run_dir: str) -> None:
        script = submit.dry(f"training.run_dir={run_dir}", *SIZE)
        assert values(script)["RUN_DIR"] == [run_dir]
        output = next(option for option in options(script) if "output=" in option)
        (word,) = shlex.split(output, comments=True)
        assert word == f"--output={run_dir.replace('%', '%%')}/logs/slurm-%j.out"

    def test_pyxis(self, submit: Submit, tmp_path: Path) -> None:
        site = tmp_path / "site.yaml"
        site.write_text("container: {image: 'lab/bert:1', mounts: ['/data:/data']}\nsrun_options: [--mpi=none]\n")
        found = values(submit.dry(*SIZE, "--site", str(site)))
        assert found["CONTAINER"] == []
        assert found["SRUN_OPTIONS"] == [
            *("--mpi=none", "--container-image=lab/bert:1", "--container-mounts=/data:/data")
        ]

    def test_fewer_nodes(self, submit: Submit) -> None:
        # 1024 samples in micro batches of 16 are 64 rounds, which 16 or 8 data ranks share, but not 24.
        script = submit.dry("--nodes", "4", "--min-nodes", "1", "--gpus-per-node", "8", "--time", "60")
        found = values(script)
        assert found["NODE_COUNTS"] == ["4", "2", "1"]
        assert found["OVERRIDES"] == ["parallel.elastic=true"]
        assert "--nodes=1-4" in options(script)

    def test_chain(self, submit: Submit) -> None:
        script = submit.dry(*SIZE, "--array", "0-9%1")
        assert {"--array=0-9%1", "--output=runs/bert_345m/logs/slurm-%A_%a.out"} <= set(options(script))
        assert values(script)["REQUEUE"] == ["0"]

    def test_array_of_runs(self, submit: Submit) -> None:
        script = submit.dry("training.run_dir=runs/seed %a", "training.seed=%a", *SIZE, "--array", "0-9")
        found = values(script)
        assert (found["RUN_DIR"], found["OVERRIDES"]) == (["runs/seed 5"], ["training.seed=5"])

    def test_bash_takes_it(self, submit: Submit, tmp_path: Path) -> None:
        path = tmp_path / "job.sbatch"
        path.write_text(submit.dry(*SIZE))
        subprocess.run(["bash", "-n", str(path)], check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", str(path)], check=True)

    def test_port_is_that_of_bare_srun(self, submit: Submit) -> None:
        (line,) = [line for line in submit.dry(*SIZE).splitlines() if line.startswith("port_of()")]
        program = f"SLURM_JOB_ID=987654 restarts=3; {line}; port_of 0; port_of 2"
        done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
        assert [int(text) for text in done.stdout.split()] == [meeting_port(987654, 3), meeting_port(987654, 5)]


class TestCommands:
    """The kinds of run beside pretraining, each with a settings file of its own."""

    SETTINGS: ClassVar = {
        "finetune": ROOT / "configs" / "finetune" / "classification.yaml",
        "quantize": ROOT / "configs" / "quantize" / "classification.yaml",
    }

    def test_all_are_known(self) -> None:
        assert list(RUNS) == ["pretrain", *self.SETTINGS]

    @pytest.mark.parametrize("command", SETTINGS)
    def test_script(self, capsys: pytest.CaptureFixture[str], command: str) -> None:
        overrides = ["training.run_dir=runs/x", "training.micro_batch_size=2"]
        arguments = ["submit", str(self.SETTINGS[command]), *overrides, *SIZE, "--command", command]
        assert main([*arguments, "--dry-run"]) == 0
        script = capsys.readouterr().out
        assert values(script)["COMMAND"] == [command]
        words = shlex.split(script.splitlines()[1].removeprefix("# "))
        assert main([*words[1:], "--dry-run"]) == 0
        assert capsys.readouterr().out == script

    @pytest.mark.parametrize(
        ("command", "override", "message"),
        [
            ("finetune", "quantization.weight_bits=8", "unknown setting quantization"),
            ("finetune", "parallel.tensor=3", "does not divide the 16 processes"),
            ("quantize", "parallel.tensor=3", "does not divide the 16 processes"),
            ("quantize", "training.compile=true", "set training.compile=false"),
            ("quantize", "quantization.weight_bits=4", "quantization.weight_bits is 4"),
        ],
    )
    def test_refusals(self, capsys: pytest.CaptureFixture[str], command: str, override: str, message: str) -> None:
        assert main(["submit", str(self.SETTINGS[command]), override, *SIZE, "--command", command, "--dry-run"]) == 2
        assert message in capsys.readouterr().err


class TestRefusals:
    def test_processes_that_do_not_fit(self, submit: Submit) -> None:
        assert "does not divide the 16 processes" in submit.refused("parallel.tensor=3", *SIZE)

    def test_unknown_setting(self, submit: Submit) -> None:
        assert "unknown setting" in submit.refused("training.stepz=1", *SIZE)

    def test_site(self, submit: Submit, tmp_path: Path) -> None:
        site = tmp_path / "site.yaml"
        site.write_text("partitoin: gpu\n")
        assert "did you mean partition?" in submit.refused(*SIZE, "--site", str(site))
        site.write_text("environment: {'A B': 1}\n")
        assert "is not a name of an environment variable" in submit.refused(*SIZE, "--site", str(site))
        site.write_text("partition: a\naccount: b\npartition: c\n")
        assert "partition is set twice" in submit.refused(*SIZE, "--site", str(site))

    @pytest.mark.parametrize("option", ["--nodes", "--gpus-per-node", "--min-nodes"])
    def test_numbers(self, submit: Submit, option: str) -> None:
        assert f"{option} is 0: give 1" in submit.refused(*SIZE, option, "0")

    def test_times(self, submit: Submit) -> None:
        assert "--time is 'tomorrow'" in submit.refused(*SIZE[:4], "--time", "tomorrow")
        assert "give more time" in submit.refused(*SIZE[:4], "--time", "5")
        for wrong in ("1:99:99", "10:75", "1-36", "1-12:60"):
            assert f"--time is '{wrong}': minutes and seconds go to 59" in submit.refused(*SIZE[:4], "--time", wrong)

    @pytest.mark.parametrize(
        "wrong", ["bogus", "afterok", "afterok:", "afterok:job", "afterok:1,", "1234", "after:1:x"]
    )
    def test_dependencies(self, submit: Submit, wrong: str) -> None:
        assert "such as afterok:1234" in submit.refused(*SIZE, "--dependency", wrong)
        assert "not both" in submit.refused(*SIZE, "--dependency", "afterok:1,afterany:2?singleton")

    def test_line_breaks(self, submit: Submit) -> None:
        assert "cannot hold" in submit.refused("training.run_dir=a\nrm b", *SIZE)
        assert "cannot hold" in submit.refused(*SIZE, "--name", "a\rb")

    def test_no_number_of_nodes_fits(self, submit: Submit) -> None:
        message = submit.refused("--nodes", "4", "--min-nodes", "3", "--gpus-per-node", "8", "--time", "60")
        assert "no number of nodes from 3 to 3 fits" in message

    def test_arrays(self, submit: Submit) -> None:
        assert "would write to runs/bert_345m" in submit.refused(*SIZE, "--array", "0-3")
        assert "give task numbers" in submit.refused(*SIZE, "--array", "a-b%1")
        assert "there is no --array" in submit.refused("training.run_dir=runs/%a", *SIZE)

    def test_no_slurm(self, submit: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
        assert "there is no sbatch here" in submit.refused(*SIZE)

    @pytest.mark.parametrize("meanwhile", ["", "touch run/notes\n"])
    def test_slurm_refuses(
        self, submit: Submit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, meanwhile: str
    ) -> None:
        sbatch = tmp_path / "sbatch"
        monkeypatch.chdir(tmp_path)
        sbatch.write_text(f"#!/bin/sh\n{meanwhile}echo 'sbatch: error: invalid partition' >&2\nexit 1\n")
        sbatch.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        message = submit.refused(f"training.run_dir={tmp_path / 'run'}", *SIZE, "--unchecked")
        assert "sbatch refused the job: sbatch: error: invalid partition" in message
        assert (tmp_path / "run").exists() == bool(meanwhile)  # what somebody else has put there stays

    def test_a_dry_run_goes_before(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sbatch = tmp_path / "sbatch"
        sbatch.write_text("#!/bin/sh\necho 7\n")
        sbatch.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv("MEGATRON_BERT_SITE", raising=False)
        small = ["model.hidden_size=64", "model.num_hidden_layers=2", "model.num_attention_heads=4"]
        assert main(["submit", CONFIG, f"training.run_dir={tmp_path / 'run'}", *small, *SIZE]) == 0
        out, err = capsys.readouterr()
        assert "dry run: rank 0 of 16 takes" in err
        assert "job 7:" in out


def test_tensor_groups_across_nodes(submit: Submit, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["parallel.tensor=8", "--nodes", "4", "--gpus-per-node", "4", "--time", "60", "--dry-run"]
    assert main(["submit", CONFIG, *arguments]) == 0
    assert "tensor groups reach over the network" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("10:30", 630),
        ("24:00:00", 86400),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("2-00:00:01", 172801),
    ],
)
def test_seconds(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


def test_array_numbers() -> None:
    assert check_array("1,3,8-20:4%2") == [1, 3, 8, 12, 16, 20]
    for wrong in ("", "3-", "1-4:0", "1%x", "1%", "1%0", "3-0%1", "1,2,1"):
        with pytest.raises(UserError):
            check_array(wrong)


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "scripts").glob("*.sbatch")), ids=lambda path: path.stem)
def test_documented_script_is_what_its_command_makes(
    submit: Submit, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    text = path.read_text(encoding="utf-8")
    command = shlex.split(text.splitlines()[1].removeprefix("# "))
    assert main([*command[1:], "--dry-run"]) == 0
    assert submit.capsys.readouterr().out == text, f"make it again: {shlex.join(command)} --dry-run >{path}"


def test_example_of_a_site(submit: Submit) -> None:
    script = submit.dry(*SIZE, "--site", str(ROOT / "launch" / "site_example.yaml"))
    assert {"--partition=gpu", "--account=my_project", "--cpus-per-task=96", "--mem=0"} <= set(options(script))
