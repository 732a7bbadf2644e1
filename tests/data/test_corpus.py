"""data.corpus: splits, bounds, fingerprint."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import Corpus, DataError


def corpus_of(size: int) -> Corpus:
    return Corpus("x", np.arange(size, dtype=np.uint64).astype(np.uint8))


def test_the_splits_of_enwik8_are_90_5_and_5_million_bytes():
    corpus = Corpus("enwik8", np.broadcast_to(np.uint8(0), 100_000_000))
    assert corpus.bounds("train") == (0, 90_000_000)
    assert corpus.bounds("val") == (90_000_000, 95_000_000)
    assert corpus.bounds("test") == (95_000_000, 100_000_000)


@given(st.integers(1, 5000))
def test_the_splits_in_order_are_the_corpus(size):
    corpus = corpus_of(size)
    np.testing.assert_array_equal(np.concatenate([corpus.train, corpus.val, corpus.test]), corpus.bytes)
    assert corpus.bounds("val") == (size * 90 // 100, size * 95 // 100)


def test_the_splits_are_views_that_cannot_be_written():
    array = np.zeros(100, np.uint8)
    corpus = Corpus("x", array)
    assert np.shares_memory(corpus.val, array)
    with pytest.raises(ValueError, match="read-only"):
        corpus.train[0] = 1
    assert array.flags.writeable, "the caller's own array stays as it was"


def test_the_fingerprint_is_the_start_of_the_sha256_of_all_bytes():
    corpus = corpus_of(1000)
    assert corpus.fingerprint == hashlib.sha256(corpus.bytes.tobytes()).hexdigest()[:16]
    assert corpus.fingerprint != corpus_of(999).fingerprint


def test_a_split_shorter_than_a_sequence_is_refused_with_both_numbers():
    corpus = corpus_of(1020)
    corpus.require("train", "val", "test", sequence_bytes=51)
    with pytest.raises(DataError) as error:
        corpus.require("train", "val", sequence_bytes=52)
    assert str(error.value) == (
        "the val split of x has 51 bytes, but a sequence needs train.seq_len + 1 = 52: "
        "use a larger file or a smaller train.seq_len"
    )
    corpus.require("train", sequence_bytes=900)


@pytest.mark.parametrize(
    ("own", "bounds"),
    [
        (["val"], {"train": (0, 950), "val": (0, 7), "test": (950, 1000)}),
        (["test"], {"train": (0, 950), "val": (950, 1000), "test": (0, 7)}),
        (["val", "test"], {"train": (0, 1000), "val": (0, 7), "test": (0, 7)}),
    ],
)
def test_a_split_with_bytes_of_its_own_leaves_its_part_to_the_training_split(own, bounds):
    texts = {split: np.full(7, number, np.uint8) for number, split in enumerate(own)}
    corpus = Corpus("x", corpus_of(1000).bytes, texts)
    assert {split: corpus.bounds(split) for split in bounds} == bounds
    for split, (start, stop) in bounds.items():
        wanted = texts[split] if split in own else corpus.bytes[start:stop]
        np.testing.assert_array_equal(corpus.split(split), wanted)
        np.testing.assert_array_equal(corpus.array(split), texts.get(split, corpus.bytes))
        assert not corpus.split(split).flags.writeable


def test_the_fingerprint_covers_the_bytes_of_all_splits_and_which_they_are():
    main, other = corpus_of(1000).bytes, np.ones(50, np.uint8)
    owns = [{}, {"val": other}, {"test": other}, {"val": other, "test": other}, {"val": other[:-1], "test": other}]
    fingerprints = [Corpus("x", main, own).fingerprint for own in owns]
    assert len(set(fingerprints)) == len(owns)
    assert fingerprints[3] == Corpus("y", main, {"test": other, "val": other}).fingerprint


def test_own_bytes_that_are_empty_or_shorter_than_a_sequence_are_refused_naming_the_key():
    with pytest.raises(DataError, match=r"data\.test_path is empty"):
        Corpus("x", corpus_of(1000).bytes, {"test": np.zeros(0, np.uint8)})
    corpus = Corpus("x", corpus_of(1000).bytes, {"val": np.zeros(9, np.uint8)})
    corpus.require("val", sequence_bytes=9)
    with pytest.raises(DataError, match=r"^data\.val_path has 9 bytes, but a sequence needs .* = 10: use a larger"):
        corpus.require("train", "val", "test", sequence_bytes=10)


def test_an_unknown_split_is_refused_by_name():
    with pytest.raises(DataError, match="one of the splits train, val, test, got 'valid'"):
        corpus_of(10).split("valid")


@pytest.mark.parametrize(
    "array, complaint",
    [
        (np.zeros(0, np.uint8), "x is empty"),
        (np.zeros(4, np.int64), "one-dimensional uint8 array, got int64"),
        (np.zeros((2, 2), np.uint8), r"of shape \(2, 2\)"),
    ],
)
def test_other_arrays_than_one_dimensional_uint8_are_refused(array, complaint):
    with pytest.raises(DataError, match=complaint):
        Corpus("x", array)
