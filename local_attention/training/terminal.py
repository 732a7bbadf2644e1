"""Output to a terminal, a pipe or a file."""

import codecs
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO


def printable(text: str) -> str:
    """Replace control characters, which could move the cursor, by U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def as_text(data: bytes | Iterable[int]) -> str:
    """Decode UTF-8 bytes to printable text, with U+FFFD for invalid ones."""
    return printable(bytes(data).decode("utf-8", errors="replace"))


def format_duration(seconds: float) -> str:
    """``75 -> "1:15"``, ``3700 -> "1:01:40"``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def columns_of(stream: TextIO) -> int:
    """The columns of a terminal that can be written to without a new line; 79 if they are unknown."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except OSError:
        columns = 0
    return (columns or 80) - 1


def join_what_fits(parts: Sequence[str], columns: int) -> str:
    """Join the first of ``parts``, as many as fit in ``columns``, by two spaces."""
    text = parts[0]
    for part in parts[1:]:
        if len(text) + 2 + len(part) > columns:
            break
        text += "  " + part
    return text


def accept_any_output() -> None:
    """Show "?" for characters that the encoding of the output lacks, and discard output to a stream that is closed.

    By default, both end the program with an error.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        setattr(sys, name, stream)
        stream.reconfigure(errors="replace")


def discard_unwritten_output() -> None:
    """Flush the output; discard it where that fails, as otherwise Python would change the exit status to 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the terminal or the reader is gone, or the disk is full
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class ByteOutput:
    """Writes bytes to standard output as they are generated: raw to a file or pipe, as text to a terminal.

    On a terminal, a multi-byte character is shown once it is complete.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace") if self.stream.isatty() else None

    def write(self, data: bytes, final: bool = False) -> None:
        if self.decoder:
            self.stream.write(printable(self.decoder.decode(data, final)))
        else:
            self.stream.buffer.write(data)
        self.stream.flush()

    def end(self) -> None:
        """End the output: show an incomplete character, and end the line on a terminal."""
        self.write(b"", final=True)
        if self.decoder:
            self.stream.write("\n")
