"""What is sampled after a prompt, up to a stop text."""

import os
import re

ESCAPE = re.compile(rb"\\(n|t|r|\\|x[0-9A-Fa-f]{2})")
NAMED = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"\\": b"\\"}


def unescape(text: str) -> bytes:
    r"""The bytes of a text from the command line, in which ``\n``, ``\t``, ``\r``, ``\\`` and ``\xHH`` are escapes."""
    return ESCAPE.sub(lambda escape: NAMED.get(escape[1]) or bytes.fromhex(escape[1][1:].decode()), os.fsencode(text))


class SampledText:
    """Bytes that are sampled one by one and end before a stop text, if they contain it.

    Args:
        stop: the stop text, which does not become part of the text; empty: none.
    """

    def __init__(self, stop: bytes = b"") -> None:
        self.stop, self.text, self.shown = stop, bytearray(), 0
        self.stopped = False  # whether the stop text was sampled; later bytes are ignored

    def append(self, byte: int) -> None:
        if self.stopped:
            return
        self.text.append(byte)
        if self.stop and self.text.endswith(self.stop):
            del self.text[-len(self.stop) :]
            self.stopped = True

    def new(self, final: bool = False) -> bytes:
        """The bytes that were not returned before, without those that may begin a stop text unless ``final``."""
        held = 0 if final or self.stopped else self.possible_stop()
        begin, self.shown = self.shown, len(self.text) - held
        return bytes(self.text[begin : self.shown])

    def possible_stop(self) -> int:
        """How many of the last bytes are the beginning of a stop text."""
        return next((n for n in range(len(self.stop) - 1, 0, -1) if self.text.endswith(self.stop[:n])), 0)
