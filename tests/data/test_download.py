"""data.download: a whole file or a clear reason, from servers good and bad."""

import socket
from dataclasses import replace
from time import monotonic

import pytest

from data.download import fetch
from data.errors import DownloadError


@pytest.fixture
def target(tmp_path):
    return tmp_path / "file.part"


def ranges_asked(mirror) -> list[str | None]:
    return [header for _, header in mirror.requests]


def test_a_good_server_is_asked_once(mirror, patience, target, content):
    fetch(mirror.serve("/good", content), target, patience)
    assert target.read_bytes() == content
    assert ranges_asked(mirror) == [None]


@pytest.mark.parametrize("length", [True, False])
def test_a_body_of_known_or_unknown_length_is_taken_whole(mirror, patience, target, content, length):
    fetch(mirror.serve("/file", content, length=length), target, patience)
    assert target.read_bytes() == content


def test_a_broken_download_goes_on_where_it_broke(mirror, patience, target, content):
    url = mirror.serve("/cut", content, cut=lambda nth: 100_000 if nth < 3 else None)
    fetch(url, target, patience)
    assert target.read_bytes() == content
    assert ranges_asked(mirror) == [None, "bytes=100000-", "bytes=200000-"]


def test_a_server_that_breaks_off_again_and_again_is_borne_with_as_long_as_it_gets_further(
    mirror, patience, target, content
):
    url = mirror.serve("/cut", content, cut=lambda nth: 30_000)
    fetch(url, target, replace(patience, backoff=0.001))
    assert target.read_bytes() == content
    assert len(mirror.requests) == 10 > patience.attempts


def test_a_break_without_range_support_starts_again(mirror, patience, target, content):
    url = mirror.serve("/cut", content, ranges=False, cut=lambda nth: 100_000 if nth == 1 else None)
    fetch(url, target, patience)
    assert target.read_bytes() == content


def test_a_server_that_always_breaks_at_the_same_byte_is_given_up(mirror, patience, target, content):
    url = mirror.serve("/cut", content, ranges=False, cut=lambda nth: 100_000)
    with pytest.raises(DownloadError, match="broke off after 100,000 of 300,000 bytes"):
        fetch(url, target, patience)
    assert len(mirror.requests) == patience.attempts
    assert target.read_bytes() == content[:100_000], "kept, for a later call to continue"


def test_a_later_call_continues_and_a_complete_file_is_left_alone(mirror, patience, target, content):
    target.write_bytes(content[:1234])
    url = mirror.serve("/good", content)
    fetch(url, target, patience)
    fetch(url, target, patience)
    assert target.read_bytes() == content
    assert ranges_asked(mirror) == ["bytes=1234-", f"bytes={len(content)}-"]


def test_a_file_longer_than_the_servers_is_begun_again(mirror, patience, target, content):
    target.write_bytes(content + b"of something else")
    fetch(mirror.serve("/good", content), target, patience)
    assert target.read_bytes() == content


def test_a_part_that_was_not_asked_for_is_not_appended(mirror, patience, target, content):
    def wrong_part(request, nth):
        if nth == 1:
            request.send_response(206)
            request.send_header("Content-Range", f"bytes 0-9/{len(content)}")
            request.send_header("Content-Length", "10")
            request.end_headers()
            request.wfile.write(content[:10])
        else:
            mirror.serve("/part", content)
            mirror.answers["/part"](request, nth)

    mirror.answers["/part"] = wrong_part
    target.write_bytes(content[:100])
    fetch(mirror.url("/part"), target, patience)
    assert target.read_bytes() == content


def test_a_silent_server_is_left_after_the_time_limit(mirror, impatience, target, content):
    url = mirror.serve("/stall", content, ranges=False, cut=lambda nth: 50_000, stall=True)
    start = monotonic()
    with pytest.raises(DownloadError, match="timed out"):
        fetch(url, target, impatience)
    assert monotonic() - start < 5


def test_a_silence_that_ends_costs_no_byte(mirror, impatience, target, content):
    url = mirror.serve("/stall", content, cut=lambda nth: 50_000 if nth == 1 else None, stall=True)
    fetch(url, target, impatience)
    assert target.read_bytes() == content
    assert ranges_asked(mirror) == [None, "bytes=50000-"]


def test_a_server_that_trickles_is_given_up(mirror, patience, target, content):
    url = mirror.serve("/trickle", content, trickle=0.01)
    start = monotonic()
    with pytest.raises(DownloadError, match=r"too slow: .* bytes in"):
        fetch(url, target, patience)
    assert monotonic() - start < 5
    assert len(mirror.requests) == 1


def test_a_busy_server_is_asked_again(mirror, patience, target, content):
    fetch(mirror.serve("/busy", content, busy=2), target, patience)
    assert target.read_bytes() == content
    assert len(mirror.requests) == 3


def test_a_missing_file_is_not_asked_for_again(mirror, patience, target):
    with pytest.raises(DownloadError, match="HTTP 404 Not Found"):
        fetch(mirror.url("/absent"), target, patience)
    assert len(mirror.requests) == 1
    assert not target.exists()


def test_without_a_server_it_fails_at_once(patience, target, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        start = monotonic()
        with pytest.raises(DownloadError, match="Connection refused"):
            fetch(f"http://127.0.0.1:{unused.getsockname()[1]}/", target, replace(patience, backoff=10.0))
        assert monotonic() - start < 2
    assert not target.exists()


@pytest.mark.parametrize("url", ["enwik8.zip", "file:///etc/hostname", "http://[", "http://127.0.0.1:port/"])
def test_what_is_no_http_address_is_refused(url, patience, target):
    with pytest.raises(DownloadError):
        fetch(url, target, patience)
    assert not target.exists()


def test_a_bar_is_drawn_for_a_person_and_not_for_a_file(mirror, patience, target, content, capsys, monkeypatch):
    url = mirror.serve("/good", content)
    fetch(url, target, patience)
    assert capsys.readouterr().err == ""
    target.unlink()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    fetch(url, target, patience)
    assert "downloading: 100%" in capsys.readouterr().err
