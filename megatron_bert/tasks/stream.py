# SPDX-License-Identifier: Apache-2.0
"""Values of a JSON object that a user sends for prediction."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from parallel.errors import UserError


def text_of(row: Mapping[str, Any], key: str, where: str) -> str:
    """The text under a key.

    Raises:
        UserError: it is missing or no text.
    """
    if key not in row:
        found = ", ".join(list(row)[:8]) or "nothing"
        raise UserError(f'{where} has no "{key}" (found: {found}): give each row a text under this key')
    if not isinstance(row[key], str):
        raise UserError(f'{where} holds {json.dumps(row[key])[:40]} under "{key}": expected a text')
    return _valid(row[key], key, where)


def texts_of(row: Mapping[str, Any], key: str, where: str) -> list[str]:
    """The list of texts under a key.

    Raises:
        UserError: it is missing or no list of texts.
    """
    values = row.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UserError(f'{where} needs a list of texts under "{key}"')
    return [_valid(value, key, where) for value in values]


def name_of(row: Mapping[str, Any], where: str) -> str | int:
    """What a row calls itself under "id", and its place where it does not.

    Raises:
        UserError: it is neither text nor a whole number.
    """
    name = row.get("id")
    if name is None:
        return where
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise UserError(f'{where} holds {json.dumps(name)[:40]} under "id": expected a text or a whole number')
    return _valid(name, "id", where) if isinstance(name, str) else name


def _valid(text: str, key: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f'{where} holds half of a surrogate pair under "{key}", which is not valid text') from None
    return text
