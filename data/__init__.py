"""Training data: finding or downloading the bytes, splitting them, sampling sequences for each step.

    corpus = load(config.data)                                     # enwik8, the standard library, or a file
    corpus.require("train", "val", sequence_bytes=seq_len + 1)
    sampler = SequenceSampler(corpus.train, sequence_bytes=seq_len + 1, seed=42)
    batch = sampler.sequences(first_index=step * batch_size, count=batch_size)   # (batch_size, seq_len + 1) uint8

enwik8 is downloaded into this folder.
"""

from data.corpus import Corpus
from data.errors import DataError
from data.sampler import SequenceSampler
from data.sources import load

__all__ = ["Corpus", "DataError", "SequenceSampler", "load"]
