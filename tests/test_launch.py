# SPDX-License-Identifier: Apache-2.0
"""The scripts in launch/: what they say and leave behind when something is missing, without installing anything."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), *sorted((ROOT / "launch").glob("*.sbatch")), ROOT / ".ci" / "run"]
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"

#: Programs the scripts may use; tests run them with these and no others in PATH.
PROGRAMS = (
    "bash",
    "cat",
    "dirname",
    "flock",
    "getconf",
    "grep",
    "mkdir",
    "rm",
    "sed",
    "tail",
    "timeout",
    "uname",
    "wc",
)

#: Answers the questions setup.sh asks of an interpreter, and fails at everything else.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *"version_info < (3, 11)"*) exit {too_old} ;;
    *"version_info[:2]"*) echo {version} ;;
    *"--enable-optimizations"*) exit {optimized} ;;
    *"Python.h"*) exit {lacking} ;;
    *"import venv, ensurepip"*) [ -e "{folder}/venv-package" ] ;;
    *"-m venv"*) mkdir "$3"; echo "no space left" >&2; exit 1 ;;
    *) exit 1 ;;
esac
"""

#: An interpreter that says which command it was to run, and makes the file that shows that it was.
MAKES_WHAT_IT_IS_ASKED_FOR = """#!/bin/sh
program=$*
case "$program" in
    *train-tokenizer*) mkdir -p "${program##*--output }" && echo word >"${program##*--output }/vocab.txt" ;;
    *preprocess*) : >"${program##*--output-prefix }_text_sentence.idx" ;;
esac
echo "asked ${program##*-m megatron_bert }" | sed "s:asked tools/:asked :"
"""


class Checkout:
    """A copy of the scripts, with a PATH of its own."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin = folder / "checkout", folder / "bin"
        self.root.mkdir()
        self.bin.mkdir()
        shutil.copytree(ROOT / "launch", self.root / "launch")
        for name in ("requirements.txt", "requirements-test.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        for name in PROGRAMS:
            found = shutil.which(name)
            if found is not None:
                (self.bin / name).symlink_to(found)
        self.program("id", "echo 1000")

    def program(self, name: str, body: str) -> None:
        """Put a shell script in the PATH."""
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(body if body.startswith("#!") else f"#!/bin/sh\n{body}\n", encoding="utf-8")
        path.chmod(0o755)

    def python(self, name: str = "python3", *, version: str = "3.12", **answers: bool) -> None:
        """A Python that lacks half of its venv module until there is a file venv-package."""
        numbers = {"too_old": 0, "optimized": 1, "lacking": 0} | {key: int(value) for key, value in answers.items()}
        self.program(name, FAKE_PYTHON.format(version=version, folder=self.bin, **numbers))

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), "HOME": str(self.root), **variables}
        command = [str(self.bin / "bash"), str(self.root / "launch" / script), *arguments]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, cwd=self.root.parent
        )


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence a script ended with, exit code 2."""
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)


