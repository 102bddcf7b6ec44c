"""Softmax attention by blocks of queries: the attention, its log-sum-exp, and what it may allocate."""

import pytest
import torch
import torch.nn.functional as F

from linearize.kernels.near_far.softmax import softmax_attention
from tests.cost import LargestTensor
from tests.tolerance import assert_near, worst

# batch, H, K, T, D, V, block
SHAPES = [
    (1, 1, 1, 1, 4, 4, 128),
    (2, 4, 2, 37, 8, 8, 128),  # one block that is not full
    (2, 4, 2, 37, 8, 6, 8),  # blocks that do not divide T, V other than D
    (1, 6, 1, 33, 8, 8, 16),
    (1, 3, 3, 32, 4, 12, 16),  # no tail
    (2, 4, 2, 9, 4, 4, 1),
    (1, 2, 1, 300, 16, 16, 128),
]


def make_inputs(shape, dtype=torch.float64, factor=2.0):
    batch, heads, kv_heads, length, size, value_size, _ = shape
    q = factor * torch.randn(batch, heads, length, size, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, length, size, dtype=torch.float64)
    v = torch.randn(batch, kv_heads, length, value_size, dtype=torch.float64)
    return tuple(x.to(dtype) for x in (q, k, v))


def torch_attention(q, k, v, scale=None):
    """torch's own, and log-sum-exps of explicit T x T logits; heads repeated by hand."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    past = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    return out, logits.masked_fill(~past, -torch.inf).logsumexp(-1)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch(shape, dtype, scale):
    inputs = make_inputs(shape, dtype)
    for actual, expected in zip(
        softmax_attention(*inputs, scale=scale, block=shape[-1]), torch_attention(*inputs, scale)
    ):
        assert_near(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    inputs = make_inputs((2, 4, 2, 37, 8, 6, 8), dtype)
    out, lse = softmax_attention(*inputs, block=8)
    assert out.dtype == lse.dtype == torch.float32
    expected = torch_attention(*(x.double() for x in inputs))
    assert worst(out, expected[0]) < 1e-5
    assert worst(lse, expected[1]) < 1e-5


def test_the_default_block_changes_nothing():
    inputs = make_inputs((1, 2, 1, 300, 16, 16, 0), torch.float32)
    for actual, expected in zip(softmax_attention(*inputs), softmax_attention(*inputs, block=300)):
        assert_near(actual, expected)


def test_weights_sum_to_one_at_large_logits():
    q, k, v = make_inputs((1, 4, 2, 64, 16, 8, 16), torch.float32, factor=1e4)
    out, lse = softmax_attention(q, k, torch.ones_like(v), block=16)
    assert lse.abs().max() > 1e4
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-6)


def test_a_later_token_changes_nothing():
    q, k, v = make_inputs((1, 4, 2, 40, 8, 8, 16), torch.float32)
    out, lse = softmax_attention(q, k, v, block=16)
    for x in (q, k, v):
        x[:, :, 23:] = 7.0
    changed, changed_lse = softmax_attention(q, k, v, block=16)
    assert torch.equal(changed[:, :, :23], out[:, :, :23])
    assert torch.equal(changed_lse[:, :, :23], lse[:, :, :23])
    assert not torch.equal(changed[:, :, 23:], out[:, :, 23:])


def test_no_tensor_of_length_squared():
    largest = {}
    for length in (1024, 4096):
        inputs = make_inputs((1, 4, 2, length, 16, 16, 0), torch.float32)
        with LargestTensor() as record:
            softmax_attention(*inputs, block=64)
        largest[length] = record.bytes
    assert largest[4096] <= 4.1 * largest[1024]
    assert largest[4096] <= 1.1 * 4 * 4 * 64 * 4096  # float32, 4 heads, a block of queries, every key
