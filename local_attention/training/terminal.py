"""Format bytes and durations for the terminal."""

import codecs
import sys
from collections.abc import Iterable
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
