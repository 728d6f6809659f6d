"""The error for mistakes a user can mend."""


class UserError(ValueError):
    """A bad setting, file or world size: one sentence saying what was given, what was expected and what to do.

    The command line prints it without a traceback and exits with code 2. Programming errors are not reported so.
    """
