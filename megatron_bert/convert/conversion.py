# SPDX-License-Identifier: Apache-2.0
"""Conversion from any format to any other, all or nothing."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from megatron_bert.convert.destination import Destination
from megatron_bert.convert.divisions import check_division
from megatron_bert.convert.formats import FORMATS
from megatron_bert.convert.inspection import inspection_of
from megatron_bert.convert.megatron_writer import check_plain
from megatron_bert.convert.opening import open_checkpoint
from megatron_bert.convert.options import ReadOptions, WriteOptions
from megatron_bert.convert.plausibility import layout_warning
from megatron_bert.convert.readback import Written
from megatron_bert.convert.state import DTYPES, CanonicalState
from megatron_bert.convert.tokenizer_files import save_tokenizer
from megatron_bert.convert.verification import Verification, verify
from megatron_bert.data.tokenizers import load_tokenizer
from parallel.errors import UserError, brief


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        source: description of the source, as :func:`inspect` gives it.
        destination: where the result is; None for a dry run.
        parameters, nbytes: of the weights written, without padding.
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
            lines.append(
                f"wrote {self.destination} as {self.to}: {amount} in {self.seconds:.0f} s, read back and compared"
            )
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

    Tensors pass through memory one by one. The result is read back and compared before it appears under its name; a
    conversion that fails or is interrupted leaves there what was there before, and can be run again.

    Args:
        source: a file, folder or archive of any format.
        destination: the folder to write, or for Megatron's formats a ``.zip`` file.
        to: name of a format in the table.
        dry_run: open and check everything, and write nothing.
        overwrite: replace the checkpoint that is there already, of whatever format; other files there stay.
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
    target = Destination(place, Path(source), to, overwrite=overwrite, beside=beside)
    tokenizer = None if write.tokenizer is None else load_tokenizer(write.tokenizer)
    if verify_text and tokenizer is None:
        raise UserError("--verify needs the vocabulary of the model: give it with --tokenizer")
    if tokenizer is not None and read.true_vocab_size is None:
        read = replace(read, true_vocab_size=tokenizer.vocab_size)
    with ExitStack() as stack:
        # Made before the work, as the surest way to see that it can be.
        folder = None if dry_run else stack.enter_context(target.writing())
        opened = stack.enter_context(open_checkpoint(source, read))
        if folder is not None and tokenizer is not None:
            if to == "huggingface":
                save_tokenizer(tokenizer, folder, opened.config.longest_sequence, roberta=opened.config.like_roberta)
            else:
                tokenizer.save(folder)
            target.check_new(folder)
        state = opened if write.dtype is None else opened.in_dtype(DTYPES[write.dtype])
        if to.startswith("megatron"):
            check_plain(state)
            check_division(state.config, write.tensor, write.pipeline, write.virtual_stages)
        size = sum(tensor.nbytes for tensor in (*state.values(), *state.optimizer.values()))
        warnings = [*state.facts.assumptions, *_notes(state, to, write, target)]
        if (doubt := layout_warning(state)) is not None:
            warnings.append(doubt)
        checked = verify(state, tokenizer, verify_text) if verify_text and tokenizer is not None else None
        if folder is not None:
            free, needed = shutil.disk_usage(folder).free, size * (2 if target.zipped else 1)
            if needed > free:
                raise UserError(f"{place} needs {needed:,} bytes, but {free:,} are free there: choose another place")
            _write(state, target, folder, write, size, None if progress is None else not progress)
        return ConversionReport(
            source=str(replace(inspection_of(opened, str(source)), suspicious=())),
            to=to,
            destination=None if dry_run else place,
            parameters=state.parameters,
            nbytes=size,
            seconds=time.monotonic() - began,
            warnings=tuple(dict.fromkeys((*warnings, *state.warnings))),
            verification=checked,
        )


def _notes(state: CanonicalState, to: str, write: WriteOptions, target: Destination) -> Iterator[str]:
    if target.kept and not target.beside:
        yield f"{target.path} holds files that are not a checkpoint's, which stay: {brief(', '.join(target.kept))}"
    if to == "native" and write.tensor * write.pipeline * write.virtual_stages > 1:
        yield "native checkpoints fit every layout: --tensor, --pipeline and --virtual-stages change nothing"
    if state.optimizer and to != "native":
        yield "the optimizer's state was left out: only native checkpoints keep it"
    if state.head is not None and to.startswith("megatron"):
        yield "Megatron's checkpoints name no classes and no task: they were left out"
    if len({tensor.dtype for tensor in state.values()}) > 1:
        yield "the source mixes number formats: give --dtype to write one"


def _write(
    state: CanonicalState, target: Destination, folder: Path, write: WriteOptions, size: int, hidden: bool | None
) -> None:
    """Write into a folder, read it back, and give it its place; with a bar of bytes, on a terminal where None."""
    bar = partial(tqdm, total=size, unit="B", unit_scale=True, disable=hidden, leave=False)
    with bar(desc="converting") as progress:
        written = Written(state, str(target.path), lambda nbytes: progress.update(nbytes))
        FORMATS[target.to].write(written.state, folder, write)
    with bar(desc="reading back") as progress:
        if target.zipped:
            target.put_in_place(folder, lambda archive: written.check(archive, target.to, values=True))
        else:
            written.check(folder, target.to, values=True)
            target.put_in_place(folder, lambda place: written.check(place, target.to))
