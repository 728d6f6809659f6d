# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole or not there, what is kept, what loading refuses, and other layouts."""

from __future__ import annotations

import json
import random
import re
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from parallel import checkpoint_writer
from parallel.checkpoint import (
    HAS_MANIFEST,
    STATE_FILE,
    checkpoint_step,
    latest_checkpoint,
    read_state,
)
from parallel.checkpoint_directory import CheckpointDirectory
from parallel.checkpoint_reader import load_tensors
from parallel.checkpoint_writer import CheckpointWriter, NotWrittenError
from parallel.errors import DamagedCheckpointError, UserError
from parallel.manifest import MANIFEST_FILE
from parallel.process_group import process_group
from tests.worlds import run_world

STATE = {"step": 3, "note": "ä", "nested": {"scale": 0.1}}
ASYNCHRONOUS = pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])


@pytest.fixture
def _world() -> Iterator[None]:
    """A world of this process alone."""
    with process_group("cpu"):
        yield


def some_tensors(value: float = 0.0) -> dict[str, Tensor]:
    return {"model.weight": torch.arange(12.0).view(3, 4) + value, "model.bias": torch.full((5,), value)}


def read_everything(path: Path) -> None:
    read_state(path)
    load_tensors(path, empty_tensors())


def empty_tensors() -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, torch.nan) for name, tensor in some_tensors().items()}


def assert_holds(checkpoint: Path, value: float) -> None:
    loaded = empty_tensors()
    load_tensors(checkpoint, loaded)
    for name, tensor in some_tensors(value).items():
        assert torch.equal(loaded[name], tensor), name


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def save_and_finish(writer: CheckpointWriter, tensors: dict[str, Tensor] | None = None) -> None:
    writer.save(2, some_tensors(2.0) if tensors is None else tensors, STATE)
    writer.finish()


@pytest.fixture
def saved(tmp_path: Path, _world: None) -> Path:
    """One checkpoint in a folder of its own."""
    writer = CheckpointWriter(tmp_path / "checkpoints", keep=0, asynchronous=False)
    return writer.save(3, some_tensors(), STATE)


