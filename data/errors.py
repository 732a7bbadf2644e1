"""Errors about data that the user can fix."""


class DataError(ValueError):
    """A file that is missing, unreadable, empty, corrupt or too short. The message is one line that says what to do."""

    exit_status = 2  # exit status of a command that fails with this error: usage error


class DownloadError(DataError):
    """The data is not present and cannot be downloaded. This is the only error for which `data.fallback` is used."""

    exit_status = 1  # failure, as the usage was correct
