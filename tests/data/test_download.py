"""data.download: a complete file or a clear error, whatever the server does."""

import socket
from dataclasses import replace
from time import monotonic

import pytest

from data.download import fetch
from data.errors import DownloadError


@pytest.fixture
def target(tmp_path):
    return tmp_path / "file.part"


def requested_ranges(mirror) -> list[str | None]:
    return [header for _, header in mirror.requests]


def test_a_download_takes_one_request(mirror, policy, target, content):
    fetch(mirror.serve("/good", content), target, policy)
    assert target.read_bytes() == content
    assert requested_ranges(mirror) == [None]


@pytest.mark.parametrize("length", [True, False])
def test_a_body_of_known_or_unknown_length_is_downloaded_completely(mirror, policy, target, content, length):
    fetch(mirror.serve("/file", content, length=length), target, policy)
    assert target.read_bytes() == content


def test_an_interrupted_download_is_resumed_where_it_stopped(mirror, policy, target, content):
    url = mirror.serve("/cut", content, cut=lambda nth: 100_000 if nth < 3 else None)
    fetch(url, target, policy)
    assert target.read_bytes() == content
    assert requested_ranges(mirror) == [None, "bytes=100000-", "bytes=200000-"]


def test_retries_continue_as_long_as_there_is_progress(mirror, policy, target, content):
    url = mirror.serve("/cut", content, cut=lambda nth: 30_000)
    fetch(url, target, replace(policy, backoff=0.001))
    assert target.read_bytes() == content
    assert len(mirror.requests) == 10 > policy.attempts


def test_without_range_support_an_interrupted_download_starts_again(mirror, policy, target, content):
    url = mirror.serve("/cut", content, ranges=False, cut=lambda nth: 100_000 if nth == 1 else None)
    fetch(url, target, policy)
    assert target.read_bytes() == content


def test_after_several_attempts_without_progress_it_gives_up(mirror, policy, target, content):
    url = mirror.serve("/cut", content, ranges=False, cut=lambda nth: 100_000)
    with pytest.raises(DownloadError, match="connection closed after 100,000 of 300,000 bytes"):
        fetch(url, target, policy)
    assert len(mirror.requests) == policy.attempts
    assert target.read_bytes() == content[:100_000], "kept, so that a later call can resume"


def test_a_later_call_resumes_and_a_complete_file_is_not_downloaded_again(mirror, policy, target, content):
    target.write_bytes(content[:1234])
    url = mirror.serve("/good", content)
    fetch(url, target, policy)
    fetch(url, target, policy)
    assert target.read_bytes() == content
    assert requested_ranges(mirror) == ["bytes=1234-", f"bytes={len(content)}-"]


def test_a_file_longer_than_that_of_the_server_is_downloaded_again(mirror, policy, target, content):
    target.write_bytes(content + b"of something else")
    fetch(mirror.serve("/good", content), target, policy)
    assert target.read_bytes() == content


def test_a_range_that_was_not_requested_is_not_appended(mirror, policy, target, content):
    def wrong_range(request, nth):
        if nth == 1:
            request.send_response(206)
            request.send_header("Content-Range", f"bytes 0-9/{len(content)}")
            request.send_header("Content-Length", "10")
            request.end_headers()
            request.wfile.write(content[:10])
        else:
            mirror.serve("/part", content)
            mirror.answers["/part"](request, nth)

    mirror.answers["/part"] = wrong_range
    target.write_bytes(content[:100])
    fetch(mirror.url("/part"), target, policy)
    assert target.read_bytes() == content


def test_a_stalled_server_is_a_timeout(mirror, short_timeout, target, content):
    url = mirror.serve("/stall", content, ranges=False, cut=lambda nth: 50_000, stall=True)
    start = monotonic()
    with pytest.raises(DownloadError, match="timed out"):
        fetch(url, target, short_timeout)
    assert monotonic() - start < 5


def test_a_download_is_resumed_after_a_stall(mirror, short_timeout, target, content):
    url = mirror.serve("/stall", content, cut=lambda nth: 50_000 if nth == 1 else None, stall=True)
    fetch(url, target, short_timeout)
    assert target.read_bytes() == content
    assert requested_ranges(mirror) == [None, "bytes=50000-"]


def test_a_server_that_is_too_slow_is_an_error(mirror, policy, target, content):
    url = mirror.serve("/trickle", content, trickle=0.01)
    start = monotonic()
    with pytest.raises(DownloadError, match=r"too slow: .* bytes in"):
        fetch(url, target, policy)
    assert monotonic() - start < 5
    assert len(mirror.requests) == 1


def test_a_busy_server_is_retried(mirror, policy, target, content):
    fetch(mirror.serve("/busy", content, busy=2), target, policy)
    assert target.read_bytes() == content
    assert len(mirror.requests) == 3


def test_a_missing_file_is_not_retried(mirror, policy, target):
    with pytest.raises(DownloadError, match="HTTP 404 Not Found"):
        fetch(mirror.url("/absent"), target, policy)
    assert len(mirror.requests) == 1
    assert not target.exists()


def test_without_a_server_there_is_no_retry(policy, target, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        start = monotonic()
        with pytest.raises(DownloadError, match="Connection refused"):
            fetch(f"http://127.0.0.1:{unused.getsockname()[1]}/", target, replace(policy, backoff=10.0))
        assert monotonic() - start < 2
    assert not target.exists()


@pytest.mark.parametrize("url", ["enwik8.zip", "file:///etc/hostname", "http://[", "http://127.0.0.1:port/"])
def test_an_invalid_address_is_refused(url, policy, target):
    with pytest.raises(DownloadError):
        fetch(url, target, policy)
    assert not target.exists()


def test_a_progress_bar_is_shown_on_terminals_only(mirror, policy, target, content, capsys, monkeypatch):
    url = mirror.serve("/good", content)
    fetch(url, target, policy)
    assert capsys.readouterr().err == ""
    target.unlink()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    fetch(url, target, policy)
    assert "downloading: 100%" in capsys.readouterr().err
