"""data.enwik8, tested with a small replacement for enwik8: it is found or downloaded, and always verified."""

import bz2
import errno
import gzip
import hashlib
import lzma
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data import DataError, enwik8
from data.download import RetryPolicy
from data.enwik8 import ENWIK8, Expected, find_or_download
from data.errors import DownloadError

ROOT = Path(__file__).parents[2]
LOCK = ".enwik8.lock"

PROCESS = """
import sys
from pathlib import Path
from data.download import RetryPolicy
from data.enwik8 import Expected, find_or_download
folder, url, size, sha256 = sys.argv[1:]
expected = Expected("enwik8", int(size), sha256)
print(find_or_download(Path(folder), expected, [url], RetryPolicy(timeout=60)).size)
"""


@pytest.fixture
def expected(content) -> Expected:
    return Expected("enwik8", len(content), hashlib.sha256(content).hexdigest())


@pytest.fixture
def get(tmp_path, expected, policy) -> Callable[..., np.ndarray]:
    def get(*mirrors: str, policy: RetryPolicy = policy) -> np.ndarray:
        return find_or_download(tmp_path, expected, mirrors or ["http://[no download expected"], policy)

    return get


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- found ---


def test_a_raw_file_is_mapped(get, tmp_path, content):
    (tmp_path / "enwik8").write_bytes(content)
    found = get()
    assert found.tobytes() == content
    with open(tmp_path / "enwik8", "r+b") as file:
        file.write(b"!!!")
    assert found[:3].tobytes() == b"!!!", "the array is the file"


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, "zip"])
@pytest.mark.parametrize("suffix", [".zip", ".gz", ".xz", ".bz2"])
def test_an_archive_is_decompressed_once_whatever_its_suffix(get, tmp_path, content, archive, pack, suffix):
    packed = archive if pack == "zip" else pack(content)
    (tmp_path / f"enwik8{suffix}").write_bytes(packed)
    assert get().tobytes() == content
    assert names_in(tmp_path) == {LOCK, f"enwik8{suffix}", "enwik8"}
    assert (tmp_path / "enwik8").read_bytes() == content
    (tmp_path / f"enwik8{suffix}").write_bytes(b"not read any more")
    assert get().tobytes() == content


def test_an_archive_named_enwik8_is_read_and_kept(get, tmp_path, content):
    packed = gzip.compress(content)
    (tmp_path / "enwik8").write_bytes(packed)
    assert get().tobytes() == content
    assert (tmp_path / "enwik8").read_bytes() == packed


def test_a_raw_file_with_the_suffix_of_an_archive_is_read(get, tmp_path, content):
    (tmp_path / "enwik8.zip").write_bytes(content)
    assert get().tobytes() == content
    assert names_in(tmp_path) == {LOCK, "enwik8.zip"}


@pytest.mark.parametrize("obstacle", [LOCK, "enwik8.unpacking.part"])
def test_if_the_folder_is_not_writable_an_archive_is_decompressed_into_memory(
    get, tmp_path, archive, content, obstacle
):
    (tmp_path / "enwik8.zip").write_bytes(archive)
    (tmp_path / obstacle).mkdir()  # cannot be opened for writing, not even by root, unlike a read-only file
    if obstacle != LOCK:
        (tmp_path / obstacle / "file").touch()
    assert get().tobytes() == content
    assert not (tmp_path / "enwik8").exists()


@pytest.mark.parametrize(
    "wrong, complaint",
    [
        (lambda content: content[:-1], "it has 299,999 bytes instead of 300,000"),
        (lambda content: content[:-1] + b"?", "its sha256 is [0-9a-f]{64} instead of [0-9a-f]{64}"),
        (lambda content: b"", "is empty"),
        (lambda content: gzip.compress(content)[:-9], "cannot be decompressed as gz"),
        (lambda content: gzip.compress(content + b"!"), "it has (more than 300,000|300,001) bytes"),
        (lambda content: gzip.compress(b"?" + content[1:]), "its sha256 is"),
    ],
)
@pytest.mark.parametrize("name", ["enwik8", "enwik8.zip"])
def test_a_wrong_file_is_reported_and_not_changed(get, mirror, archive, tmp_path, content, name, wrong, complaint):
    path = tmp_path / name
    there = wrong(content)
    path.write_bytes(there)
    with pytest.raises(DataError, match=complaint) as error:
        get(mirror.serve("/good", archive))
    assert not isinstance(error.value, DownloadError), "or data.fallback would hide it"
    assert str(error.value).startswith(f"{path} is not enwik8: ")
    assert str(error.value).endswith(
        f"delete it to download enwik8, or use data=file data.path={path} to train on it as it is"
    )
    assert path.read_bytes() == there  # not a new one: gzip stores the time
    assert names_in(tmp_path) == {LOCK, name}
    assert mirror.requests == []


