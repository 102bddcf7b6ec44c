"""Recurrent mixers and mix "peak", against their formulas written as loops; decoding, padding, documents, gradients."""

from itertools import pairwise

import pytest
import torch

from linearize.errors import LinearizeError
from linearize.kernels.near_far import Memory, near_far_attention, near_far_reference, near_far_step
from linearize.kernels.near_far.mixers import Gla, Hedgehog, Mixer, near_part, state_obstacle
from linearize.kernels.near_far.ops import far_read
from tests.near_far_cases import hedgehog, in_steps, make_mask
from tests.tolerance import assert_near

BATCH, HEADS, KV_HEADS, SIZE, LENGTH = 2, 4, 2, 6, 29
SHAPE = {"window": 4, "sinks": 2}
PIECES = (3, 1, 1, 7, 1, 1, 1, 1, 1, 11, 1)


def make_gla(length=LENGTH, batch=BATCH, seed=0, dtype=torch.float64):
    """q and k with their plain halves, v, mixer, mix_logit one a head and query."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, logit = (
        torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)
        for sizes in (
            (batch, HEADS, length, 2 * SIZE),
            (batch, KV_HEADS, length, 2 * SIZE),
            (batch, KV_HEADS, length, 5),
            (batch, HEADS, length),
        )
    )
    return 3 * q, 3 * k, v, Gla(HEADS, KV_HEADS, SIZE), logit


def make_peak(seed=0):
    """q, k, v, mixer, mix_logit one a head."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, logit = (
        torch.randn(*sizes, generator=generator, dtype=torch.float64)
        for sizes in (
            (BATCH, HEADS, LENGTH, SIZE),
            (BATCH, KV_HEADS, LENGTH, SIZE),
            (BATCH, KV_HEADS, LENGTH, 5),
            (HEADS,),
        )
    )
    return 4 * q, 2 * k, v, Hedgehog(HEADS, KV_HEADS, SIZE, 3).double(), logit


