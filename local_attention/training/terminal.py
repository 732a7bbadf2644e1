"""Bytes and numbers as a person wants to read them."""

import codecs
import sys


def printable(text):
    """Control characters, which could move the cursor or worse, as replacement characters."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def as_text(data):
    """Bytes as printable text, what is no UTF-8 as replacement characters."""
    return printable(bytes(data).decode("utf-8", errors="replace"))


def duration(seconds):
    """``75 -> "1:15"``, ``3700 -> "1:01:40"``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class ByteOutput:
    """Shows bytes on standard output as they come: raw into a file or pipe, on a terminal as text.

    On a terminal a character of several bytes is held back until it is complete.
    """

    def __init__(self, stream=sys.stdout):
        self.stream = stream
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace") if stream.isatty() else None

    def write(self, data, final=False):
        if self.decoder:
            self.stream.write(printable(self.decoder.decode(data, final)))
        else:
            self.stream.buffer.write(data)
        self.stream.flush()

    def end(self):
        """The last byte was written: show what is held back; on a terminal, end the line."""
        self.write(b"", final=True)
        if self.decoder:
            self.stream.write("\n")
