# SPDX-License-Identifier: Apache-2.0
"""Files of unknown origin go through `parallel.stored` alone: no reader that could run them is called anywhere else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: Modules that unpickle: nothing of them may be named but what only writes, and the error.
READERS = ("pickle.", "_pickle.", "dill.", "cloudpickle.", "joblib.", "shelve.", "marshal.", "torch.hub.")
WRITERS = {
    *("pickle.dump", "pickle.dumps", "pickle.Pickler", "pickle.HIGHEST_PROTOCOL", "pickle.DEFAULT_PROTOCOL"),
    *("pickle._Pickler", "pickle.STACK_GLOBAL", "pickle.UnpicklingError"),
}
#: Functions and classes that read pickles, by their full names.
FORBIDDEN = {
    *("torch.load", "torch.serialization.load", "torch.jit.load", "torch.export.load"),
    *("torch.storage._load_from_bytes", "pandas.read_pickle", "numpy.lib.format.read_array"),
    # yaml.load asks for a loader, and those of the project are made of the safe one.
    *("yaml.full_load", "yaml.unsafe_load", "yaml.Loader", "yaml.CLoader", "yaml.FullLoader", "yaml.UnsafeLoader"),
    *("eval", "exec", "builtins.eval", "builtins.exec"),
}
#: Prefixes of those: the readers of torch.distributed.checkpoint, but not its writers.
FORBIDDEN_STARTS = (
    "torch.distributed.checkpoint.load",
    "torch.distributed.checkpoint.FileSystemReader",
    "torch.distributed.checkpoint.filesystem.FileSystemReader",
    "torch.distributed.checkpoint.HuggingFaceStorageReader",
    "torch.distributed.checkpoint.format_utils",
    "torch.distributed.checkpoint.state_dict_loader",
)
#: In every module that names one of them, and in few others.
SUSPICIOUS = re.compile(r"pickle|dill|joblib|shelve|marshal|hub|load\b|load_|loads|Loader|read_array|Reader|eval|exec")
#: The one door; and what reads files that it has written itself.
EXEMPT = {"parallel/stored/pickles.py", "tools/fuzzing.py"}


def refused(source: str) -> Iterator[str]:
    """Line and name of everything in a module that could run a file."""
    if not SUSPICIOUS.search(source):
        return
    tree = ast.parse(source)
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, (ast.ImportFrom, ast.Name, ast.Attribute, ast.Call)):
            yield from (f"{node.lineno}: {name}" for name in _names(node, known) if _runs_files(name))
        if isinstance(node, ast.Call) and "numpy.load" in _names(node.func, known) and not _plain(node):
            yield f"{node.lineno}: numpy.load without allow_pickle=False"


def _plain(call: ast.Call) -> bool:
    return any(keyword.arg == "allow_pickle" and ast.unparse(keyword.value) == "False" for keyword in call.keywords)


def _runs_files(name: str) -> bool:
    return name in FORBIDDEN or name.startswith(FORBIDDEN_STARTS) or (name.startswith(READERS) and name not in WRITERS)


def _names(node: ast.AST, known: dict[str, str]) -> Iterator[str]:
    """The full name that a node stands for, if it does."""
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        yield ".".join([known.get(node.id, node.id), *parts])


def test_no_file_is_unpickled_but_by_the_one_door() -> None:
    found = {
        name: lines
        for folder in ("parallel", "megatron_bert", "tools", "launch")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (name := str(path.relative_to(ROOT))) not in EXEMPT
        and (lines := list(refused(path.read_text(encoding="utf-8"))))
    }
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(f)",
        "import pickle as p\np.loads(b'')",
        "from pickle import Unpickler",
        "def f():\n    import pickle\n    return pickle.Unpickler",
        "import _pickle\n_pickle.load(f)",
        "import torch\ntorch.load(f, weights_only=True)",
        "from torch import load",
        "import torch.distributed.checkpoint as dcp\ndcp.load({})",
        "import torch.distributed.checkpoint as dcp\ndcp.FileSystemReader('x').read_metadata()",
        "from torch.distributed.checkpoint import FileSystemReader",
        "from torch.distributed.checkpoint.filesystem import FileSystemReader as R",
        "import numpy as np\nnp.load(f)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "from numpy import load\nload(f)",
        "import joblib\njoblib.load(f)",
        "import yaml\nyaml.load(f, yaml.Loader)",
        "eval('1')",
    ],
)
def test_the_walk_sees(source: str) -> None:
    assert list(refused(source))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.dump(1, f)",
        "from torch.distributed.checkpoint import FileSystemWriter",
        "import torch.distributed.checkpoint as dcp\ndcp.save({}, storage_writer=dcp.FileSystemWriter('x'))",
        "import numpy as np\nnp.load(f, mmap_mode='r', allow_pickle=False)",
        "import json\njson.load(f)\nmodel.eval()",
    ],
)
def test_the_walk_lets_by(source: str) -> None:
    assert list(refused(source)) == []
