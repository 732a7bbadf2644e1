"""data.load: the corpus that a config describes."""

import gzip
import hashlib
import logging
import re
from pathlib import Path
from types import SimpleNamespace as Config

import numpy as np
import pytest

from data import DataError, load

HEAD = Path(__file__).parents[2].parent / "shared" / "data" / "enwik8-head.xz"
TEXT = bytes(range(256)) * 4


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setenv("ENWIK8_MIRRORS", "no-address")


def test_a_file_becomes_a_corpus_with_its_name(tmp_path, caplog):
    (tmp_path / "book.txt").write_bytes(TEXT)
    with caplog.at_level(logging.INFO, "data"):
        corpus = load(Config(source="file", path=str(tmp_path / "book.txt")))
    assert corpus.name == "book.txt" and corpus.bytes.tobytes() == TEXT
    assert not corpus.bytes.flags.writeable
    assert caplog.messages == [f"book.txt: 1,024 bytes, fingerprint {hashlib.sha256(TEXT).hexdigest()[:16]}"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_max_bytes_is_applied_before_splitting(tmp_path, pack):
    (tmp_path / "book").write_bytes(pack(TEXT))
    corpus = load(Config(source="file", path=tmp_path / "book", max_bytes=100))
    assert corpus.bytes.tobytes() == TEXT[:100]
    assert corpus.bounds("val") == (90, 95)


def test_validation_and_test_have_own_files_packed_or_not_with_any_source(tmp_path, caplog):
    (tmp_path / "book").write_bytes(TEXT)
    (tmp_path / "valid.gz").write_bytes(gzip.compress(b"to validate"))
    (tmp_path / "test.txt").write_bytes(b"to test")
    own = {"val_path": str(tmp_path / "valid.gz"), "test_path": tmp_path / "test.txt"}
    with caplog.at_level(logging.INFO, "data"):
        corpus = load(Config(source="file", path=tmp_path / "book", max_bytes=1000, **own))
    splits = [corpus.split(name).tobytes() for name in ("train", "val", "test")]
    assert splits == [TEXT[:1000], b"to validate", b"to test"]
    assert caplog.messages[1:] == [f"val: {tmp_path}/valid.gz, 11 bytes", f"test: {tmp_path}/test.txt, 7 bytes"]
    corpus = load(Config(source="stdlib", max_bytes=1000, test_path=own["test_path"], val_path=None))
    assert (corpus.train.size, corpus.val.size, corpus.test.tobytes()) == (950, 50, b"to test")


@pytest.mark.parametrize("key", ["val_path", "test_path"])
def test_an_own_file_that_is_missing_is_refused(key):
    with pytest.raises(DataError, match="/no/such/file does not exist"):
        load(Config(source="stdlib", **{key: "/no/such/file"}))


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "book").write_bytes(TEXT)
    assert load(Config(source="file", path="~/book")).bytes.tobytes() == TEXT


@pytest.mark.skipif(not HEAD.exists(), reason=f"needs the first bytes of the real enwik8 at {HEAD}")
def test_the_head_of_enwik8_has_the_published_hashes():
    for size, sha256 in [
        (100_000, "581bee9758c531de3795885a1adb331b9c51bfdeefd9a63407815479e22a9072"),
        (1_000_000, "369b688978f649681136198fb96db14c1616756260c55fb4b65e9bc049552cad"),
    ]:
        corpus = load(Config(source="file", path=HEAD, max_bytes=size))
        assert hashlib.sha256(corpus.bytes).hexdigest() == sha256
        assert corpus.fingerprint == sha256[:16]


def test_the_splits_of_the_standard_library_are_similar():
    corpus = load(Config(source="stdlib"))
    assert corpus.name == "stdlib" and corpus.bytes.size > 1_000_000
    assert corpus.fingerprint == load(Config(source="stdlib")).fingerprint
    train, val = (np.bincount(split, minlength=256) / split.size for split in (corpus.train, corpus.val))
    assert np.abs(train - val).sum() < 0.4, "the frequencies of their bytes differ little"


def test_for_a_wrong_enwik8_the_fallback_is_not_used(tmp_path, no_network):
    (tmp_path / "enwik8").write_bytes(TEXT)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'enwik8'} is not enwik8: it has 1,024 bytes")):
        load(Config(source="enwik8", dir=str(tmp_path), fallback="stdlib"))


def test_without_enwik8_and_network_the_error_names_the_alternatives(tmp_path, no_network, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        load(Config(source="enwik8", dir="here", fallback=None))
    assert str(error.value) == (
        f"enwik8 is not in {tmp_path / 'here'} and cannot be downloaded (no-address: not an http or https address): "
        "put enwik8 or enwik8.zip there, or use data=stdlib, or data=file data.path=FILE"
    )


def test_the_fallback_is_a_warning_of_one_line(tmp_path, no_network, caplog):
    corpus = load(Config(source="enwik8", dir=tmp_path, fallback="stdlib", max_bytes=1000))
    assert corpus.name == "stdlib" and corpus.bytes.size == 1000
    warnings = [record for record in caplog.records if "NOT ENWIK8" in record.message]
    assert [record.levelname for record in warnings] == ["WARNING"]
    assert "standard library" in warnings[0].message and "\n" not in warnings[0].message


@pytest.mark.parametrize(
    "config, complaint",
    [
        (Config(source="text8"), "data.source: expected enwik8, stdlib or file, got 'text8'"),
        (Config(source="file"), "data=file needs a path: give data.path=FILE"),
        (Config(source="file", path="/no/such/file"), "/no/such/file does not exist"),
        (Config(source="enwik8", fallback="enwik9"), "data.fallback: expected null or stdlib, got 'enwik9'"),
        (Config(source="stdlib", max_bytes=0), "data.max_bytes: expected null or a number of bytes, at least 1, got 0"),
        (Config(source="stdlib", max_bytes=True), "got True"),
        (Config(source="stdlib", max_bytes="10MB"), "got '10MB'"),
    ],
)
def test_an_invalid_setting_is_refused_in_one_line(config, complaint):
    with pytest.raises(DataError, match=re.escape(complaint)) as error:
        load(config)
    assert "\n" not in str(error.value)