def near_weights(q, k, size, window, sinks):
    """T x T softmax weights over the near keys of one head, and the exponentials from the peak: q, k (T, size)."""
    weights = torch.zeros(len(q), len(q), dtype=torch.float64)
    for t in range(len(q)):
        near = [i for i in range(t + 1) if i < sinks or i // window >= t // window - 1]
        logits = torch.stack([q[t] @ k[i] for i in near]) * size**-0.5
        weights[t, near] = (logits - logits.max()).exp()
    return weights


def gla_by_hand(q, k, v, logit, *, window, sinks, decay=True):
    """One sequence and head: q, k (T, 2 D), v (T, V), logit (T,). The state's weights are products of single gates."""
    count = len(q)
    near = near_weights(q[:, :SIZE], k[:, :SIZE], SIZE, window, sinks)
    near = near / near.sum(-1, keepdim=True)
    phi_q, phi_k = q[:, SIZE:].softmax(-1), k[:, SIZE:].softmax(-1)
    gates = (1 / (1 + (-k[:, SIZE:]).exp())) ** (1 / 16) if decay else torch.ones(count, SIZE, dtype=torch.float64)
    state = torch.zeros(count, count, dtype=torch.float64)
    for t in range(count):
        for i in range(t + 1):
            between = gates[i + 1 : t + 1].prod(0)
            state[t, i] = (phi_q[t] * between * phi_k[i]).sum()
    share = 1 / (1 + (-logit[:, None]).exp())
    return ((1 - share) * near + share * state) @ v


def peak_by_hand(q, k, v, query_weight, key_weight, logit, *, window, sinks):
    """One sequence and head of mix "peak": q, k (T, D)."""
    near = near_weights(q, k, q.shape[1], window, sinks)
    features = hedgehog(q, query_weight) @ hedgehog(k, key_weight).T
    far = torch.zeros_like(near)
    for t in range(len(q)):
        for i in range(t + 1):
            if i >= sinks and i // window < t // window - 1:
                far[t, i] = logit.exp() * features[t, i]
    both = near + far
    return both / both.sum(-1, keepdim=True) @ v


def by_hand(make, inputs, mask=None, **options):
    """All rows and heads by the formulas above, padding left out."""
    q, k, v, mixer, logit = inputs
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        real = torch.arange(q.shape[2]) if mask is None else mask[b].nonzero()[:, 0]
        for h in range(HEADS):
            kv = h // (HEADS // KV_HEADS)
            one = q[b, h, real], k[b, kv, real], v[b, kv, real]
            if make is make_gla:
                out[b, h, real] = gla_by_hand(*one, logit[b, h, real], **options)
            else:
                weights = mixer.query_weight[h], mixer.key_weight[kv]
                out[b, h, real] = peak_by_hand(*one, *weights, logit[h], **options)
    return out


CASES = [(make_gla, "gate"), (make_peak, "peak")]


@pytest.mark.parametrize(("make", "mix"), CASES)
class TestAgainstLoops:
    @pytest.mark.parametrize("backend", ["reference", "torch"])
    @pytest.mark.parametrize("padding", ["full", "left", "holes"])
    def test_whole_text(self, make, mix, padding, backend):
        inputs, mask = make(), make_mask(padding, BATCH, LENGTH)
        with torch.no_grad():
            expected = by_hand(make, inputs, mask, **SHAPE)
            assert_near(near_far_attention(*inputs, **SHAPE, mix=mix, mask=mask, backend=backend), expected)

    @pytest.mark.parametrize("padding", ["full", "left", "right"])
    def test_steps_of_decoding(self, make, mix, padding):
        inputs, mask = make(), make_mask(padding, BATCH, LENGTH)
        with torch.no_grad():
            expected = by_hand(make, inputs, mask, **SHAPE)
            out, _ = in_steps(PIECES, *inputs, mask=mask, **SHAPE, mix=mix)
        assert_near(out, expected)

    def test_documents_are_sequences_of_their_own(self, make, mix):
        q, k, v, mixer, logit = make()
        q, k, v = (x[:1] for x in (q, k, v))
        borders = [0, 9, 10, 10, 26, LENGTH]
        logit = logit[:1] if logit.ndim == 3 else logit
        with torch.no_grad():
            parts = [
                by_hand(make, (*(x[:, :, a:b] for x in (q, k, v)), mixer, _part(logit, a, b)), **SHAPE)
                for a, b in pairwise(borders)
            ]
            for backend in ("reference", "torch"):
                out = near_far_attention(
                    *(q, k, v, mixer, logit), **SHAPE, mix=mix, cu_seqlens=torch.tensor(borders), backend=backend
                )
                assert_near(out, torch.cat(parts, dim=2))

    def test_gradients(self, make, mix):
        q, k, v, mixer, logit = make()
        leaves = [x.requires_grad_() for x in (q, k, v, logit)]
        grads = []
        for backend in ("reference", "torch"):
            out = near_far_attention(*leaves[:3], mixer, leaves[3], **SHAPE, mix=mix, backend=backend)
            grads.append(torch.autograd.grad(out.square().sum(), leaves))
        for x, expected in zip(*grads, strict=True):
            assert expected.abs().max() > 1e-3
            assert_near(x, expected)


def _part(logit, first, last):
    return logit[:, :, first:last] if logit.ndim == 3 else logit


class TestGla:
    def test_the_decays_count(self):
        inputs = make_gla()
        right = near_far_attention(*inputs, **SHAPE, mix="gate")
        without = by_hand(make_gla, inputs, **SHAPE, decay=False)
        assert (right - without).abs().max() > 0.05

    def test_no_parameter_of_its_own(self):
        assert not list(Gla(4, 2, 8).parameters())

    def test_float32_over_a_long_text(self):
        """States of 600 tokens, and gates so strong that their product is 0."""
        q, k, v, mixer, logit = make_gla(600, 1, dtype=torch.float32)
        k[..., 300:310, SIZE:] -= 3000
        exact = near_far_attention(
            *(x.double() for x in (q, k, v)), mixer, logit.double(), **SHAPE, mix="gate", backend="reference"
        )
        assert_near(near_far_attention(q, k, v, mixer, logit, **SHAPE, mix="gate"), exact.float())

    def test_a_nan_in_padding_reaches_nothing(self):
        q, k, v, mixer, logit = make_gla()
        mask = make_mask("left", BATCH, LENGTH)
        clean = near_far_attention(q, k, v, mixer, logit, **SHAPE, mix="gate", mask=mask)
        dirty = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (q, k, v))
        assert torch.equal(near_far_attention(*dirty, mixer, logit, **SHAPE, mix="gate", mask=mask), clean)

    def test_a_prefill_leaves_a_memory_of_constant_size(self):
        """Not views of what the prefill computed for every chunk."""
        held = []
        for length in (60, 600):
            q, k, v, mixer, logit = make_gla(length, 1)
            memory = Memory.empty(k, v, mixer, **SHAPE)
            with torch.no_grad():
                _, memory = near_far_step(q, k, v, memory, mixer, logit, **SHAPE, mix="gate")
            tensors = (memory.keys, memory.values, *memory.state)
            held.append(sum(x.untyped_storage().nbytes() for x in tensors))
        assert held[0] == held[1] == sum(memory.nbytes())

    def test_the_memory_keeps_rotated_keys_and_no_normaliser(self):
        q, k, v, mixer, logit = make_gla()
        memory = Memory.empty(k, v, mixer, **SHAPE)
        assert memory.near_k.shape[-1] == memory.sink_k.shape[-1] == SIZE
        assert memory.nbytes()[1] == BATCH * KV_HEADS * SIZE * 5 * 8
        one = (x[:, :, :1] for x in (q, k, v))
        with torch.no_grad():
            _, after = near_far_step(*one, memory, mixer, logit[:, :, :1], **SHAPE, mix="gate")
        assert after.state.s.data_ptr() == memory.state.s.data_ptr()  # a step is in place

    def test_half_precision(self):
        inputs = make_gla()
        exact = near_far_attention(*inputs, **SHAPE, mix="gate")
        q, k, v = (x.bfloat16() for x in inputs[:3])
        out = near_far_attention(q, k, v, *inputs[3:], **SHAPE, mix="gate")
        assert out.dtype == torch.bfloat16
        assert (out.double() - exact).abs().max() < 0.05

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"mix": "normalizer"}, "mix 'normalizer' weighs by a mass, and the state of Gla has none; use mix 'gate'"),
            ({"backend": "triton"}, "backend: 'triton' cannot run here"),
            ({"window": 0}, "near_far_attention: window 0 is below 1; use at least 1"),
        ],
    )
    def test_messages(self, changes, message):
        inputs = make_gla()
        with pytest.raises(LinearizeError, match=message):
            near_far_attention(*inputs, **(SHAPE | {"mix": "gate"} | changes))

    def test_other_messages(self):
        q, k, v, mixer, logit = make_gla()
        rotated = near_part(mixer, q), near_part(mixer, k), v
        with pytest.raises(LinearizeError, match="mixer Gla takes q and k of size 12, 6 channels after the rotary"):
            near_far_attention(*rotated, mixer, logit, **SHAPE, mix="gate")
        with pytest.raises(LinearizeError, match="far_read: Gla has near tokens in its state as well"):
            far_read(q, k, v, mixer, **SHAPE)
        memory = Memory.empty(rotated[1], v, None, **SHAPE)
        with pytest.raises(LinearizeError, match="holds no state, and mixer Gla needs"):
            near_far_step(q, k, v, memory, mixer, logit, **SHAPE, mix="gate")

    def test_the_reference_by_its_own_name(self):
        inputs = make_gla()
        expected = near_far_attention(*inputs, **SHAPE, mix="gate", backend="reference")
        assert torch.equal(near_far_reference(*inputs, **SHAPE, mix="gate"), expected)


