"""data.stdlib: the same bytes on every machine with the same Python."""

import os
import shutil

import pytest

from data import DataError
from data.stdlib import source_text


@pytest.fixture
def library(tmp_path):
    for name in (
        "abc.py",
        "zipfile.py",
        "json/decoder.py",
        "json/notes.txt",
        "site-packages/numpy.py",
        "dist-packages/six.py",
        "json/__pycache__/decoder.py",
        "test/test_abc.py",
        "lib2to3/tests/test_all.py",
        "idlelib/idle_test/test_run.py",
        "_sysconfigdata__linux.py",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}")
    return tmp_path


def lines(root) -> list[str]:
    return source_text(root, min_bytes=1).tobytes().decode().split("\n")


def test_only_the_sources_of_the_library_itself_are_used_joined_by_newlines(library):
    assert sorted(lines(library)) == ["# abc.py", "# json/decoder.py", "# zipfile.py"]


def test_the_order_is_fixed_by_the_names_alone(library, tmp_path):
    assert lines(library) == ["# json/decoder.py", "# zipfile.py", "# abc.py"], "by the sha256 of the names"
    copy = shutil.copytree(library, tmp_path / "copy")
    assert lines(copy) == lines(library / "copy")


def test_a_file_that_cannot_be_read_is_left_out(library):
    os.symlink(library / "nowhere", library / "broken.py")
    assert len(lines(library)) == 3


def test_a_python_without_its_sources_is_refused(library):
    with pytest.raises(DataError, match="contains 39 bytes of Python sources, but at least 1,000,000 are needed"):
        source_text(library)