@pytest.mark.usefixtures("_world")
class TestWriting:
    @ASYNCHRONOUS
    def test_back_and_forth(self, tmp_path: Path, asynchronous: bool) -> None:
        writer = CheckpointWriter(tmp_path / "new" / "checkpoints", keep=0, asynchronous=asynchronous)
        path = writer.save(3, some_tensors(2.0), STATE)
        writer.finish()
        assert path == tmp_path / "new" / "checkpoints" / "step_00000003"
        assert names(path.parent) == ["step_00000003"]
        assert_holds(path, 2.0)
        assert read_state(path) == STATE | {HAS_MANIFEST: MANIFEST_FILE}
        assert checkpoint_step(path) == 3

    def test_a_copy_goes_on_while_tensors_are_frozen(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The call returns before the copy is made; the checkpoint has what the tensors held before they changed."""
        may_copy, original = threading.Event(), checkpoint_writer.Staging.fill

        def fill(*args: Any) -> None:
            assert may_copy.wait(60)
            original(*args)

        monkeypatch.setattr(checkpoint_writer.Staging, "fill", fill)
        writer, tensors = CheckpointWriter(tmp_path, keep=0, asynchronous=True), some_tensors(2.0)
        path = writer.save(3, tensors, STATE, frozen=True)
        threading.Timer(0.2, may_copy.set).start()
        assert not may_copy.is_set()
        writer.copied()
        assert may_copy.is_set()
        for tensor in tensors.values():
            tensor.zero_()
        writer.finish()
        assert_holds(path, 2.0)
        (saved,) = writer.saved()
        assert 0.0 < saved.stall_seconds <= saved.seconds

    @pytest.mark.parametrize("attempt", range(3))
    def test_finish_waits_for_the_final_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempt: int
    ) -> None:
        commits: list[str] = []
        original = CheckpointDirectory.commit

        def slow_commit(self: CheckpointDirectory, partial: Path, final: Path, protected: frozenset[int]) -> None:
            list(range(1_000_000))  # long enough for a waiting thread to be woken
            original(self, partial, final, protected)
            commits.append(final.name)

        monkeypatch.setattr(CheckpointDirectory, "commit", slow_commit)
        writer = CheckpointWriter(tmp_path, keep=0, asynchronous=True)
        writer.save(1, some_tensors(), STATE)
        writer.finish()
        assert commits == ["step_00000001"]

    def test_changes_after_save_do_not_reach_the_file(self, tmp_path: Path) -> None:
        writer = CheckpointWriter(tmp_path, keep=0, asynchronous=True)
        tensors = {"large": torch.zeros(500_000)}
        path = writer.save(1, tensors, STATE)
        tensors["large"].fill_(1.0)
        writer.finish()
        loaded = {"large": torch.full((500_000,), torch.nan)}
        load_tensors(path, loaded)
        assert loaded["large"].count_nonzero() == 0

    @ASYNCHRONOUS
    def test_the_newest_are_kept(self, tmp_path: Path, asynchronous: bool) -> None:
        writer = CheckpointWriter(tmp_path, keep=2, asynchronous=asynchronous)
        for step in (1, 2, 10, 11):
            writer.save(step, some_tensors(float(step)), STATE)
        writer.finish()
        assert names(tmp_path) == ["step_00000010", "step_00000011"]
        assert_holds(tmp_path / "step_00000010", 10.0)
        assert latest_checkpoint(tmp_path) == tmp_path / "step_00000011"

    def test_those_of_an_interval_and_protected_ones_are_kept_for_good(self, tmp_path: Path) -> None:
        (tmp_path / "step_00000001.damaged").mkdir()
        writer = CheckpointWriter(tmp_path, keep=1, asynchronous=False, keep_every=4)
        for step in range(1, 11):
            writer.protected = frozenset({2, 5} if step < 9 else {5})
            writer.save(step, some_tensors(), STATE)
        kept = [f"step_{step:08d}" for step in (4, 5, 8, 10)]
        assert names(tmp_path) == ["step_00000001.damaged", *kept]

    def test_what_a_checkpoint_costs_is_known(self, tmp_path: Path) -> None:
        writer = CheckpointWriter(tmp_path, keep=1, asynchronous=True)
        assert writer.saved() == []
        path = writer.save(3, some_tensors(), STATE)
        writer.finish()
        (saved,) = writer.saved()
        assert (saved.step, writer.saved()) == (3, [])
        assert 0 < saved.stall_seconds <= saved.seconds
        assert saved.bytes == sum(file.stat().st_size for file in path.iterdir() if file.name != MANIFEST_FILE)

    def test_keep_zero_keeps_all(self, tmp_path: Path) -> None:
        writer = CheckpointWriter(tmp_path, keep=0, asynchronous=False)
        for step in range(4):
            writer.save(step, some_tensors(), STATE)
        assert len(names(tmp_path)) == 4

    def test_the_one_just_written_is_kept_beside_later_ones(self, tmp_path: Path) -> None:
        CheckpointWriter(tmp_path, keep=0, asynchronous=False).save(10, some_tensors(), STATE)
        writer = CheckpointWriter(tmp_path, keep=1, asynchronous=False)
        path = writer.save(6, some_tensors(6.0), STATE)
        assert_holds(path, 6.0)

    def test_the_same_step_again_replaces(self, tmp_path: Path) -> None:
        writer = CheckpointWriter(tmp_path, keep=1, asynchronous=False)
        writer.save(1, some_tensors(1.0), STATE)
        path = writer.save(1, some_tensors(2.0), STATE)
        assert names(tmp_path) == ["step_00000001"]
        assert_holds(path, 2.0)

    @ASYNCHRONOUS
    def test_an_error_while_writing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool) -> None:
        writer = CheckpointWriter(tmp_path, keep=1, asynchronous=asynchronous)
        writer.save(1, some_tensors(1.0), STATE)
        writer.finish()

        def fail(*_: Any) -> None:
            raise OSError("no space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_writer, "write_pieces", fail)
            patch.setattr(checkpoint_writer.FileProcess, "write", fail)
            with pytest.raises(UserError, match=r"step_00000002 could not be written \(no space left on device\)"):
                save_and_finish(writer)
        assert names(tmp_path) == ["step_00000001"]
        assert latest_checkpoint(tmp_path) == tmp_path / "step_00000001"
        assert_holds(tmp_path / "step_00000001", 1.0)
        save_and_finish(writer)
        assert names(tmp_path) == ["step_00000002"]

    def test_a_start_clears_up(self, tmp_path: Path) -> None:
        (tmp_path / "step_00000002.partial").mkdir()
        CheckpointWriter(tmp_path, keep=1, asynchronous=False).prepare()
        assert names(tmp_path) == []

    @ASYNCHRONOUS
    @pytest.mark.parametrize("ending", ["", ".partial", ".old.partial"])
    def test_a_file_or_a_link_of_its_name_makes_way(self, tmp_path: Path, asynchronous: bool, ending: str) -> None:
        writer = CheckpointWriter(tmp_path, keep=1, asynchronous=asynchronous)
        (tmp_path / "step_00000001").mkdir()
        (tmp_path / f"step_00000002{ending}").touch()
        (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
        (tmp_path / "nowhere").rename(tmp_path / "step_00000003")
        save_and_finish(writer)
        writer.save(3, some_tensors(3.0), STATE)
        writer.finish()
        assert_holds(tmp_path / "step_00000003", 3.0)

    def test_a_start_clears_up_files_too(self, tmp_path: Path) -> None:
        (tmp_path / "step_00000002.partial").touch()
        CheckpointWriter(tmp_path, keep=1, asynchronous=False).prepare()
        assert names(tmp_path) == []

    @ASYNCHRONOUS
    def test_a_directory_that_was_removed_is_made_again(self, tmp_path: Path, asynchronous: bool) -> None:
        root = tmp_path / "run" / "checkpoints"
        writer = CheckpointWriter(root, keep=1, asynchronous=asynchronous)
        writer.prepare()
        shutil.rmtree(tmp_path / "run")
        save_and_finish(writer)
        assert names(root) == ["step_00000002"]

    def test_an_error_in_the_final_step_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> None:
            raise OSError("cannot rename")

        monkeypatch.setattr(CheckpointDirectory, "commit", fail)
        writer = CheckpointWriter(tmp_path, keep=1, asynchronous=True)
        writer.save(1, some_tensors(), STATE)
        with pytest.raises(UserError, match=r"step_00000001 could not be written \(cannot rename\)"):
            writer.finish()

    @ASYNCHRONOUS
    def test_a_full_disk(self, tmp_path: Path, full_disk: Path, asynchronous: bool) -> None:
        writer = CheckpointWriter(full_disk, keep=1, asynchronous=asynchronous)
        writer.save(1, some_tensors(1.0), STATE)
        writer.finish()
        large = {"large": torch.zeros(4 << 20)}
        with pytest.raises(UserError, match=r"step_00000002 could not be written \(No space left on device\): make"):
            save_and_finish(writer, large)
        assert names(full_disk) == ["step_00000001"]
        assert not writer.failed
        writer.save(3, some_tensors(3.0), STATE)
        writer.finish()
        assert_holds(full_disk / "step_00000003", 3.0)

    def test_a_file_in_the_place_of_the_directory(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=r"checkpoints .* could not be written \(Not a directory\)"):
            CheckpointWriter(tmp_path / "file" / "checkpoints", keep=1, asynchronous=False).prepare()

    def test_a_crash_while_deleting_leaves_no_whole_looking_rest(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        writer = CheckpointWriter(tmp_path, keep=1, asynchronous=False)
        writer.save(1, some_tensors(), STATE)

        def crash(path: Path, *_: Any, **__: Any) -> None:
            (path / ".metadata").unlink(missing_ok=True)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(CheckpointDirectory, "_remove", staticmethod(lambda path: crash(path)))
            with pytest.raises(KeyboardInterrupt):
                writer.save(2, some_tensors(2.0), STATE)
        assert latest_checkpoint(tmp_path) == tmp_path / "step_00000002"
        assert_holds(tmp_path / "step_00000002", 2.0)


class TestFinding:
    def test_nothing(self, tmp_path: Path) -> None:
        assert latest_checkpoint(tmp_path) is None
        assert latest_checkpoint(tmp_path / "missing") is None

    def test_only_whole_ones(self, saved: Path) -> None:
        root = saved.parent
        saved.rename(root / "step_00000003.partial")
        assert latest_checkpoint(root) is None
        (root / "step_00000003.partial").rename(saved)
        for number, missing in enumerate((".metadata", STATE_FILE)):
            damaged = root / f"step_0000001{number}"
            damaged.mkdir()
            for file in {".metadata", STATE_FILE} - {missing}:
                (damaged / file).write_bytes((saved / file).read_bytes())
        (root / "step_00000020").write_text("a file")
        (root / "step_30").mkdir()
        assert latest_checkpoint(root) == saved

    def test_by_number_not_by_name(self, tmp_path: Path) -> None:
        for name in ("step_99999999", "step_100000000"):
            (tmp_path / name).mkdir()
            for file in (".metadata", STATE_FILE):
                (tmp_path / name / file).touch()
        assert latest_checkpoint(tmp_path) == tmp_path / "step_100000000"


def _one_disk_stalls(root: Path, asynchronous: bool) -> tuple[list[str], float]:
    """Rank 1's disk does not answer: what each rank says of the save, and whether training and the next save go on."""
    writer = CheckpointWriter(root, keep=0, asynchronous=asynchronous, timeout_seconds=60.0)
    writer.save(1, some_tensors(1.0), STATE)  # which starts what writes
    writer.finish()
    writer.limit = 0.5
    answers = threading.Event()

    def stalled(original: Any) -> Any:
        def write(*args: Any) -> Any:
            if dist.get_rank() == 1:
                answers.wait(60)
            return original(*args)

        return write

    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_writer, "write_pieces", stalled(checkpoint_writer.write_pieces))
        patch.setattr(checkpoint_writer.FileProcess, "write", stalled(checkpoint_writer.FileProcess.write))
        try:
            save_and_finish(writer)
        except NotWrittenError as error:
            said.append(str(error))
    total = torch.ones(())
    dist.all_reduce(total)  # training goes on
    left = names(root)
    dist.barrier()
    writer.limit = 60.0
    writer.save(3, some_tensors(3.0), STATE)
    writer.finish()
    answers.set()  # and the first save, whose disk answers at last, must take no name
    writer.save(4, some_tensors(4.0), STATE)
    writer.finish()
    return [*said, *left], total.item()


