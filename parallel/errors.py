# SPDX-License-Identifier: Apache-2.0
"""The error for mistakes a user can fix, names of arguments in its messages, and values of unknown origin."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

#: A quoted value, or the name of an argument in the text of an error; not a dollar in the middle of a path.
_ARGUMENT = re.compile(r"""(?<!\w)(?:'[^']*'|"[^"]*")|(?<![^\s(])\$([^\W\d]\w*)""")


def _renamed(text: str, name: Callable[[str], str]) -> str:
    """A text whose arguments are named by a function."""
    return _ARGUMENT.sub(lambda found: found[0] if found[1] is None else name(found[1]), text)


class UserError(ValueError):
    """A bad setting, file or world size: one sentence saying what was given, what was expected and what to do.

    The command line prints it without a traceback and exits with code 2. Programming errors are not reported so.
    """


def with_article(noun: str) -> str:
    """A noun, mostly the name of a class, after "a" or "an"."""
    return f"{'an' if noun[:1].lower() in tuple('aeio') else 'a'} {noun}"


def its_class(value: object) -> str:
    """The name of a value's class, with its article."""
    return with_article(type(value).__name__)


class NamesArgumentsError(Exception):
    """An error whose text, its first argument, says ``$name`` for an argument; shown as ``name`` or by :func:`called`.

    So a layer speaks of its own arguments, and the layer above of the settings that they come from.
    """

    def __str__(self) -> str:
        return _renamed(str(self.args[0]), str)


class ArgumentError(NamesArgumentsError, UserError):
    """An argument, ``$name`` in the text, that does not fit."""

    def within(self, owner: str) -> "ArgumentError":
        """The same where the arguments are parts of another; itself where that has no name."""
        return ArgumentError(_renamed(str(self.args[0]), lambda name: f"${owner}.{name}" if owner else f"${name}"))


@contextmanager
def called(**names: str) -> Iterator[None]:
    """Give arguments in errors that leave the block the names by which the user knows them.

    Args:
        **names: argument -> name, such as ``device="--device"``; others keep theirs.
    """
    try:
        yield
    except NamesArgumentsError as error:
        text = _renamed(str(error.args[0]), lambda name: names.get(name, f"${name}"))
        error.args = (text, *error.args[1:])
        raise


class DamagedFileError(UserError):
    """A file that is not what it should be.

    Attributes:
        fault: what is wrong with which file.
        remedy: what to do; where a file is one of several, its reader knows better.
    """

    def __init__(self, fault: str, remedy: str = "fetch it again") -> None:
        super().__init__(fault, remedy)
        self.fault, self.remedy = fault, remedy

    def __str__(self) -> str:
        return f"{self.fault}{'; ' if ': ' in self.fault else ': '}{self.remedy}"


class DamagedCheckpointError(UserError):
    """A checkpoint whose files are missing or not what was written: another one may be whole.

    Attributes:
        path: of the checkpoint.
        fault: what is wrong with which file.
    """

    def __init__(self, path: object, fault: str) -> None:
        super().__init__(str(path), fault)
        self.path, self.fault = path, fault

    def __str__(self) -> str:
        return f"checkpoint {self.path} cannot be read ({self.fault}): use another one"


def first_of(items: Iterable[object], most: int = 3) -> str:
    """The first of several, and how many more there are: ``a, b, c and 2 more``."""
    listed = list(map(str, items))
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number of things: ``1 thread``, ``2,000 threads``."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def brief(value: object, length: int = 100) -> str:
    """A value in a few printable characters: no line breaks, no terminal codes, no numbers of a thousand digits."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a huge number"
    text = str(value)[:length]
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")[:length]
