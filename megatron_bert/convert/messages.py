"""Values of unknown origin in messages for people."""

from __future__ import annotations


def brief(value: object, length: int = 100) -> str:
    """A value in a few printable characters: no line breaks, no terminal codes, no numbers of a thousand digits."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a huge number"
    text = str(value)[:length]
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")[:length]
