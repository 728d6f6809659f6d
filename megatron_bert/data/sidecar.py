# SPDX-License-Identifier: Apache-2.0
"""The note kept next to a corpus: which tokenizer made it, so that no other is used with it by mistake."""

import json
import os
from pathlib import Path
from typing import Any

from megatron_bert.data.tokenizers import Tokenizer
from parallel.errors import UserError
from parallel.whole_files import write_json


def write_sidecar(prefix: str | os.PathLike[str], tokenizer: Tokenizer, **facts: Any) -> None:
    """Write `PREFIX.json` with the tokenizer's fingerprint and vocabulary size, and further facts for the reader."""
    write_note(prefix, {"tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, **facts})


def write_note(prefix: str | os.PathLike[str], note: dict[str, Any]) -> None:
    """Write `PREFIX.json` as `read_sidecar` gives it."""
    write_json(_path(prefix), note)


def remove_sidecar(prefix: str | os.PathLike[str]) -> None:
    """Remove `PREFIX.json` if it exists: a corpus about to be replaced must not keep the old note."""
    _path(prefix).unlink(missing_ok=True)


def read_sidecar(prefix: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The note of a corpus; None if it has none, as one made by Megatron-LM.

    Raises:
        UserError: The note is unreadable.
    """
    path = _path(prefix)
    if not path.is_file():
        return None
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        note["tokenizer"], note["vocab_size"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is damaged: preprocess again, or remove it to skip the check of the tokenizer."
        ) from None
    return note


def check_tokenizer(prefix: str | os.PathLike[str], tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer other than the one a corpus was made with.

    A corpus without a note, such as one made by Megatron-LM, passes: token ids are still checked as they are read.

    Raises:
        UserError: The note names another tokenizer, or is unreadable.
    """
    note = read_sidecar(prefix)
    if note is None:
        return
    fingerprint, vocab_size = note["tokenizer"], note["vocab_size"]
    if fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{prefix} was made with a tokenizer of {vocab_size} entries (fingerprint {fingerprint[:12]}) but the one "
            f"given has {tokenizer.vocab_size} (fingerprint {tokenizer.fingerprint[:12]}): use the former, or "
            f"preprocess again."
        )


def _path(prefix: str | os.PathLike[str]) -> Path:
    return Path(f"{os.fspath(prefix)}.json")
