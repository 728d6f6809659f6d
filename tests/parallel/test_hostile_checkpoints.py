# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that somebody changed: nothing in them is run, and each is refused in one sentence."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
)

from parallel.checkpoint_reader import load_tensors
from parallel.checkpoint_writer import CheckpointWriter
from parallel.errors import UserError
from parallel.manifest import MANIFEST_FILE
from parallel.process_group import process_group
from tests.worlds import run_world

#: What refusals say of :func:`open`, of whose two names Python pickles either.
NAMED = f"asks to load {open.__module__}.open"


class Touch:
    """What an unrestricted reader would make of a pickle: a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def empty() -> dict[str, Tensor]:
    return {"weight": torch.full((3, 4), torch.nan), "bias": torch.full((5,), torch.nan)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint that is read by nobody else."""
    with process_group("cpu"):
        writer = CheckpointWriter(tmp_path_factory.mktemp("checkpoints"), keep=0, asynchronous=False)
        yield writer.save(3, {"weight": torch.arange(12.0).view(3, 4), "bias": torch.ones(5)}, {"step": 3})


@pytest.fixture
def checkpoint(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, without the checksums: who means harm makes them fit."""
    copy = tmp_path / whole.name
    copy.mkdir()
    for file in whole.iterdir():
        if file.name != MANIFEST_FILE:
            (copy / file.name).write_bytes(file.read_bytes())
    load_tensors(copy, empty())
    return copy


def refusal(checkpoint: Path, tensors: dict[str, Tensor] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_tensors(checkpoint, tensors or empty())
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"checkpoint {checkpoint} ")
    assert "weights_only" not in text
    assert len(text) < 600
    assert sorted(path.name for path in checkpoint.iterdir()) == [".metadata", "__0_0.distcp", "state.json"]
    return text


# ---------------------------------------------------------------- the metadata


def changed(checkpoint: Path, change: Callable[[Metadata], object]) -> None:
    path = checkpoint / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def place(**changes: Any) -> Callable[[Metadata], None]:
    """Change where the blocks of the weight lie."""

    def change(metadata: Metadata) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == "weight":
                metadata.storage_data[index] = replace(info, **changes)

    return change


def entry(**changes: Any) -> Callable[[Metadata], None]:
    """Change what the weight is."""
    return lambda metadata: vars(metadata.state_dict_metadata["weight"]).update(changes)


def chunks(*found: tuple[list[int], list[int]]) -> Callable[[Metadata], None]:
    """Let blocks at these offsets and of these sizes make up the weight."""

    def change(metadata: Metadata) -> None:
        (info,) = (info for index, info in metadata.storage_data.items() if index.fqn == "weight")
        made = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in found]
        metadata.state_dict_metadata["weight"].chunks = made  # type: ignore[union-attr]
        for chunk in made:
            metadata.storage_data[MetadataIndex("weight", chunk.offsets)] = info

    return change


def cycle(metadata: Metadata) -> None:
    found: list[Any] = []
    found.append(found)
    entry(chunks=found)(metadata)


CHANGES: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "above": (place(relative_path="../../x"), "which is not a file beside it"),
    "absolute": (place(relative_path="/etc/passwd"), "which is not a file beside it"),
    "parent": (place(relative_path=".."), "which is not a file beside it"),
    "no file": (place(relative_path="x"), "No such file"),
    "lines": (place(relative_path="x\ny"), "which is not a file beside it"),
    "number as name": (place(relative_path=3), "which is not a file beside it"),
    "long name": (place(relative_path="x" * 5000), "which is not a file beside it"),
    "beyond": (place(offset=1 << 40), "ends at"),
    "negative": (place(offset=-5), "offset -5"),
    "absurd length": (place(length=1 << 60), "ends at"),
    "short": (place(length=10), "damaged"),
    "offset of a kind": (place(offset="0"), "damaged"),
    "other bytes": (place(offset=7), "damaged|not a file of torch.save"),
    "compressed": (place(transform_descriptors=["zstd"]), "compressed"),
    "no storage": (lambda m: setattr(m, "storage_data", None), "damaged"),
    "no places": (lambda m: m.storage_data.clear(), "damaged"),
    "no tensors": (lambda m: m.state_dict_metadata.clear(), "holds no tensor weight"),
    "a list": (lambda m: setattr(m, "state_dict_metadata", [1]), "damaged"),
    "bytes": (lambda m: m.state_dict_metadata.update(weight=BytesStorageMetadata()), "holds no tensor weight"),
    "number": (lambda m: m.state_dict_metadata.update(weight=3), "damaged"),  # type: ignore[dict-item]
    "huge": (entry(size=torch.Size([1 << 40, 1 << 20])), "only a part"),
    "long shape": (entry(size=torch.Size([1] * 1000)), "damaged"),
    "text": (entry(size="ab"), "damaged"),
    "dtype": (lambda m: setattr(m.state_dict_metadata["weight"].properties, "dtype", "float"), "damaged"),
    "integers": (lambda m: setattr(m.state_dict_metadata["weight"].properties, "dtype", torch.int32), "as torch.int32"),
    "another dtype": (
        lambda m: setattr(m.state_dict_metadata["weight"].properties, "dtype", torch.bfloat16),
        "is not what it should be",
    ),
    "no blocks": (entry(chunks=[]), "only a part"),
    "no list": (entry(chunks=None), "damaged"),
    "cycle": (cycle, "damaged"),
    "a part": (chunks(([0, 0], [2, 4])), "only a part"),
    "outside": (chunks(([0, 0], [4, 4])), "damaged"),
    "twice": (chunks(([0, 0], [3, 4]), ([0, 0], [3, 4])), "damaged"),
    "overlap": (chunks(([0, 0], [2, 4]), ([1, 0], [2, 4])), "damaged"),
    "hole": (chunks(([0, 0], [2, 2]), ([0, 2], [2, 2]), ([2, 0], [1, 2]), ([0, 1], [2, 1])), "damaged"),
    "another block": (chunks(([0, 0], [1, 4]), ([1, 0], [2, 4])), "is not what it should be"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_metadata_that_cannot_be_true(checkpoint: Path, name: str) -> None:
    change, message = CHANGES[name]
    changed(checkpoint, change)
    text = refusal(checkpoint)
    assert re.search(message, text), text


class EarlyPython311(pickle.Pickler):
    """Pickles members of enumerations as the first releases of Python 3.11 do."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


@pytest.mark.parametrize("protocol", [2, 4])
def test_metadata_as_the_first_python_3_11_writes_them(checkpoint: Path, protocol: int) -> None:
    path = checkpoint / ".metadata"
    with io.BytesIO() as file:
        EarlyPython311(file, protocol).dump(pickle.loads(path.read_bytes()))
        path.write_bytes(file.getvalue())
    assert any(
        argument == "getattr" or argument == "__builtin__ getattr"
        for _, argument, _ in pickletools.genops(path.read_bytes())
    )
    load_tensors(checkpoint, empty())


@pytest.mark.parametrize("where", ["in front", "alone", "inside"])
def test_code_in_the_metadata_is_not_run(checkpoint: Path, tmp_path: Path, where: str) -> None:
    path, canary = checkpoint / ".metadata", tmp_path / "canary"
    payload = pickletools.optimize(pickle.dumps(Touch(canary), 2))
    if where == "inside":
        changed(checkpoint, lambda metadata: setattr(metadata, "planner_data", Touch(canary)))
    else:
        path.write_bytes(payload[:-1] + b"0" + path.read_bytes() if where == "in front" else payload)
    assert NAMED in refusal(checkpoint)
    assert not canary.exists()


def test_metadata_of_many_objects(checkpoint: Path) -> None:
    (checkpoint / ".metadata").write_bytes(b"\x80\x04" + b"\x8f" * 400_000 + b".")
    assert "fills more memory than its size explains" in refusal(checkpoint)


# ---------------------------------------------------------------- the tensors


def replaced(checkpoint: Path, content: bytes) -> None:
    """Let a file hold something else as the only block of the weight."""
    (checkpoint / "__0_0.distcp").write_bytes(content)
    changed(checkpoint, place(offset=0, length=len(content)))


def archive(pickled: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as members:
        members.writestr("archive/data.pkl", pickled)
        members.writestr("archive/data/0", bytes(48))
        members.writestr("archive/version", "3\n")
    return file.getvalue()


def test_code_in_the_tensors_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payload = pickle.dumps(Touch(canary), 2)
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    for content, message in (
        (archive(payload), NAMED),
        (head + payload + pickle.dumps([], 2), NAMED),
        (payload + bytes(48), "not a file of torch.save"),
        (archive(payload, zipfile.ZIP_DEFLATED), "compressed or encrypted"),
        (archive(pickle.dumps({"weight": 1})), "is not what it should be"),
    ):
        replaced(checkpoint, content)
        assert message in refusal(checkpoint, {"weight": torch.zeros(3, 4)})
        assert not canary.exists()


def test_a_flipped_bit(checkpoint: Path) -> None:
    path = checkpoint / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[content.index(torch.tensor([6.0, 7.0]).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert "checksum does not match" in refusal(checkpoint)


# ---------------------------------------------------------------- many ranks


def one_lacks_a_tensor(checkpoint: Path, root: Path) -> str:
    writer = CheckpointWriter(root, keep=1, asynchronous=False)
    tensors = {"weight": torch.zeros(3, 4)} | ({"other": torch.zeros(1)} if dist.get_rank() == 1 else {})
    with pytest.raises(UserError) as caught:
        load_tensors(checkpoint, tensors, writer.group)
    return str(caught.value)


def test_ranks_fail_together(checkpoint: Path, tmp_path: Path) -> None:
    first, second = run_world(2, one_lacks_a_tensor, checkpoint, tmp_path / "checkpoints")
    assert first == second == f"checkpoint {checkpoint} holds no tensor other: it was saved from another kind of model"
