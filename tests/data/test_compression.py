"""data.compression: the compression is detected from the content."""

import bz2
import gzip
import lzma
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import DataError, compression

TEXT = b"A file of some length, with some repetition. " * 40


@pytest.fixture(scope="module")
def packed(zip_of) -> dict[str | None, bytes]:
    return {
        None: TEXT,
        "zip": zip_of(TEXT),
        "gz": gzip.compress(TEXT),
        "xz": lzma.compress(TEXT),
        "bz2": bz2.compress(TEXT),
    }


@pytest.mark.parametrize("kind", [None, "zip", "gz", "xz", "bz2"])
def test_a_file_is_read_whatever_its_name(kind, packed, tmp_path):
    for name in ("data", "data.zip", "data.txt.gz"):
        path = tmp_path / name
        path.write_bytes(packed[kind])
        assert compression.kind(path) == kind
        content = compression.read(path)
        assert content.dtype == np.uint8 and content.tobytes() == TEXT
        assert b"".join(compression.chunks(path)) == TEXT
        assert compression.read(path, limit=10).tobytes() == TEXT[:10]
        assert compression.read(path, limit=10**6).tobytes() == TEXT


def test_a_raw_file_is_mapped_and_not_copied(tmp_path):
    path = tmp_path / "raw"
    path.write_bytes(TEXT)
    content = compression.read(path)
    assert not content.flags.writeable
    with open(path, "r+b") as file:
        file.write(b"!")
    assert content[0] == ord("!"), "the array is the file"


@pytest.mark.parametrize("text", [b"BZh9 is how some text begins", b"PK", b"\x1f\x8b"])
def test_text_that_only_resembles_an_archive_is_raw(text, tmp_path):
    path = tmp_path / "raw"
    path.write_bytes(text)
    assert compression.read(path).tobytes() == text


@pytest.mark.parametrize("kind", ["zip", "gz", "xz", "bz2"])
def test_a_truncated_archive_is_refused_in_one_line(kind, packed, tmp_path):
    path = tmp_path / "cut"
    path.write_bytes(packed[kind][:-20])
    with pytest.raises(
        DataError, match=f"cut cannot be decompressed as {kind}: .*; replace it with an intact"
    ) as error:
        compression.read(path)
    assert "\n" not in str(error.value)


@given(st.sampled_from(["zip", "gz", "xz", "bz2"]), st.integers(0, 10**6), st.integers(1, 255))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_corrupt_byte_is_a_data_error_or_changes_nothing(packed, tmp_path, kind, place, flip):
    damaged = bytearray(packed[kind])
    damaged[place % len(damaged)] ^= flip
    path = tmp_path / "damaged"
    path.write_bytes(damaged)
    try:
        content = compression.read(path).tobytes()
    except DataError:
        return
    assert content in (TEXT, bytes(damaged)), "correct, or read as a raw file because the magic bytes are corrupt"


@pytest.mark.parametrize("names", [(), ("a", "b"), ("a", "b", "c")])
def test_a_zip_with_no_or_several_files_is_refused(names, zip_of, tmp_path):
    path = tmp_path / "some.zip"
    path.write_bytes(zip_of(TEXT, names=names))
    with pytest.raises(DataError, match=f"must contain exactly one file, but contains {len(names)}"):
        compression.read(path)


def test_folders_in_a_zip_do_not_count(tmp_path):
    path = tmp_path / "some.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/", b"")
        archive.writestr("folder/file", TEXT)
    assert compression.read(path).tobytes() == TEXT


def test_an_archive_of_an_empty_file_is_valid(tmp_path):
    for packed in (gzip.compress(b""), bz2.compress(b""), lzma.compress(b"")):
        (tmp_path / "empty").write_bytes(packed)
        assert compression.read(tmp_path / "empty").size == 0


def test_missing_folder_and_empty_paths_are_refused(tmp_path):
    (tmp_path / "empty").touch()
    for name, complaint in [("absent", "does not exist"), ("", "is not a file"), ("empty", "is empty")]:
        with pytest.raises(DataError, match=complaint):
            compression.read(tmp_path / name)


def test_an_unreadable_file_is_refused_with_the_reason(tmp_path, monkeypatch):
    path = tmp_path / "secret"
    path.write_bytes(TEXT)

    def refuse(*_, **__):  # not with chmod, as root may read any file
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataError, match="secret cannot be read: Permission denied"):
        compression.read(path)
