# SPDX-License-Identifier: Apache-2.0
"""Where a conversion writes: checked before the work, written beside, and put in place whole.

What was at the destination goes only when the result is there: a folder that holds nothing but a checkpoint is
exchanged for the new one by two renames. Where that cannot be, because the folder holds other files too, or is a mount
point or the current directory, files are moved inside it one by one, and moved back should anything go wrong.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_bert.convert.files import FileTree, folder_tree
from megatron_bert.convert.formats import FORMATS, Format
from megatron_bert.convert.megatron_shards import shard_groups
from megatron_bert.convert.run_checkpoints import run_of
from parallel.checkpoint import latest_checkpoint
from parallel.errors import UserError, brief
from parallel.whole_files import reason_of, reporting, sync_to_disk

_REMEDY = "nothing was changed there; make room or choose another destination"
#: Folders that each hold a whole checkpoint of Megatron's.
_STEP_FOLDER = re.compile(r"release|iter_\d{7}")


class Destination:
    """A folder or zip file to write, checked.

    The arguments are those of :func:`megatron_bert.convert.conversion.convert`.

    Attributes:
        place: the path without links.
        zipped: whether it is a zip file.
        kept: names of files that are there, are not a checkpoint's, and stay.

    Raises:
        UserError: it cannot be written, or holds what must not be replaced.
    """

    def __init__(self, path: Path, source: Path, to: str, *, overwrite: bool, beside: bool) -> None:
        self.path, self.to, self.zipped = path, to, path.suffix == ".zip"
        self._overwrite, self.beside = overwrite, beside
        self._scratch: Path | None = None
        self._replaced: list[str] = []
        self.kept: list[str] = []
        if self.zipped and not to.startswith("megatron"):
            raise UserError(f"{path} is a zip file, which only Megatron's formats are written to: name a folder")
        with reporting("written", path, "choose another destination"):
            if path.is_symlink() and not path.exists():
                remedy = "name another file" if self.zipped else "make that folder first"
                raise UserError(
                    f"{path} is a symbolic link to {path.readlink()}, which is not there: remove the link, or {remedy}"
                )
            self.place = path.resolve()
            self._check_kind()
            self._check_runs()
            if not self.zipped and self.place.is_dir():
                self._check_folder(source.resolve())
            self._inside = self._must_stay()
            holder = self.place if self._inside else self.place.parent
            if not os.access(holder, os.W_OK | os.X_OK):
                raise UserError(f"{holder} cannot be written to: choose another destination")

    def _check_kind(self) -> None:
        path, place = self.path, self.place
        there = next(folder for folder in place.parents if folder.exists())
        if not there.is_dir():
            raise UserError(f"{path} cannot be: {there} is a file, and nothing can be written below it; name a folder")
        if there != place.parent:
            raise UserError(f"{place.parent} is not there: make the folder first")
        if not place.exists():
            return
        if self.zipped and not place.is_file():
            raise UserError(
                f"{path} is there already and no file: name a zip file, or a folder that does not end in .zip"
            )
        if not self.zipped and not place.is_dir():
            raise UserError(f"{path} is a file: name a folder for the result")
        if self.zipped and not self._overwrite:
            raise UserError(f"{path} is there already: name another, or give --overwrite")

    def _check_runs(self) -> None:
        """Refuse what a run has written: it could not go on, or would go on from something else."""
        # As it was given too: the folder of checkpoints may be a link to another disk.
        for place in (self.place, Path(os.path.abspath(self.path))):
            if (run := run_of(place)) is not None:
                raise UserError(
                    f"{self.path} belongs to the run in {run}, which could not go on with the result in it: name a "
                    "folder outside of the run"
                )

    def _check_folder(self, source: Path) -> None:
        """Sort what a folder holds into what is replaced and what stays, and refuse what would be lost or misread."""
        path, place = self.path, self.place
        names = sorted(entry.name for entry in place.iterdir())
        if names and not (self._overwrite or self.beside):
            raise UserError(f"{path} is there already and not empty: name another folder, or give --overwrite")
        patterns = [format_.entries for format_ in self._formats_of(names)]
        self._replaced = [name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)]
        self.kept = [name for name in names if name not in self._replaced]
        if self._replaced and not self._overwrite:
            raise UserError(f"{path / self._replaced[0]} is there already: move it away, or give --overwrite")
        steps = [name for name in self._replaced if _STEP_FOLDER.fullmatch(name)]
        if len(steps) > 1:
            raise UserError(
                f"{path} holds several checkpoints ({brief(', '.join(steps))}), which --overwrite would delete: name "
                "another folder, or remove them first"
            )
        if source != place and any(source.is_relative_to(place / name) for name in self._replaced) and not self.beside:
            raise UserError(f"the source {source} lies in {path}, which --overwrite would replace: name another folder")
        if latest_checkpoint(place / "checkpoints") is not None:
            raise UserError(
                f"{path} is the directory of a run, whose newest checkpoint would be read in place of the result: name "
                "another folder"
            )
        self._check_kept(folder_tree(place))

    def _formats_of(self, names: list[str]) -> list[Format]:
        """The formats whose files are replaced: the one to write, and those of checkpoints that are there.

        A name such as config.json alone makes no checkpoint, and may be that of another tool's file.
        """
        tree = FileTree(str(self.place), {name: self.place / name for name in names})
        others = () if self.beside else FORMATS.values()
        return [
            FORMATS[self.to],
            *(f for f in others if f.name.startswith("megatron") or (f.name != self.to and f.detect(tree))),
        ]

    def _check_kept(self, tree: FileTree) -> None:
        """What stays must not be taken for the checkpoint when the folder is read."""
        stays = FileTree(tree.label, {name: self.place / name for name in tree if name.split("/")[0] in self.kept})
        for format_ in FORMATS.values():
            if format_.name == self.to:
                break
            if all(re.fullmatch(format_.entries, name) is None for name in stays):
                continue
            if format_.detect(stays):
                raise UserError(
                    f"{self.path} holds a checkpoint of {format_.name}, which would be read in place of the result: "
                    "name another folder"
                )
        if self.to.startswith("megatron"):
            others = sorted(name for places in shard_groups(stays).values() for name in places.values())
            if others:
                raise UserError(
                    f"{self.path} holds other files of Megatron checkpoints ({brief(', '.join(others))}), which stay: "
                    "name another folder"
                )

    def _must_stay(self) -> bool:
        """Whether the folder itself must stay, and its files be moved inside it."""
        if self.zipped or not self.place.is_dir():
            return False
        if self.beside or self.kept or self.place == Path.cwd() or self.place.is_mount():
            return True
        return not os.access(self.place.parent, os.W_OK | os.X_OK)

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """An empty folder beside the destination or in it; it goes at the end, with all that was not put in place.

        Raises:
            UserError: in place of every error of the file system in the block.
        """
        name = f".{uuid.uuid4().hex[:12]}.partial"
        scratch = self.place / name if self._inside else self.place.with_name(f".{self.place.name[:200]}{name}")
        self._scratch = scratch
        try:
            with reporting("written", self.path, _REMEDY):
                (scratch / "new").mkdir(parents=True)
                yield scratch / "new"
        finally:
            if self._scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)

    def check_new(self, folder: Path) -> None:
        """Refuse to lose files of the user's to others of their names in ``folder`` (UserError)."""
        for path in folder.iterdir():
            there = self.place / path.name
            if self._overwrite or not there.exists():
                continue
            if there.is_dir() or path.is_dir() or there.read_bytes() != path.read_bytes():
                raise UserError(f"{self.path / path.name} is there already: move it away, or give --overwrite")

    def put_in_place(self, folder: Path, check: Callable[[Path], None]) -> None:
        """Give the files of ``folder`` their place.

        Args:
            folder: the one of :meth:`writing`, filled.
            check: raises when what a user would open is not what it should be; it is called for a zip file before that
                takes the place of another, and for a folder while what was there can still be brought back.

        Raises:
            BaseException: from ``check``, or from the file system; what was there is there again.
        """
        assert self._scratch is not None, "inside the block of writing()"
        if self.zipped:
            archive = self._scratch / "new.zip"
            _pack(folder, archive)
            check(archive)
            sync_to_disk(archive)
            self._check_meanwhile(folder)
            archive.replace(self.place)
            return
        self._check_meanwhile(folder)
        old = self._scratch / "old"
        moves: list[tuple[Path, Path]] = []
        if self._inside:
            old.mkdir()
            new = sorted(path.name for path in folder.iterdir())
            gone = sorted({*self._replaced, *(name for name in new if (self.place / name).exists())})
            moves += [(self.place / name, old / name) for name in gone]
            moves += [(folder / name, self.place / name) for name in new]
        else:
            if self.place.exists():
                shutil.copymode(self.place, folder)
                moves.append((self.place, old))
            moves.append((folder, self.place))
        for path in folder.rglob("*"):
            if path.is_file():
                sync_to_disk(path)
        try:
            for start, end in moves:
                start.rename(end)
            check(self.place)
        except BaseException as error:
            self._move_back(moves, error)
            raise
        with suppress(OSError):  # of a directory that may be written to but not be listed
            sync_to_disk(self.place.parent)

    def _check_meanwhile(self, folder: Path) -> None:
        """Refuse to replace what another process put there since the first check."""
        if self._inside:
            self.check_new(folder)
        elif not self._overwrite and self.place.exists() and (self.zipped or any(self.place.iterdir())):
            raise UserError(f"{self.path} was made by something else meanwhile: name another, or give --overwrite")

    def _move_back(self, moves: list[tuple[Path, Path]], error: BaseException) -> None:
        try:
            for start, end in reversed(moves):
                if end.exists() and not start.exists():
                    end.rename(start)
        except OSError as second:
            kept, self._scratch = self._scratch, None
            raise UserError(
                f"{self.path} was only half replaced ({brief(error)}), and bringing back what was there failed too "
                f"({reason_of(second)}): it lies in {kept}"
            ) from error


def _pack(folder: Path, archive: Path) -> None:
    with archive.open("xb") as sink, zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.write(path, path.relative_to(folder).as_posix())