@ASYNCHRONOUS
def test_a_rank_whose_disk_stalls_is_named_and_saves_go_on(tmp_path: Path, asynchronous: bool) -> None:
    results = run_world(2, _one_disk_stalls, tmp_path, asynchronous)
    for said, total in results:
        assert said == [said[0], "step_00000001"], "nothing stays of a checkpoint that is given up"
        assert re.search(
            r"step_00000002 could not be written \(after 0.5 s rank 1 on \S+ has not written its part\): look", said[0]
        )
        assert total == 2
    assert {name for name in names(tmp_path) if not name.endswith(".partial")} == {
        "step_00000001",
        "step_00000003",
        "step_00000004",
    }
    assert_holds(tmp_path / "step_00000004", 4.0)


class TestLoading:
    def test_in_one_process_without_warnings(self, saved: Path) -> None:
        dist.destroy_process_group()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                assert_holds(saved, 0.0)
        finally:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def test_a_part(self, saved: Path) -> None:
        bias = torch.full((5,), torch.nan)
        load_tensors(saved, {"model.bias": bias})
        assert torch.equal(bias, torch.zeros(5))

    def test_missing_tensor(self, saved: Path) -> None:
        with pytest.raises(UserError, match=r"holds no tensor model\.other: it was saved from another kind of model"):
            load_tensors(saved, {"model.other": torch.zeros(1)})

    def test_wrong_shape(self, saved: Path) -> None:
        with pytest.raises(UserError, match=r"holds model\.weight in shape \(3, 4\), but .* make it \(4, 3\)"):
            load_tensors(saved, {"model.weight": torch.zeros(4, 3)})

    @pytest.mark.parametrize("size", [0, 1, 100])
    def test_truncated_data(self, saved: Path, size: int) -> None:
        (data,) = saved.glob("*.distcp")
        data.write_bytes(data.read_bytes()[:size])
        self.assert_refused(saved)

    def test_missing_data(self, saved: Path) -> None:
        next(saved.glob("*.distcp")).unlink()
        self.assert_refused(saved)

    @pytest.mark.parametrize("size", [0, 20])
    def test_truncated_metadata(self, saved: Path, size: int) -> None:
        data = saved / ".metadata"
        data.write_bytes(data.read_bytes()[:size])
        self.assert_refused(saved)

    @staticmethod
    def assert_refused(path: Path) -> None:
        with pytest.raises(UserError, match=r"cannot be read .*: use another one") as caught:
            load_tensors(path, empty_tensors())
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("content", [b"", b'{"step": 3', b"\xff\xfe", b"[1, 2]", b"3", b"[" * 100_000])
    def test_damaged_state(self, saved: Path, content: bytes) -> None:
        (saved / STATE_FILE).write_bytes(content)
        with pytest.raises(DamagedCheckpointError, match=r"state\.json has changed since .*: use another"):
            read_state(saved)
        (saved / MANIFEST_FILE).unlink()  # as of an older version
        with pytest.raises(DamagedCheckpointError, match=r"state\.json is damaged.*: use another"):
            read_state(saved)

    def test_no_manifest(self, saved: Path) -> None:
        (saved / MANIFEST_FILE).unlink()
        with pytest.raises(DamagedCheckpointError, match=r"manifest\.json is missing.: use another one"):
            read_state(saved)

    def test_any_flipped_bit(self, saved: Path) -> None:
        """In weights and beside them, whatever file it is in."""
        draw = random.Random(3)
        for path in (path for path in saved.iterdir() if path.name != MANIFEST_FILE):
            whole = path.read_bytes()
            for at in draw.sample(range(len(whole)), 20):
                flipped = bytearray(whole)
                flipped[at] ^= 1 << draw.randrange(8)
                path.write_bytes(flipped)
                with pytest.raises(DamagedCheckpointError, match=r"has changed since it was written"):
                    read_everything(saved)
            path.write_bytes(whole)
        assert_holds(saved, 0.0)

    def test_no_state(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"is not a checkpoint: it holds no state\.json"):
            read_state(tmp_path)


