# SPDX-License-Identifier: Apache-2.0
"""The tokenizer_config.json that transformers keeps beside a vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from megatron_bert.json_file import read_object
from parallel.errors import UserError

CONFIG_NAME = "tokenizer_config.json"


class Normalization(NamedTuple):
    """What happens to text before a WordPiece vocabulary is looked up, which its vocab.txt does not say.

    The names are those of transformers.

    Attributes:
        do_lower_case: whether text is lower-cased; None where it is not known.
        strip_accents: whether accents are removed; None does what ``do_lower_case`` does.
        tokenize_chinese_chars: whether every Chinese character is a word of its own.
    """

    do_lower_case: bool | None = None
    strip_accents: bool | None = None
    tokenize_chinese_chars: bool = True

    def settings(self) -> dict[str, bool | None]:
        """What there is to say of them in the file."""
        return {name: value for name, value in self._asdict().items() if value is not None or name == "strip_accents"}


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file of settings, empty where there is no file.

    Raises:
        UserError: the file holds something else.
    """
    return read_object(path, "fetch the file again, or remove it") if path.is_file() else {}


def read_normalization(folder: Path) -> Normalization:
    """What the tokenizer_config.json of a folder says of its vocab.txt; the defaults where it says nothing.

    Raises:
        UserError: it is damaged, or says something else than true or false.
    """
    path = folder / CONFIG_NAME
    stated = {name: value for name, value in read_settings(path).items() if name in Normalization._fields}
    for name, value in stated.items():
        if type(value) is not bool and not (value is None and name == "strip_accents"):
            raise UserError(f"{path} says that {name} is {repr(value)[:40]}: write true or false, or leave it out")
    return Normalization(**stated)
