"""GlobalAttention beside PyTorch's fused attention, where PyTorch is installed."""

import numpy as np
import pytest

from local_attention.global_attention import WholeSequenceAttention
from local_attention.options import GlobalAttentionOptions
from tests.local_attention.cells import both_paths, value_and_gradients

torch = pytest.importorskip("torch")

SHAPES = [(1, 1, 1, 2), (2, 3, 5, 8), (1, 2, 67, 16), (3, 1, 130, 64), (1, 4, 300, 32), (2, 2, 513, 6)]


@both_paths
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_are_those_of_pytorch(shape, is_causal, path, rng):
    """Queries, keys and values of unit variance; the gradients are of a sum of all outputs with random weights."""
    options = GlobalAttentionOptions(dim=8, dim_head=shape[-1], causal=is_causal, use_rotary_pos_emb=False).attention()
    *inputs, cotangent = rng.standard_normal((4, *shape)).astype(np.float32)
    value, gradients = value_and_gradients(WholeSequenceAttention(**vars(options)), inputs, cotangent)
    theirs = [torch.from_numpy(array).requires_grad_() for array in inputs]
    out = torch.nn.functional.scaled_dot_product_attention(*theirs, is_causal=is_causal)
    out.backward(torch.from_numpy(cotangent))
    np.testing.assert_allclose(value, out.detach().numpy(), atol=1e-5)
    for ours, tensor in zip(gradients, theirs, strict=True):
        np.testing.assert_allclose(ours, tensor.grad.numpy(), atol=1e-4)
