import numpy as np
import pytest

from local_attention import LocalMHA
from local_attention.backends.cached import CachedMHA
from tests.local_attention.backends.decode import decode
from tests.local_attention.cells import in_a_graph, randomise, run


@pytest.fixture
def mha():
    cell = LocalMHA(dim=6, window_size=3, dim_head=4, heads=2, causal=True)
    randomise(cell)
    return cell


@in_a_graph
def test_tokens_see_what_they_overwrite_in_the_cache(mode, mha, rng):
    """The cache holds 4 tokens: a chunk of 5 overwrites all of them, and its first tokens see the former ones."""
    x = rng.standard_normal((2, 10, 6))
    np.testing.assert_allclose(decode(CachedMHA, mha, x, count=5), run(mha, x), atol=1e-5)
