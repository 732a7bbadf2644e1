"""data.compression: how a file is packed is detected from the content."""

import bz2
import gzip
import io
import lzma
import os
import re
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import DataError, compression

TEXT = b"A file of some length, with some repetition. " * 40


def tar_of(contents: dict[str, bytes], tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def zst_of(content: bytes) -> bytes:
    """A frame with one uncompressed block; 256 to 65,791 bytes."""
    size = len(content)
    return b"\x28\xb5\x2f\xfd\x60" + (size - 256).to_bytes(2, "little") + (8 * size + 1).to_bytes(3, "little") + content


@pytest.fixture(scope="module")
def packed(zip_of) -> dict[str | None, bytes]:
    return {
        None: TEXT,
        "zip": zip_of(TEXT),
        "tar": tar_of({"text": TEXT}),
        "gz": gzip.compress(TEXT),
        "xz": lzma.compress(TEXT),
        "lzma": lzma.compress(TEXT, lzma.FORMAT_ALONE),
        "bz2": bz2.compress(TEXT),
        "zst": zst_of(TEXT),
    }


@pytest.mark.parametrize("kind", [None, "zip", "tar", "gz", "xz", "lzma", "bz2", "zst"])
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


@pytest.mark.parametrize(
    "text", [b"BZh9 is how some text begins", b"PK", b"\x1f\x8b", b"7z", b"Rar! it said", b"\x1f\x9d", bytes(1024)]
)
def test_text_that_only_resembles_an_archive_is_raw(text, tmp_path):
    path = tmp_path / "raw"
    path.write_bytes(text)
    assert compression.read(path).tobytes() == text


@pytest.mark.parametrize("kind", ["zip", "tar", "gz", "xz", "lzma", "bz2", "zst"])
def test_a_truncated_archive_is_refused_in_one_line(kind, packed, tmp_path):
    path = tmp_path / "cut"
    path.write_bytes(packed[kind].rstrip(b"\0")[:-20])
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


def test_a_tar_with_no_or_several_files_is_refused_whatever_is_wanted_of_it(tmp_path):
    path = tmp_path / "some.tar.gz"
    for count in (0, 2):
        path.write_bytes(gzip.compress(tar_of({"._only": b""} | {f"{number}": TEXT for number in range(count)})))
        for limit in (None, 10):
            with pytest.raises(DataError, match=f"must contain exactly one file, but contains {count}"):
                compression.read(path, limit)


LITTER = ["__MACOSX/folder/._file", ".DS_Store", "folder/.DS_Store", "folder/._file", "Thumbs.db", "folder/desktop.ini"]


def test_folders_and_the_litter_of_operating_systems_in_a_zip_do_not_count(tmp_path):
    path = tmp_path / "some.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/", b"")
        for name in LITTER:
            archive.writestr(name, b"litter")
        archive.writestr("folder/file", TEXT)
    assert compression.read(path).tobytes() == TEXT


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_same_in_a_tar_of_any_format(tmp_path, tar_format):
    path = tmp_path / "some.tar"
    path.write_bytes(tar_of({name: b"litter" for name in LITTER} | {f"{'a' * 90}/{'b' * 90}": TEXT}, tar_format))
    assert compression.read(path).tobytes() == TEXT


def test_a_tar_without_a_magic_number_is_a_tar(tmp_path):
    """As the first versions of Unix wrote it."""
    old = bytearray(tar_of({"file": TEXT}, tarfile.USTAR_FORMAT))
    old[257:265] = bytes(8)
    old[148:156] = b" " * 8
    old[148:156] = b"%06o\0 " % sum(old[:512])
    (tmp_path / "old").write_bytes(old)
    assert compression.read(tmp_path / "old").tobytes() == TEXT


@pytest.mark.parametrize(
    "pack",
    [
        *(pytest.param(pack, id=pack.__module__) for pack in (gzip.compress, bz2.compress, lzma.compress)),
        pytest.param(zst_of, id="zst"),
    ],
)
def test_what_was_unpacked_is_unpacked_again(packed, tmp_path, pack):
    for inner in ("tar", "zip", "gz"):
        (tmp_path / "both").write_bytes(pack(packed[inner].ljust(256, b"\0")))
        assert compression.read(tmp_path / "both").tobytes() == TEXT


def test_what_is_packed_too_many_times_is_refused(tmp_path):
    content = TEXT
    for times in range(1, 6):
        content = gzip.compress(content)
        (tmp_path / "file").write_bytes(content)
        if times < 5:
            assert compression.read(tmp_path / "file").tobytes() == TEXT
    with pytest.raises(DataError, match="file is packed more than 4 times: unpack it first"):
        compression.read(tmp_path / "file")


@pytest.mark.parametrize("kind", [None, "zip", "tar", "gz", "xz", "bz2", "zst"])
def test_standard_input_is_unpacked(packed, monkeypatch, kind):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(packed[kind])))
    assert b"".join(compression.chunks("-", 100)) == TEXT
    assert not sys.stdin.closed


def test_a_pipe_is_read_like_a_file(packed):
    for kind in (None, "zip", "gz"):
        reading, writing = os.pipe()
        with open(writing, "wb") as file:
            file.write(packed[kind])
        assert b"".join(compression.chunks(f"/dev/fd/{reading}")) == TEXT
        os.close(reading)


@pytest.mark.parametrize(
    ("name", "head", "command"),
    [
        ("7z", b"7z\xbc\xaf\x27\x1c\0\4", "7z x"),
        ("rar", b"Rar!\x1a\x07\x01\0", "unrar x"),
        ("lz4", b"\x04\x22\x4d\x18\x64\x40", "lz4 -d"),
        ("compress (.Z)", b"\x1f\x9d\x90", "uncompress"),
        ("lzip", b"LZIP\x01\x0c", "lzip -d"),
        ("lzop", b"\x89LZO\0\r\n\x1a\n", "lzop -d"),
        ("zpaq", b"7kSt\xa0\x31", "zpaq x"),
        ("cab", b"MSCF\0\0\0\0", "cabextract"),
        ("cpio", b"070701" + b"0" * 104, "cpio -i"),
        ("ar", b"!<arch>\ndebian-binary", "ar x"),
    ],
)
def test_other_archives_are_refused_saying_what_they_are_and_what_to_do(tmp_path, name, head, command):
    expected = f"is packed with {name}, which cannot be read: unpack it first, for example with {command}, and give the"
    for pack in (bytes, gzip.compress):
        (tmp_path / "corpus.txt").write_bytes(pack(head + TEXT))
        with pytest.raises(DataError, match=re.escape(f"{tmp_path}/corpus.txt {expected}")) as error:
            compression.read(tmp_path / "corpus.txt")
        assert "\n" not in str(error.value)


def test_without_its_package_zst_is_refused_naming_it(packed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "backports", None)
    (tmp_path / "corpus").write_bytes(packed["zst"])
    with pytest.raises(DataError, match=r"corpus is packed with zstd: pip install backports\.zstd, or unpack it first"):
        compression.read(tmp_path / "corpus")


def test_zst_files_of_several_frames_are_read(tmp_path):
    skippable = b"\x50\x2a\x4d\x18\x03\0\0\0abc"
    (tmp_path / "corpus").write_bytes(skippable + zst_of(TEXT) + skippable + zst_of(TEXT[::-1]))
    assert compression.read(tmp_path / "corpus").tobytes() == TEXT + TEXT[::-1]


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