class TestSetup:
    def test_without_python(self, checkout: Checkout) -> None:
        assert refused(checkout.run("setup.sh")) == "setup: there is no python3: install Python 3.11 or newer"

    def test_python_too_old(self, checkout: Checkout) -> None:
        checkout.python(too_old=True, version="3.9")
        message = refused(checkout.run("setup.sh"))
        assert "python3 is Python 3.9, but 3.11 or newer is needed" in message
        assert not (checkout.root / ".venv").exists()

    def test_newer_python_beside_an_old_one(self, checkout: Checkout) -> None:
        checkout.python(too_old=True, version="3.9")
        checkout.python("python3.12")
        assert "python3.12 cannot make virtual environments" in refused(checkout.run("setup.sh"))

    def test_python_named(self, checkout: Checkout) -> None:
        checkout.python()
        assert "PYTHON is python3.99, which is not there" in refused(checkout.run("setup.sh", PYTHON="python3.99"))
        checkout.python("python3.10", too_old=True, version="3.10")
        assert "python3.10 is Python 3.10, but" in refused(checkout.run("setup.sh", PYTHON="python3.10"))
        checkout.program("python2", "exit 127")
        assert "PYTHON is python2, which does not run" in refused(checkout.run("setup.sh", PYTHON="python2"))

    @pytest.mark.parametrize("build", ["3.12 /usr", "3.12 /opt", "3.13 /usr"])
    def test_environment_of_another_build(self, checkout: Checkout, build: str) -> None:
        checkout.python(version=build)
        (checkout.root / ".venv" / "bin").mkdir(parents=True)
        (checkout.bin / "python3").rename(checkout.root / ".venv" / "bin" / "python")
        checkout.python(version="3.12 /usr")
        done = checkout.run("setup.sh", PYTHON="python3")
        assert ("removing .venv: it was not made with python3" in done.stdout) == (build != "3.12 /usr")

    @pytest.mark.parametrize("distribution", [{}, {"too_old": True}, {"lacking": True}], ids=["fit", "old", "lacking"])
    def test_built_without_optimizations(self, checkout: Checkout, distribution: dict[str, bool]) -> None:
        script = checkout.root / "launch" / "setup.sh"
        there = checkout.bin / "system-python3"
        script.write_text(script.read_text(encoding="utf-8").replace("/usr/bin/python3", str(there)), encoding="utf-8")
        checkout.python(optimized=False)
        checkout.python(there.name, version="3.11", **distribution)
        (checkout.bin / "venv-package").touch()
        chosen = "python3" if distribution else str(there)
        done = checkout.run("setup.sh")
        assert f"making .venv with Python {'3.12' if distribution else '3.11'}" in done.stdout
        assert ("without optimizations" in done.stdout) != bool(distribution)
        assert f"setup: {chosen} -m venv failed" in done.stderr
        assert "setup: python3 -m venv failed" in checkout.run("setup.sh", PYTHON="python3").stderr

    def test_venv_package_missing(self, checkout: Checkout) -> None:
        checkout.python()
        checkout.program("apt-get", "exit 1")
        message = refused(checkout.run("setup.sh"))
        assert "run 'sudo apt-get install python3.12-venv' and start again" in message
        assert not (checkout.root / ".venv").exists()

    def test_venv_package_installed_by_root(self, checkout: Checkout) -> None:
        checkout.python()
        checkout.program("id", "echo 0")
        checkout.program("apt-get", f'echo "$@" >>{checkout.bin}/asked; : >{checkout.bin}/venv-package')
        done = checkout.run("setup.sh")
        assert "install -y -qq python3.12-venv" in (checkout.bin / "asked").read_text()
        # The environment cannot be made after all, and nothing of it is left.
        assert done.returncode == 2
        assert done.stderr.splitlines() == ["no space left", "setup: python3 -m venv failed, see above"]
        assert not (checkout.root / ".venv").exists()

    def test_broken_environment_is_removed(self, checkout: Checkout) -> None:
        (checkout.root / ".venv" / "bin").mkdir(parents=True)
        (checkout.root / ".venv" / "bin" / "python").symlink_to("/nowhere/python3")
        checkout.python()
        done = checkout.run("setup.sh")
        assert "setup: removing .venv, which does not work" in done.stdout
        refused(done)
        assert not (checkout.root / ".venv").exists()

    def test_unknown_argument(self, checkout: Checkout) -> None:
        assert "unknown argument --fast" in refused(checkout.run("setup.sh", "--fast"))

    @pytest.mark.skipif(not (ROOT / ".venv" / ".installed-test").exists(), reason="the environment is not of setup.sh")
    def test_nothing_to_do_the_second_time(self) -> None:
        done = subprocess.run(["bash", str(ROOT / "launch" / "setup.sh")], capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


#: Of pytest, as launch/test.sh counts them.
WORKERS = min(4, len(os.sched_getaffinity(0)) + 1)


class TestTest:
    @pytest.fixture
    def checkout(self, checkout: Checkout) -> Checkout:
        (checkout.root / "launch" / "setup.sh").write_text("exit 0\n", encoding="utf-8")
        (checkout.root / ".venv" / "bin").mkdir(parents=True)
        return checkout

    def tools(self, checkout: Checkout, *failing: str) -> None:
        """An interpreter whose modules print their arguments, and fail if they are to."""
        cases = "".join(f'"-m {name}"*) code=1 ;;\n' for name in failing)
        python = checkout.root / ".venv" / "bin" / "python"
        python.write_text(f'#!/bin/sh\ncode=0\ncase "$*" in\n{cases}esac\necho "$*"\nexit $code\n', encoding="utf-8")
        python.chmod(0o755)

    def test_runs_everything(self, checkout: Checkout) -> None:
        self.tools(checkout)
        done = checkout.run("test.sh", "tests/parallel", "-k", "dropout")
        assert done.returncode == 0
        assert done.stdout.splitlines() == [
            "ok      ruff check",
            "ok      ruff format --check",
            "ok      mypy",
            f"running pytest with {WORKERS} workers",
            f"-m pytest -n {WORKERS} --dist worksteal tests/parallel -k dropout",
        ]

    @pytest.mark.parametrize("failing", ["ruff check", "ruff format", "mypy", "pytest"])
    def test_one_failure_fails_all_but_stops_nothing(self, checkout: Checkout, failing: str) -> None:
        self.tools(checkout, failing)
        done = checkout.run("test.sh")
        assert done.returncode == 1
        # Types are checked beside the tests, so that either may end first.
        assert f"-m pytest -n {WORKERS} --dist worksteal" in done.stdout.splitlines()
        assert ("FAILED" in done.stdout) == (failing != "pytest")


class TestTorchrun:
    """What it makes of its arguments: a program in the interpreter's place prints what it gets."""

    @pytest.fixture
    def checkout(self, checkout: Checkout) -> Checkout:
        for name in ("awk", "date", "ip", "ps", "setsid"):
            found = shutil.which(name)
            assert found is not None
            (checkout.bin / name).symlink_to(found)
        checkout.program("python3", 'echo "$@"\necho "$MEGATRON_BERT_LOG_DIR $GLOO_SOCKET_IFNAME"')
        return checkout

    def test_one_node(self, checkout: Checkout) -> None:
        checkout.program("nvidia-smi", "echo GPU 0\necho GPU 1")
        done = checkout.run("torchrun.sh", "--logs", "here", "pretrain", "a.yaml", "data.train=a b")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [
            "-m megatron_bert.launching.agent --standalone --nproc-per-node=2 --max-restarts=10 -m megatron_bert "
            "pretrain a.yaml data.train=a b",
            "here ",
        ]

    def test_hosts(self, checkout: Checkout) -> None:
        options = ["--hosts", "2:4", "--head", "node1", "--interface", "lo", "--processes", "8", "--restarts", "3"]
        done = checkout.run("torchrun.sh", *options, "--wait", "60", "finetune", "a.yaml", RDZV_CONF="read_timeout=9")
        assert done.returncode == 0, done.stderr
        command, variables = done.stdout.splitlines()
        assert command == (
            "-m megatron_bert.launching.agent --nnodes=2:4 --rdzv-backend=c10d --rdzv-endpoint=node1:29500 "
            "--rdzv-id=megatron-bert --local-addr=127.0.0.1 --rdzv-conf=join_timeout=60,read_timeout=9 "
            "--nproc-per-node=8 --max-restarts=3 -m megatron_bert finetune a.yaml"
        )
        assert variables.endswith(" lo")

    def test_code_of_a_failure(self, checkout: Checkout) -> None:
        checkout.program("python3", "exit 3")
        assert checkout.run("torchrun.sh", "pretrain", "a.yaml").returncode == 3

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["pretrain"], "give a command and its settings file"),
            (["--hosts", "2", "pretrain", "a.yaml"], "--hosts 2 needs --head"),
            (["--hosts", "none", "pretrain", "a.yaml"], "--hosts is 'none'"),
            (["--processes", "", "pretrain", "a.yaml"], "--processes is ''"),
            (["--fast", "pretrain", "a.yaml"], "unknown option --fast"),
            (["--hosts", "2", "--head", "a", "--interface", "none", "pretrain", "a.yaml"], "none has no IPv4 address"),
        ],
    )
    def test_refusals(self, checkout: Checkout, arguments: list[str], words: str) -> None:
        done = checkout.run("torchrun.sh", *arguments)
        assert done.returncode == 2
        assert words in done.stderr


