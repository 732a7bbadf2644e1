import platform
from shutil import which

import numpy as np
import pytest

from local_attention.decoding import DecodingSession
from local_attention.kernels import has_gemm, library, operator
from tests.local_attention.models import needs_kernels, sequences, transformer


def test_the_kernels_are_there_wherever_they_can_be_built():
    """So that the tests that need them are skipped for want of a compiler alone."""
    can_build = platform.system() == "Linux" and which("g++") is not None
    assert library() is not None or not can_build, "pip had g++ but did not build the operators: install again with -v"
    assert library() is None or has_gemm(), "the operators were built, but MindSpore's oneDNN was not found"


@needs_kernels
def test_a_library_built_from_former_sources_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"without attend_to_all: pip install -e \. builds it again"):
        operator("attend_to_all")


@needs_kernels
@pytest.mark.parametrize(("batch", "dim", "heads", "dim_head"), [(8, 37, 2, 17), (19, 70, 5, 8), (1, 96, 1, 64)])
def test_the_kernels_compute_what_the_operators_do_for_sizes_that_fill_no_vectors(batch, dim, heads, dim_head):
    sizes = dict(dim=dim, heads=heads, dim_head=dim_head, local_attn_window_size=21, ff_mult=3)
    model, x = transformer(use_rotary_pos_emb=False, **sizes), sequences(batch, 28)
    logits = []
    for use_kernels in (True, False):
        session = DecodingSession(model, batch, prefill_chunk=24, prefill_threshold=24, use_kernels=use_kernels)
        session.feed(x[:, :24])  # fills the cache of 22 tokens
        logits.append(session.feed(x[:, 24:]))
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_the_kernels_give_the_same_bits_again_and_again():
    """Whichever of their threads computes what."""
    session, x = DecodingSession(transformer(dim=96, heads=4, dim_head=64), 3), sequences(3, 16)
    first = session.feed(x)
    for _ in range(5):
        session.reset()
        np.testing.assert_array_equal(session.feed(x), first)
