import importlib
import io
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_attention.training.terminal import (
    ByteOutput,
    accept_any_output,
    as_text,
    format_duration,
    join_what_fits,
    printable,
)
from tests.training.toys import ROOT, examples


class Stream(io.TextIOWrapper):
    """Standard output, as a terminal or as a file."""

    def __init__(self, terminal):
        super().__init__(io.BytesIO(), encoding="utf-8", newline="")
        self.terminal = terminal

    def isatty(self):
        return self.terminal

    @property
    def shown(self):
        """What has arrived, without flushing."""
        return self.buffer.getvalue()


@pytest.mark.parametrize("text", ["a b", "a\nb\tc", "Grüße 🎈 中"])
def test_printable_keeps_text_newlines_and_tabs(text):
    assert printable(text) == text


@pytest.mark.parametrize("sign", ["\x1b", "\x00", "\r", "\x07", "\x7f", "\x9b", "\u2028", "\u202e", "\u200b"])
def test_printable_replaces_control_and_invisible_characters(sign):
    assert printable(f"a{sign}b") == "a\ufffdb"


@given(st.binary(max_size=50))
@examples(200)
def test_any_bytes_become_printable_text(data):
    assert all(c.isprintable() or c in "\n\t" for c in as_text(data))


@given(st.text(st.characters(categories=["L", "N", "P"]), max_size=50))
@examples(100)
def test_text_is_itself(text):
    assert as_text(text.encode()) == text


def test_invalid_utf8_is_replaced():
    assert as_text(b"a\xffb\xc3") == "a\ufffdb\ufffd"
    assert as_text([72, 105]) == "Hi"  # tokens


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0:00"),
        (9.4, "0:09"),
        (59.6, "1:00"),
        (75, "1:15"),
        (3599.7, "1:00:00"),
        (3700, "1:01:40"),
        (90000, "25:00:00"),
    ],
)
def test_duration(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    "columns, text", [(3, "abcd"), (8, "abcd"), (9, "abcd  efg"), (13, "abcd  efg"), (14, "abcd  efg  hij")]
)
def test_parts_that_do_not_fit_are_left_out(columns, text):
    assert join_what_fits(["abcd", "efg", "hij"], columns) == text


# Output never ends a program


@pytest.fixture
def encoded(monkeypatch):
    """Makes standard output one with another encoding; returns what it gets."""

    def make(encoding):
        output = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding=encoding, write_through=True))
        return output

    return make


@pytest.mark.parametrize(
    "encoding, shown", [("latin-1", b"\xfc?\n"), ("ascii", b"??\n"), ("utf-8", b"\xc3\xbc\xef\xbf\xbd\n")]
)
def test_what_an_encoding_lacks_is_replaced(encoded, encoding, shown):
    output = encoded(encoding)
    accept_any_output()
    print("ü\ufffd")
    assert output.getvalue() == shown


@pytest.mark.parametrize("script", ["compare", "plot_curves"])
def test_scripts_print_their_help_in_any_encoding(encoded, monkeypatch, script):
    output = encoded("ascii")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"scripts.{script}").main()
    assert end.value.code == 0
    assert "…".encode("ascii", "replace") in output.getvalue()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_without_a_stream_its_output_is_discarded(monkeypatch, stream):
    monkeypatch.setattr(sys, stream, None)
    accept_any_output()
    with getattr(sys, stream) as opened:
        print("unread", file=opened)


def test_a_reader_that_is_gone_does_not_change_the_status():
    source = "import sys; from local_attention.training.terminal import discard_unwritten_output as discard; "
    source += "sys.stdin.readline(); print('unread'); discard(); sys.exit(3)"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    with subprocess.Popen([sys.executable, "-c", source], cwd=ROOT, env=buffered, **pipes) as process:
        process.stdout.close()
        _, err = process.communicate(b"\n", timeout=60)
    assert (process.returncode, err) == (3, b"")


def test_a_pipe_gets_each_byte_immediately():
    stream = Stream(terminal=False)
    output = ByteOutput(stream)
    for i, byte in enumerate(b"\xc3\xbc\x1b\xff\x00"):
        output.write(bytes([byte]))
        assert stream.shown == b"\xc3\xbc\x1b\xff\x00"[: i + 1]
    output.end()
    assert stream.shown == b"\xc3\xbc\x1b\xff\x00"


def test_a_terminal_gets_a_multibyte_character_when_it_is_complete():
    stream = Stream(terminal=True)
    output = ByteOutput(stream)
    shown = []
    for byte in "aü🎈".encode():
        output.write(bytes([byte]))
        shown.append(stream.shown.decode())
    assert shown == ["a", "a", "aü", "aü", "aü", "aü", "aü🎈"]


def test_a_terminal_gets_replacements_for_invalid_bytes_and_controls():
    stream = Stream(terminal=True)
    output = ByteOutput(stream)
    for byte in b"a\xffb\x1b[2Jc\xe2\x82d":
        output.write(bytes([byte]))
    assert stream.shown.decode() == "a\ufffdb\ufffd[2Jc\ufffdd"


def test_the_end_shows_an_incomplete_character_and_ends_the_line_of_a_terminal():
    stream = Stream(terminal=True)
    output = ByteOutput(stream)
    output.write(b"a\xe2\x82")
    output.end()
    stream.flush()
    assert stream.shown.decode() == "a\ufffd\n"


def test_a_second_sample_does_not_continue_a_character():
    stream = Stream(terminal=True)
    output = ByteOutput(stream)
    output.write(b"\xe2\x82")
    output.end()
    output.write(b"\xac")
    output.end()
    stream.flush()
    assert stream.shown.decode() == "\ufffd\n\ufffd\n"
