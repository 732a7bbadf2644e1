import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_attention.training.sampled_text import SampledText, unescape
from tests.training.toys import examples


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", b""),
        ("a b", b"a b"),
        (r"\n\n", b"\n\n"),
        ("\n", b"\n"),
        (r"\t|\r", b"\t|\r"),
        (r"\\n", rb"\n"),
        (r"\x00\xfF", b"\x00\xff"),
        (r"\q\xg0\x1", rb"\q\xg0\x1"),
        ("ä", "ä".encode()),
        ("\udcff", b"\xff"),  # a byte of the command line that is no UTF-8
    ],
)
def test_escapes_in_a_text_from_the_command_line_become_bytes(text, wanted):
    assert unescape(text) == wanted


@given(st.text("ab", max_size=12).map(str.encode), st.sampled_from([b"a", b"aab", b"abab"]))
@examples(300)
def test_a_text_ends_before_the_first_stop_text_and_what_was_shown_is_never_taken_back(sampled, stop):
    sample, shown = SampledText(stop), []
    for byte in sampled:
        sample.append(byte)
        shown.append(sample.new())
    shown.append(sample.new(final=True))
    assert b"".join(shown) == bytes(sample.text) == sampled.partition(stop)[0]
    assert sample.stopped == (stop in sampled)


def test_bytes_are_shown_as_soon_as_they_cannot_begin_a_stop_text():
    sample, shown = SampledText(b"aab"), []
    for byte in b"caacaaab":
        sample.append(byte)
        shown.append(sample.new())
    assert shown == [b"c", b"", b"", b"aac", b"", b"", b"a", b""]


def test_without_a_stop_text_every_byte_is_shown_at_once():
    sample = SampledText()
    for byte in (0, 255):
        sample.append(byte)
        assert sample.new() == bytes([byte])
    assert not sample.stopped
