"""Conversion from any format to any other, all or nothing."""

from __future__ import annotations

import os
import shutil
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_bert.convert.divisions import check_division
from megatron_bert.convert.formats import FORMATS
from megatron_bert.convert.inspection import describe
from megatron_bert.convert.opening import open_checkpoint, with_true_vocabulary
from megatron_bert.convert.options import ReadOptions, WriteOptions
from megatron_bert.convert.plausibility import layout_warning
from megatron_bert.convert.progress import Progress
from megatron_bert.convert.state import DTYPES, CanonicalState, StateTensor
from megatron_bert.convert.tokenizer_files import write_tokenizer
from megatron_bert.convert.verification import Verification, verify
from megatron_bert.data.tokenizers import Tokenizer, load_tokenizer
from parallel.errors import UserError

_PARTIAL = "partial"


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        source: description of the source, as :func:`inspect` gives it.
        to: name of the format written.
        destination: where the result is; None for a dry run.
        parameters: number of parameters, without padding.
        nbytes: of the weights written, without padding.
        seconds: wall-clock time.
        warnings: what a user should look at.
        verification: losses of masked-language predictions, where they were asked for.
    """

    source: str
    to: str
    destination: Path | None
    parameters: int
    nbytes: int
    seconds: float
    warnings: tuple[str, ...] = ()
    verification: Verification | None = None

    def __str__(self) -> str:
        lines = [self.source, ""]
        lines += [f"warning: {warning}" for warning in self.warnings]
        if self.verification is not None:
            lines.append(str(self.verification))
        amount = f"{self.parameters:,} parameters, {self.nbytes / 1e9:.2f} GB"
        if self.destination is None:
            lines.append(f"dry run: nothing was written; it would be {amount} as {self.to}")
        else:
            lines.append(f"wrote {self.destination} as {self.to}: {amount} in {self.seconds:.0f} s")
        return "\n".join(lines)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str,
    read: ReadOptions | None = None,
    write: WriteOptions | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    beside: bool = False,
    verify_text: Path | bool = False,
    progress: bool | None = None,
) -> ConversionReport:
    """Convert a checkpoint.

    Tensors pass through memory one by one. The result appears under its name when it is whole; a conversion that fails
    or is interrupted leaves nothing there, and can be run again.

    Args:
        source: a file, folder or archive of any format.
        destination: the folder to write, or for Megatron's formats a ``.zip`` file.
        to: name of a format in the table.
        read: what the source does not say.
        write: how to write.
        dry_run: open and check everything, and write nothing.
        overwrite: replace files of the result that are there already.
        beside: put the files into the destination though it holds other files, such as the source.
        verify_text: make masked-language predictions, on built-in sentences or on those of a file, and report their
            loss; needs a tokenizer and memory for the whole model.
        progress: show a bar; on a terminal only when None.

    Raises:
        UserError: the source cannot be read, or the result not be written as asked.
    """
    began = time.monotonic()
    read, write = read or ReadOptions(), write or WriteOptions()
    if to not in FORMATS:
        raise UserError(f"--to is {to!r}: choose one of {', '.join(FORMATS)}")
    place = Path(destination)
    _check_destination(place, to, write, overwrite=overwrite, beside=beside)
    tokenizer = None if write.tokenizer is None else load_tokenizer(write.tokenizer)
    if verify_text and tokenizer is None:
        raise UserError("--verify needs the vocabulary of the model: give it with --tokenizer")
    if tokenizer is not None:
        read = with_true_vocabulary(read, tokenizer.vocab_size)
    with open_checkpoint(source, read) as opened:
        state = opened if write.dtype is None else opened.in_dtype(DTYPES[write.dtype])
        if to.startswith("megatron"):
            check_division(state.config, write.tensor, write.pipeline, write.virtual_stages)
        size = sum(tensor.nbytes for tensor in (*state.values(), *state.optimizer.values()))
        warnings = [*state.facts.assumptions, *_notes(state, to, write)]
        if (doubt := layout_warning(state)) is not None:
            warnings.append(doubt)
        checked = verify(state, tokenizer, verify_text) if verify_text and tokenizer is not None else None
        if not dry_run:
            bar = Progress(size, shown=progress)
            try:
                _write(_watched(state), place, to, write, tokenizer, bar, size, overwrite=overwrite)
            finally:
                bar.close()
        return ConversionReport(
            source=describe(opened, str(source)),
            to=to,
            destination=None if dry_run else place,
            parameters=state.parameters,
            nbytes=size,
            seconds=time.monotonic() - began,
            warnings=tuple(dict.fromkeys((*warnings, *state.warnings))),
            verification=checked,
        )


def _check_destination(place: Path, to: str, write: WriteOptions, *, overwrite: bool, beside: bool) -> None:
    if place.suffix == ".zip" and not to.startswith("megatron"):
        raise UserError(f"{place} is a zip file, which only Megatron's formats are written to: name a folder")
    if place.is_dir() and any(place.iterdir()) and not (overwrite or beside):
        raise UserError(f"{place} is there already and not empty: name another folder, or give --overwrite")
    if place.exists() and not place.is_dir() and not overwrite:
        raise UserError(f"{place} is there already: name another, or give --overwrite")
    if place.exists() and not place.is_dir() and place.suffix != ".zip":
        raise UserError(f"{place} is a file: name a folder for the result")
    parent = place.absolute().parent
    if not parent.is_dir():
        raise UserError(f"{parent} is not there: make the folder first")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent} cannot be written to: choose another destination")
    if write.tokenizer is not None and not write.tokenizer.exists():
        raise UserError(f"--tokenizer {write.tokenizer} is not there: give a vocab.txt, tokenizer.json or their folder")


def _notes(state: CanonicalState, to: str, write: WriteOptions) -> Iterator[str]:
    if to == "native" and write.tensor * write.pipeline * write.virtual_stages > 1:
        yield "native checkpoints fit every layout: --tensor, --pipeline and --virtual-stages change nothing"
    if state.optimizer and to != "native":
        yield "the optimizer's state was left out: only native checkpoints keep it"
    if len({tensor.dtype for tensor in state.values()}) > 1:
        yield "the source mixes number formats: give --dtype to write one"


def _watched(state: CanonicalState) -> CanonicalState:
    """The same state, with a warning for tensors that hold values that are no numbers."""

    def watch(name: str, tensor: StateTensor) -> StateTensor:
        def check(values: Tensor) -> Tensor:
            if not torch.isfinite(values).all():
                count = int((~torch.isfinite(values)).sum())
                state.warnings.append(f"{name} ({tensor.origin}) holds {count} infinite or undefined values")
            return values

        return tensor.mapped(check)

    return replace(state, tensors={name: watch(name, tensor) for name, tensor in state.items()})


def _write(
    state: CanonicalState,
    place: Path,
    to: str,
    write: WriteOptions,
    tokenizer: Tokenizer | None,
    progress: Progress,
    size: int,
    *,
    overwrite: bool,
) -> None:
    """Write under a temporary name beside the destination, then give it its name."""
    free = shutil.disk_usage(place.absolute().parent).free
    copies = 2 if place.suffix == ".zip" else 1
    if copies * size > free:
        raise UserError(f"{place} needs {copies * size:,} bytes, but {free:,} are free there: choose another place")
    into = place.is_dir() and any(place.iterdir())
    with _temporary(place, inside=into) as folder:
        FORMATS[to].write(state, folder, write, progress)
        if tokenizer is not None:
            write_tokenizer(tokenizer, folder, for_transformers=to == "huggingface")
        if place.suffix == ".zip":
            archive = folder.with_name(folder.name + ".zip")
            try:
                _pack(folder, archive)
                archive.replace(place)
            finally:
                archive.unlink(missing_ok=True)
        elif into:
            _merge(folder, place, overwrite=overwrite)
        else:
            folder.replace(place)


@contextmanager
def _temporary(place: Path, *, inside: bool) -> Iterator[Path]:
    """An empty folder beside or inside ``place``; gone afterwards unless it was renamed."""
    whole = place.absolute()
    folder = whole / f".{_PARTIAL}" if inside else whole.with_name(f".{whole.name}.{_PARTIAL}")
    shutil.rmtree(folder, ignore_errors=True)  # of a conversion that was killed
    folder.mkdir()
    try:
        yield folder
    except OSError as error:
        raise UserError(f"{place} cannot be written ({error.strerror}): nothing was left there") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _pack(folder: Path, archive: Path) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.write(path, path.relative_to(folder).as_posix())


def _merge(folder: Path, place: Path, *, overwrite: bool) -> None:
    """Move the files of a result into a folder that has others, such as the archive it was made from."""
    moves = [(path, place / path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    taken = next((target for _, target in moves if target.exists()), None)
    if taken is not None and not overwrite:
        raise UserError(f"{taken} is there already: move it away, or give --overwrite")
    for path, target in moves:
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
