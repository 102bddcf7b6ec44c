"""The chunked form in blocks: as many as there are, whatever they carry from one to the next, the result is one."""

import pytest
import torch

from linearize.kernels.near_far import Hedgehog, State, near_far_reference
from linearize.kernels.near_far import chunked as module
from linearize.kernels.near_far.chunked import (
    far_chunked,
    mix_near_far,
    near_chunked,
    near_far_chunked,
    near_far_rows,
    softmax_lse,
)
from tests.cost import LargestTensor, flops, peak_bytes
from tests.tolerance import assert_near

MIXES = (None, "normalizer", "gate")
HEADS, KV_HEADS, SIZE, VALUE_SIZE, FEATURES = 4, 2, 6, 5, 7


def make_inputs(batch, length, dtype=torch.float64, grad=False):
    """q, k, v, a mixer with random weights, a logit of the mix for each head and query."""
    q, k, v, logit = (
        torch.randn(batch, heads, length, *size, dtype=dtype)
        for heads, size in ((HEADS, [SIZE]), (KV_HEADS, [SIZE]), (KV_HEADS, [VALUE_SIZE]), (HEADS, []))
    )
    mixer = Hedgehog(HEADS, KV_HEADS, SIZE, FEATURES).to(dtype)
    for weight in mixer.parameters():
        torch.nn.init.normal_(weight)
    return *(x.requires_grad_(grad) for x in (q, k, v)), mixer, logit.requires_grad_(grad)


@pytest.fixture(params=[1, 2, 3, 100])
def chunks_a_block(request, monkeypatch):
    monkeypatch.setattr(module, "_block_chunks", lambda q, window, sinks: request.param)
    return request.param


@pytest.mark.parametrize("mix", MIXES)
# One chunk; fewer sinks than a window, and more than two; a last chunk that is full, and one that is not.
@pytest.mark.parametrize(("length", "window", "sinks"), [(3, 4, 1), (29, 4, 0), (32, 4, 3), (33, 4, 11)])
def test_blocks_are_the_formula(chunks_a_block, length, window, sinks, mix):
    gradients, outs = [], []
    mask = torch.arange(length) >= torch.tensor([[0], [2]])
    for form in (near_far_reference, near_far_chunked):
        torch.manual_seed(0)
        q, k, v, mixer, logit = make_inputs(2, length, grad=True)
        leaves = [q, k, v]
        if mix is not None:
            leaves += [logit, *mixer.parameters()]
        options = {"window": window, "sinks": sinks, "mix": mix or "normalizer", "mask": mask}
        out = form(q, k, v, None if mix is None else mixer, None if mix is None else logit, **options)
        outs.append(out)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        gradients.append(torch.autograd.grad((out * weight).sum(), leaves, materialize_grads=True))
        with torch.no_grad():  # other code: written in place
            assert_near(form(q, k, v, None if mix is None else mixer, logit, **options), out)
    assert_near(outs[1], outs[0])
    for expected, actual in zip(*gradients, strict=True):
        assert_near(actual, expected)


