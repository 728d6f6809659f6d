"""The error for mistakes a user can fix, and values of unknown origin in its messages."""


class UserError(ValueError):
    """A bad setting, file or world size: one sentence saying what was given, what was expected and what to do.

    The command line prints it without a traceback and exits with code 2. Programming errors are not reported so.
    """


def brief(value: object, length: int = 100) -> str:
    """A value in a few printable characters: no line breaks, no terminal codes, no numbers of a thousand digits."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a huge number"
    text = str(value)[:length]
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")[:length]
