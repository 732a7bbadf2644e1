"""Errors that the user can act on. The message is one line: what was expected, what was found, what to do.

``training.command`` prints any exception with an ``exit_status`` without a traceback and exits with that status.
"""


class RunError(Exception):
    """A failure that is not a usage error."""

    exit_status = 1


class UsageError(ValueError):
    """An invalid key, type, value or file name."""

    exit_status = 2


class CheckpointError(UsageError):
    """A checkpoint that is missing, corrupt or of another model."""