STARTS = [0, 8, torch.tensor([0, 12, 4])]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("start", STARTS, ids=str)
def test_rows_are_near_far_and_mix(chunks_a_block, monkeypatch, start, mix):
    """In blocks against the three functions in one block, with a state and sinks from before."""
    window, sinks, length = 4, 6, 28
    q, k, v, mixer, logit = make_inputs(3, length)
    sink_k, sink_v = (torch.randn(3, KV_HEADS, sinks, n, dtype=q.dtype) for n in (SIZE, VALUE_SIZE))
    state = State(*(torch.rand_like(x) for x in mixer.empty_state(k, v)))
    options = {"window": window, "start": start}
    rows = (q, k, v, sink_k, sink_v)
    out, *none = near_far_rows(
        *rows, None if mix is None else mixer, logit, mix=mix or "gate", state=state, scale=0.3, **options
    )
    assert none == [None, None]

    def apart():
        near = near_chunked(*rows, **options, scale=0.3)
        return *near, *far_chunked(q, k, v, mixer, sinks=sinks, state=state, **options)

    in_blocks = apart()
    monkeypatch.setattr(module, "_block_chunks", lambda q, window, sinks: None)
    near, lse, far, log_mass, states = apart()
    for actual, expected in zip(in_blocks[:4], (near, lse, far, log_mass), strict=True):
        assert_near(actual, expected)
    if mix is None:
        assert_near(out, near)
        return
    assert_near(out, mix_near_far(near, lse, far, log_mass, logit, mix))
    monkeypatch.setattr(module, "_block_chunks", lambda q, window, sinks: chunks_a_block)
    for keep in (0, 3, 6, torch.tensor([5, 0, 6]), torch.tensor([0, 1, 2])):
        _, kept, older = near_far_rows(*rows, mixer, logit, mix=mix, state=state, keep=keep, **options)
        index = torch.as_tensor(keep).expand(3)
        for name in ("s", "z"):
            whole = getattr(states, name)
            assert_near(getattr(kept, name), torch.stack([whole[b, :, i] for b, i in enumerate(index)]))
            assert not getattr(kept, name).requires_grad
            for b, i in enumerate(index.tolist()):
                if i:  # the state a chunk earlier; there is none before the first
                    assert_near(getattr(older, name)[b], whole[b, :, i - 1])


def test_softmax_lse():
    logits = (3 * torch.randn(2, 3, 5, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(softmax_lse, [logits])
    assert torch.autograd.gradgradcheck(softmax_lse, [logits])
    masked = logits.detach().float() * 1e4
    masked[..., 3:] = -torch.inf
    weights, lse = softmax_lse(masked)
    assert_near(weights, masked.softmax(-1))
    assert_near(lse, masked.logsumexp(-1))


H, K, D, W, S = 4, 2, 64, 64, 4


def make_run(length, grad):
    q, k, v = (torch.randn(1, heads, length, D, requires_grad=grad) for heads in (H, K, K))
    mixer, logit = Hedgehog(H, K, D), torch.zeros(H)

    def run():
        with torch.set_grad_enabled(grad):
            out = near_far_chunked(q, k, v, mixer, logit, window=W, sinks=S)
            if grad:
                torch.autograd.grad(out.sum(), [q, k, v, *mixer.parameters()])

    return run


@pytest.mark.parametrize("grad", [False, True])
def test_work_is_linear_and_no_more_than_the_formula_has(grad):
    work = {length: flops(make_run(length, grad)) for length in (2048, 8192)}
    assert work[8192] <= 4.01 * work[2048]
    # A query: L logits and as many values, D x D of features, 2 D features times V of state. A key and key head:
    # features, and its share of the state.
    query = 2 * (2 * (S + 2 * W) * D + D * D + 2 * D * D)
    key = 2 * (D * D + 2 * D * D)
    # The backward pass has two products for each of the forward pass, less those for inputs that are no leaves.
    assert work[8192] <= 1.02 * (3 if grad else 1) * 8192 * (H * query + K * key)


def test_memory_without_gradients_does_not_grow(monkeypatch):
    monkeypatch.setattr(module, "_block_chunks", lambda q, window, sinks: 16)
    peak = {length: peak_bytes(make_run(length, False)) for length in (4096, 16384)}
    out = {length: 4 * H * length * D for length in peak}
    beyond = {length: peak[length] - out[length] for length in peak}
    assert beyond[16384] <= 1.05 * beyond[4096]
    assert beyond[16384] < out[16384]


def test_no_state_is_repeated_for_query_heads():
    """8 query heads share a key head. Chunks are short and values long, so that a state for each query head and chunk
    would be the largest tensor: F V numbers against the F W of a chunk's features."""
    heads, size, window, length = 8, 128, 16, 512
    q, k, v = (torch.randn(1, n, length, size) for n in (heads, 1, 1))
    mixer = Hedgehog(heads, 1, size, size // 2)
    with torch.no_grad(), LargestTensor() as record:
        near_far_chunked(q, k, v, mixer, torch.zeros(heads), window=window)
    assert record.bytes <= 1.1 * 4 * heads * length * size