# --- downloaded ---


def test_a_download_leaves_the_verified_file_and_is_not_repeated(get, mirror, archive, tmp_path, content):
    url = mirror.serve("/good", archive)
    assert get(url).tobytes() == content
    assert get(url).tobytes() == content
    assert names_in(tmp_path) == {LOCK, "enwik8"}
    assert len(mirror.requests) == 1


def test_mirrors_may_have_different_archives_of_the_same_content(get, mirror, zip_of, content):
    stored = zip_of(content, zipfile.ZIP_STORED, names=("other-name",))
    assert get(mirror.serve("/stored", stored)).tobytes() == content


def test_after_a_bad_mirror_the_next_one_is_tried(get, mirror, archive, zip_of, content, tmp_path):
    flipped = bytearray(archive)
    flipped[150_000] ^= 1
    bad = [
        mirror.url("/absent"),
        mirror.serve("/flipped", bytes(flipped)),
        mirror.serve("/other-content", zip_of(content[::-1])),
        mirror.serve("/bomb", zip_of(b"0" * 10_000_000)),
        mirror.serve("/web-page", b"<html>Please log in to this network.</html>"),
        mirror.serve("/nothing", b""),
        mirror.serve("/cut", archive, ranges=False, cut=lambda nth: 1000),
    ]
    for url in bad:
        with pytest.raises(DownloadError, match="cannot be downloaded"):
            get(url)
    assert get(*bad, mirror.serve("/good", archive)).tobytes() == content
    assert names_in(tmp_path) == {LOCK, "enwik8"}


@pytest.mark.parametrize(
    "behaviour", ["flipped", "other", "page", "nothing", "absent", "cut", "stall", "trickle", "busy"]
)
def test_a_failure_leaves_nothing_but_what_can_be_resumed(
    get, mirror, short_timeout, archive, zip_of, content, tmp_path, behaviour
):
    flipped = bytearray(archive)
    flipped[150_000] ^= 1
    url = {
        "flipped": lambda: mirror.serve("/file", bytes(flipped)),
        "other": lambda: mirror.serve("/file", zip_of(content[::-1])),
        "page": lambda: mirror.serve("/file", b"<html>"),
        "nothing": lambda: mirror.serve("/file", b""),
        "absent": lambda: mirror.url("/file"),
        "cut": lambda: mirror.serve("/file", archive, ranges=False, cut=lambda nth: 1000),
        "stall": lambda: mirror.serve("/file", archive, ranges=False, cut=lambda nth: 1000, stall=True),
        "trickle": lambda: mirror.serve("/file", archive, trickle=0.01),
        "busy": lambda: mirror.serve("/file", archive, busy=99),
    }[behaviour]()
    with pytest.raises(DownloadError) as error:
        get(url, policy=short_timeout)
    message = str(error.value)
    assert "\n" not in message
    assert f"enwik8 is not in {tmp_path} and cannot be downloaded (127.0.0.1:" in message
    assert "put enwik8 or enwik8.zip there, or use data=stdlib, or data=file data.path=FILE" in message
    parts = names_in(tmp_path) - {LOCK}
    if behaviour in ("cut", "stall", "trickle"):
        (part,) = parts
        assert part.startswith("enwik8.zip.") and part.endswith(".part")
        assert archive.startswith((tmp_path / part).read_bytes())
        mirror.serve("/file", archive)  # the mirror works again: the next start resumes
        assert get(url).tobytes() == content
        assert mirror.requests[-1][1].startswith("bytes=")
        assert names_in(tmp_path) == {LOCK, "enwik8"}
    else:
        assert parts == set()