class TestPeak:
    def test_it_is_no_normalizer(self):
        inputs = make_peak()
        peak, normalizer = (near_far_attention(*inputs, **SHAPE, mix=mix) for mix in ("peak", "normalizer"))
        assert (peak - normalizer).abs().max() > 0.05

    def test_a_shift_of_all_logits_changes_nothing(self):
        """What "peak" is for: q with a component that all keys share moves every near logit alike, by up to 800 here;
        features that do not see it give the same far mass, and so the same output."""
        q, k, v, mixer, logit = make_peak()
        with torch.no_grad():
            mixer.query_weight[:, -1] = 0.0
            mixer.key_weight[:, -1] = 0.0
        k[..., -1] = 1.0
        moved = q.clone()
        moved[..., -1] += 2000.0
        same = near_far_attention(q, k, v, mixer, logit, **SHAPE, mix="peak")
        assert_near(near_far_attention(moved, k, v, mixer, logit, **SHAPE, mix="peak"), same)

    def test_triton_does_not_know_it(self):
        assert state_obstacle(Hedgehog(2, 1, 4), "peak") == 'they do not know mix "peak"'
        assert state_obstacle(Hedgehog(2, 1, 4), "gate") is None
        assert state_obstacle(None, "peak") is None


def test_near_part():
    x = torch.arange(8.0).view(1, 1, 1, 8)
    assert torch.equal(near_part(Gla(2, 1, 4), x), x[..., :4])
    assert near_part(None, x) is x
    assert near_part(Hedgehog(2, 1, 8), x) is x
    assert Mixer.rotary
