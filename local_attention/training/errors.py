"""Errors for the person at the keyboard: their text is one line that says what was expected, what came, what to do.

Any exception with an ``exit_status`` is one: ``training.command`` prints it without a traceback, and exits so.
"""


class RunError(Exception):
    """Something failed that nobody mistyped."""

    exit_status = 1


class UsageError(ValueError):
    """A wrong key, type, value or file name."""

    exit_status = 2


class CheckpointError(UsageError):
    """A checkpoint that is missing, damaged or of another model."""
