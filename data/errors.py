"""What goes wrong with data that a person can put right."""


class DataError(ValueError):
    """A file that is missing, unreadable, empty, damaged or too short; one line that says what to do."""

    exit_status = 2  # of a command that ends with it: a mistake of usage


class DownloadError(DataError):
    """The bytes are not here and cannot be fetched: the one failure that `fallback` may answer."""

    exit_status = 1  # nobody mistyped anything