@pytest.mark.parametrize(("name", "title"), [("finetune", "# Fine-tuning"), ("quantize", "# Quantization")])
def test_batch_scripts_differ_in_their_command_alone(name: str, title: str) -> None:
    pretraining, other = (
        (ROOT / "launch" / f"slurm_{command}.sbatch").read_text(encoding="utf-8") for command in ("pretrain", name)
    )
    assert pretraining.replace("# Pretraining", title).replace("pretrain", name) == other


class TestQuickstart:
    def test_text_that_is_not_there(self, checkout: Checkout) -> None:
        message = refused(checkout.run("quickstart.sh", "--text", "missing.txt"))
        assert "missing.txt is not a file that can be read" in message
        assert "text" in refused(checkout.run("quickstart.sh", "--text", "--steps", "5"))

    @pytest.mark.parametrize("steps", ["0", "-3", "many", ""])
    def test_steps_that_are_no_number(self, checkout: Checkout, steps: str) -> None:
        assert "give a number of steps" in refused(checkout.run("quickstart.sh", "--steps", steps))

    def test_unknown_argument(self, checkout: Checkout) -> None:
        assert "unknown argument --fast" in refused(checkout.run("quickstart.sh", "--fast"))

    def test_the_second_time_only_what_is_missing_is_made(self, checkout: Checkout) -> None:
        (checkout.root / "launch" / "setup.sh").write_text("exit 0\n", encoding="utf-8")
        (checkout.root / ".venv" / "bin").mkdir(parents=True)
        checkout.program("python", MAKES_WHAT_IT_IS_ASKED_FOR)
        (checkout.bin / "python").rename(checkout.root / ".venv" / "bin" / "python")
        (checkout.root / "own.txt").write_text("Some words.\n", encoding="utf-8")
        given = ["--text", str(checkout.root / "own.txt"), "--out", str(checkout.root / "out")]
        first, second = (checkout.run("quickstart.sh", *given, "--steps", "40") for _ in range(2))
        assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
        asked = [[line for line in done.stdout.splitlines() if line.startswith("asked")] for done in (first, second)]
        assert [line.split()[1] for line in asked[0]] == [
            "train-tokenizer",
            "preprocess",
            "pretrain",
            "fill-mask",
            "draw_curves.py",
        ]
        assert asked[1] == asked[0][2:]
        assert "training.steps=40 learning_rate.warmup_steps=2" in asked[0][2]
        refusal = refused(checkout.run("quickstart.sh", *given[2:]))
        assert refusal.endswith("out was made from other text: give --out another directory")

    def test_help(self, checkout: Checkout) -> None:
        done = checkout.run("quickstart.sh", "--help")
        assert done.returncode == 0
        assert "--text FILE..." in done.stdout
        assert "set -e" not in done.stdout
