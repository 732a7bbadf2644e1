"""The bytes a model learns from: where they come from, how they are split, which crops a step sees.

    corpus = load(config.data)                                     # enwik8, the standard library, or a file
    corpus.require("train", "val", sequence_bytes=seq_len + 1)
    sampler = SequenceSampler(corpus.train, sequence_bytes=seq_len + 1, seed=42)
    crops = sampler.crops(first_index=step * batch_size, count=batch_size)   # (batch_size, seq_len + 1) uint8

A downloaded enwik8 lies in this folder, beside the code.
"""

from data.corpus import Corpus
from data.errors import DataError
from data.sampler import SequenceSampler
from data.sources import load

__all__ = ["Corpus", "DataError", "SequenceSampler", "load"]
