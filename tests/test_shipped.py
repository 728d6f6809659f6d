# SPDX-License-Identifier: Apache-2.0
"""What comes with the package: settings by name, scripts, images, the wheel and the source distribution."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
import yaml

import megatron_bert
from megatron_bert.cli import main
from megatron_bert.config_file import read_tree
from megatron_bert.shipped import purpose, shipped_configs, shipped_scripts

ROOT = Path(__file__).resolve().parents[1]


def test_every_settings_file_has_a_name_and_a_purpose() -> None:
    texts = {str(path.relative_to(ROOT / "configs")): path.read_text() for path in (ROOT / "configs").rglob("*.yaml")}
    assert {f"{name}.yaml": path.read_text() for name, path in shipped_configs().items()} == texts
    assert {"bert_345m", "bert_1.3b", "finetune/mnli", "quantize/roberta"} <= shipped_configs().keys()
    assert all(purpose(path) for path in shipped_configs().values())


def test_every_source_names_its_license() -> None:
    """Scanners of licenses read one file at a time."""
    packages = ("parallel", "megatron_bert", "tools", "launch", "benchmarks", "tests", "docs")
    sources = [path for package in packages for path in (ROOT / package).rglob("*.*") if path.is_file()]
    sources = [
        path
        for path in sources
        if "docs/scripts" not in str(path) and path.suffix in (".py", ".sh", ".sbatch", ".cpp", ".c", ".h")
    ]
    missing = [str(path) for path in sources if "SPDX-License-Identifier: Apache-2.0" not in path.read_text()[:200]]
    assert len(sources) > 500
    assert not missing


def test_settings_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_tree(Path("bert_1.3b"), []) == read_tree(ROOT / "configs" / "bert_1.3b.yaml", [])
    (tmp_path / "bert_1.3b").mkdir()  # such as a model that was converted
    assert read_tree(Path("bert_1.3b"), []) == read_tree(ROOT / "configs" / "bert_1.3b.yaml", [])
    (tmp_path / "bert_1.3b").rmdir()
    (tmp_path / "bert_1.3b").write_text("training: {steps: 3}")
    assert read_tree(Path("bert_1.3b"), []) == {"training": {"steps": 3}}, "a file of one's own goes first"
    assert main(["pretrain", "bert_345n"]) == 2
    assert "`megatron-bert configs` lists those" in capsys.readouterr().err


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    assert "finetune/mnli" in capsys.readouterr().out
    assert main(["configs", "bert_345m", "finetune/mnli", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "finetune" / "mnli.yaml").read_text() == (ROOT / "configs/finetune/mnli.yaml").read_text()
    capsys.readouterr()
    assert main(["configs", "bert_345m", "--output", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["configs", "nothing"]) == 2
    assert "nothing is not among" in capsys.readouterr().err
    assert main(["scripts", "torchrun.sh"]) == 0
    assert Path(capsys.readouterr().out.strip()).read_text() == (ROOT / "launch" / "torchrun.sh").read_text()
    assert main(["scripts", "--output", str(tmp_path / "new")]) == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == shipped_scripts().keys()
    with pytest.raises(SystemExit):
        main(["--version"])


def test_definitions_of_images_and_workflows() -> None:
    install = 'pip install --no-cache-dir "/src[arrow]"'
    for name in ("Dockerfile", "apptainer.def"):
        assert install in (ROOT / "launch" / "container" / name).read_text()
    (workflow,) = (ROOT / ".github" / "workflows").glob("*.yml")
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    assert any("launch/test.sh" in step.get("run", "") for step in jobs["checks"]["steps"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = [
        f"Programming Language :: Python :: {number}" for number in jobs["checks"]["strategy"]["matrix"]["python"]
    ]
    assert set(versions) <= set(project["classifiers"])


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_wheel_outside_the_checkout(tmp_path: Path) -> None:
    """Built from the source distribution, it runs the first commands of the README in an environment of its own."""
    from tests.test_readme import make_place, own_text_commands, tiny

    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "COV"))}
    clean["OMP_NUM_THREADS"] = "1"

    def call(*command: str | Path, folder: Path = tmp_path, **variables: str) -> str:
        done = subprocess.run(
            list(map(str, command)), cwd=folder, env=clean | variables, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    program = "import sys, setuptools.build_meta as build\ngetattr(build, 'build_' + sys.argv[1])(sys.argv[2])\n"
    call(sys.executable, "-c", program, "sdist", tmp_path, folder=_copied(tmp_path / "checkout"))
    (archive,) = tmp_path.glob("megatron_bert-*.tar.gz")
    call("tar", "--extract", "--file", archive, "--one-top-level=source")
    (source,) = (tmp_path / "source").iterdir()
    tests = ["tests/test_shipped.py", "-k", "settings or commands or images"]
    call(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, folder=source)
    # Without a compiler in PATH: the integer engine is built at its first use, and takes longer than all of this.
    call(sys.executable, "-c", program, "wheel", tmp_path, folder=source, PATH=str(Path(sys.executable).parent))
    (wheel,) = tmp_path.glob("*.whl")

    outside = tmp_path / "outside"
    venv.create(outside, with_pip=False, symlinks=True)
    python = outside / "bin" / "python"
    call(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    (packages,) = outside.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])  # without what is editable there
    where = call(python, "-c", "import megatron_bert, parallel; print(megatron_bert.__file__, parallel.__file__)")
    assert all(path.startswith(str(packages)) for path in where.split())
    path = f"{outside / 'bin'}{os.pathsep}{clean['PATH']}"
    place = make_place(tmp_path / "place", with_checkout=False)
    assert call("megatron-bert", "--version", PATH=path) == f"megatron-bert {megatron_bert.__version__}\n"
    commands = own_text_commands()
    assert len(commands) == 3
    for command in commands:
        call("bash", "-euc", tiny(command), folder=place, PATH=path)
    assert list(place.glob("runs/*/checkpoints/step_*"))


def _copied(target: Path) -> Path:
    """The files of the checkout that git knows, or all of a source distribution."""
    target.mkdir()
    names = ["--exclude=.git", "--exclude=.venv", "--exclude=runs", "--exclude=__pycache__", "--exclude=*.egg-info"]
    subprocess.run(f"tar -C '{ROOT}' {' '.join(names)} -cf - . | tar -C '{target}' -xf -", shell=True, check=True)
    return target