# ---------------------------------------------------------------- other layouts


def sharded_tensors(value: float) -> dict[str, Tensor]:
    """The tensors of :func:`some_tensors` over a world: rows (3 over 2 ranks, unevenly), and a copy on each."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = some_tensors(value)
    return {
        "model.weight": distribute_tensor(whole["model.weight"], mesh, [Shard(0)]),
        "model.bias": distribute_tensor(whole["model.bias"], mesh, [Replicate()]),
    }


def save_sharded(root: Path, asynchronous: bool) -> Path:
    writer = CheckpointWriter(root, keep=1, asynchronous=asynchronous)
    writer.save(1, sharded_tensors(1.0), STATE)
    path = writer.save(2, sharded_tensors(2.0), STATE)
    writer.finish()
    assert names(root) == ["step_00000002"]  # on every rank, once it has finished
    return path


def load_sharded(path: Path, root: Path) -> list[list[float]]:
    """Load the other way round: columns instead of rows."""
    writer = CheckpointWriter(root, keep=1, asynchronous=False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = distribute_tensor(torch.zeros(3, 4), mesh, [Shard(1)])
    load_tensors(path, {"model.weight": weight}, writer.group)
    return weight.full_tensor().tolist()


@ASYNCHRONOUS
def test_two_ranks_save_and_any_number_loads(tmp_path: Path, asynchronous: bool) -> None:
    path, other = run_world(2, save_sharded, tmp_path / "checkpoints", asynchronous)
    assert path == other
    assert len(list(path.glob("*.distcp"))) == 2
    assert json.loads((path / STATE_FILE).read_text(encoding="utf-8")) == STATE | {HAS_MANIFEST: MANIFEST_FILE}
    assert_holds(path, 2.0)
    expected = some_tensors(2.0)["model.weight"].tolist()
    assert run_world(2, load_sharded, path, tmp_path / "checkpoints") == [expected, expected]
