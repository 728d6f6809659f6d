# SPDX-License-Identifier: Apache-2.0
"""The error for mistakes a user can fix, and values of unknown origin in its messages."""


class UserError(ValueError):
    """A bad setting, file or world size: one sentence saying what was given, what was expected and what to do.

    The command line prints it without a traceback and exits with code 2. Programming errors are not reported so.
    """


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


def brief(value: object, length: int = 100) -> str:
    """A value in a few printable characters: no line breaks, no terminal codes, no numbers of a thousand digits."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a huge number"
    text = str(value)[:length]
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")[:length]
