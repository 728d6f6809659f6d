# SPDX-License-Identifier: Apache-2.0
"""What comes with the package beside its modules: settings files by name, and scripts and images to start runs with.

In a checkout `files/` holds links to `configs/` and `launch/`, in an installed package copies.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from parallel.errors import UserError
from parallel.whole_files import reporting

FILES = Path(__file__).parent / "files"


def shipped_configs() -> dict[str, Path]:
    """Settings files by name, such as ``bert_345m`` and ``finetune/mnli``."""
    folder = FILES / "configs"
    paths = sorted([*folder.glob("*.yaml"), *folder.glob("*/*.yaml")], key=lambda path: (len(path.parts), path))
    return {path.relative_to(folder).as_posix().removesuffix(".yaml"): path for path in paths}


def shipped_scripts() -> dict[str, Path]:
    """Scripts that start runs, the example of a site's file and definitions of images, by file name."""
    return {path.name: path for path in sorted((FILES / "launch").iterdir()) if path.is_file()}


def find_config(path: Path) -> Path:
    """A settings file: the path itself, or the shipped one of that name where there is no such file."""
    return path if path.is_file() else shipped_configs().get(str(path), path)


def purpose(path: Path) -> str:
    """What a file's first comment says, up to the end of its first sentence."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(("#!", "# SPDX")) or (not words and not line.lstrip("# ").strip()):
            continue
        if not line.startswith("#"):
            break
        words += line.lstrip("# ").split()
        if words and words[-1].endswith((".", ":")):
            break
    sentence = " ".join(words).partition(". ")[0].rstrip(".:")
    return sentence if len(sentence) <= 90 else sentence[:87].rsplit(" ", 1)[0] + " ..."


def choose_shipped(known: dict[str, Path], names: Sequence[str]) -> dict[str, Path]:
    """The files of some names; all of them when none is named.

    Raises:
        UserError: a name is unknown.
    """
    for name in names:
        if name not in known:
            raise UserError(f"{name} is not among what comes with megatron-bert: {', '.join(known)}")
    return {name: known[name] for name in names or known}


def copy_shipped(chosen: dict[str, Path], folder: Path) -> list[Path]:
    """Copy files into a folder, under their names.

    Raises:
        UserError: a file is there already, or the folder cannot be written.
    """
    targets = {name: folder / Path(name).parent / path.name for name, path in chosen.items()}
    for target in targets.values():
        if target.exists():
            raise UserError(f"{target} is there already: give another folder, or remove it")
    with reporting("written", folder, "give a folder that you may write to"):
        for name, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(chosen[name], target)
    return list(targets.values())