def test_the_bytes_of_two_mirrors_are_never_mixed(get, mirror, archive, zip_of, content):
    other_archive = zip_of(content, zipfile.ZIP_STORED)
    breaking = mirror.serve("/one", archive, ranges=False, cut=lambda nth: 100_000)
    assert get(breaking, mirror.serve("/two", other_archive)).tobytes() == content
    assert mirror.requests[-1] == ("/two", None), "from the first byte"


def test_a_corrupt_partial_download_is_deleted(get, mirror, archive, content, tmp_path):
    url = mirror.serve("/file", archive, ranges=False, cut=lambda nth: 100_000)
    with pytest.raises(DownloadError):
        get(url)
    (part,) = tmp_path.glob("*.part")
    part.write_bytes(b"?" * 100_000)
    mirror.serve("/file", archive)
    with pytest.raises(DownloadError, match="it has"):
        get(url)
    assert names_in(tmp_path) == {LOCK}
    assert get(url).tobytes() == content


def test_an_environment_variable_names_other_mirrors(expected, mirror, archive, content, tmp_path, monkeypatch):
    monkeypatch.setenv("ENWIK8_MIRRORS", f" {mirror.url('/absent')}  {mirror.serve('/good', archive)} ")
    assert find_or_download(tmp_path / "new" / "folder", expected).tobytes() == content
    assert [path for path, _ in mirror.requests] == ["/absent", "/good"]


def test_a_folder_that_cannot_be_created_is_a_failed_download(get, tmp_path, expected):
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="the folder is not writable"):
        find_or_download(tmp_path / "file" / "folder", expected)


def test_a_full_disk_is_reported_and_no_other_mirror_tried(get, mirror, archive, tmp_path):
    (tmp_path / "enwik8.unpacking.part" / "x").mkdir(parents=True)  # like a full disk, it prevents writing the file
    url = mirror.serve("/good", archive)
    with pytest.raises(DownloadError, match="enwik8 cannot be written: "):
        get(url, url)
    assert len(mirror.requests) == 1


# --- several processes ---


def start(folder: Path, url: str, expected: Expected) -> subprocess.Popen:
    command = [sys.executable, "-c", PROCESS, str(folder), url, str(expected.size), expected.sha256]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_two_processes_that_start_at_once_download_once(mirror, archive, expected, tmp_path):
    url = mirror.serve("/slow", archive, delay=1.0)
    processes = [start(tmp_path, url, expected) for _ in range(2)]
    assert [process.communicate(timeout=30)[0].strip() for process in processes] == [str(expected.size)] * 2
    assert mirror.full_bodies == len(mirror.requests) == 1
    assert names_in(tmp_path) == {LOCK, "enwik8"}


@pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL, which only POSIX has")
def test_a_killed_process_releases_the_lock_and_its_download_is_resumed(
    get, mirror, archive, content, expected, tmp_path
):
    url = mirror.serve("/file", archive, cut=lambda nth: 100_000 if nth == 1 else None, stall=True)
    process = start(tmp_path, url, expected)
    deadline = time.monotonic() + 20
    while sum(path.stat().st_size for path in tmp_path.glob("*.part")) < 90_000 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert get(url).tobytes() == content
    assert mirror.requests[-1][1].startswith("bytes=")
    assert names_in(tmp_path) == {LOCK, "enwik8"}


@pytest.mark.parametrize("lock", [None, "refused"])
def test_without_support_for_locks_it_still_downloads(get, mirror, archive, content, monkeypatch, lock):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if lock is None:
        monkeypatch.setattr(enwik8, "fcntl", None)
    else:
        monkeypatch.setattr("fcntl.flock", refuse)
    assert get(mirror.serve("/good", archive)).tobytes() == content


# --- the real one ---


def test_the_expected_size_and_checksum_are_the_published_ones():
    assert Expected("enwik8", 100_000_000, "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8") == ENWIK8
