"""Near-and-far attention: the formula, the chunked form and the decode step are one definition."""

import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from linearize.errors import LinearizeError
from linearize.kernels.near_far import (
    MIXERS,
    Hedgehog,
    Memory,
    State,
    near_far_attention,
    near_far_reference,
    near_far_step,
)
from linearize.kernels.near_far.chunked import near_far_chunked
from linearize.kernels.near_far.mixers import Gla
from tests.cost import LargestTensor, flops, growth_of_time, peak_bytes
from tests.near_far_cases import (
    FAR,
    MIXES,
    PADDING,
    Functional,
    by_hand,
    far_options,
    hedgehog,
    in_steps,
    make_inputs,
    make_mask,
)
from tests.tolerance import assert_near, worst

# batch, H, K, T, D, V, W, S, feature_dim
SHAPES = [
    (1, 1, 1, 1, 4, 4, 1, 0, 4),
    (1, 1, 1, 9, 4, 4, 1, 0, 4),  # chunks of one token
    (1, 2, 1, 9, 4, 4, 1, 3, 4),  # S > W
    (2, 2, 2, 2, 4, 6, 3, 1, 4),  # W > T
    (2, 4, 2, 13, 4, 6, 3, 0, 5),
    (2, 4, 2, 13, 4, 3, 3, 1, 4),
    (2, 4, 1, 29, 6, 4, 4, 2, 9),  # features wider than the head
    (2, 3, 3, 29, 6, 8, 5, 7, 3),  # S > W; features narrower
    (1, 6, 2, 29, 6, 4, 7, 14, 6),  # S = 2 W
    (2, 4, 2, 11, 4, 4, 3, 40, 4),  # S > T
    (2, 4, 2, 11, 4, 4, 16, 2, 4),
    (2, 4, 2, 11, 4, 4, 16, 40, 4),  # S > W > T
    (2, 4, 2, 32, 4, 4, 8, 4, 4),  # no tail
    (2, 4, 2, 33, 4, 4, 8, 4, 4),
    (1, 2, 1, 70, 8, 8, 9, 5, 8),
]


class TestFullForm:
    @pytest.mark.parametrize("padding", PADDING)
    @pytest.mark.parametrize("far", FAR)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_chunked(self, shape, far, padding):
        batch, length, window, sinks = shape[0], shape[3], shape[6], shape[7]
        q, k, v, *rest = make_inputs(shape)
        mixer, mix_logit, mix = far_options(far, *rest)
        options = {"window": window, "sinks": sinks, "mix": mix, "mask": make_mask(padding, batch, length)}
        reference = near_far_attention(q, k, v, mixer, mix_logit, **options, backend="reference")
        chunked = near_far_attention(q, k, v, mixer, mix_logit, **options, backend="torch")
        assert_near(chunked, reference)
        assert_near(reference, by_hand(q, k, v, mixer, mix_logit, **options))

    @pytest.mark.parametrize("scale", [0.5, -0.3, 0.0])
    def test_scale(self, scale):
        q, k, v, mixer, mix_logit = make_inputs(SHAPES[4])
        options = {"window": 3, "sinks": 2, "scale": scale}
        expected = by_hand(q, k, v, mixer, mix_logit, **options)
        for backend in ("reference", "torch"):
            assert_near(near_far_attention(q, k, v, mixer, mix_logit, **options, backend=backend), expected)

    @pytest.mark.parametrize("mix", MIXES)
    def test_no_mix_logit_is_zeros(self, mix):
        q, k, v, mixer, _ = make_inputs(SHAPES[4])
        options = {"window": 3, "mix": mix}
        expected = by_hand(q, k, v, mixer, torch.zeros(4), sinks=0, **options)
        for backend in ("reference", "torch"):
            assert_near(near_far_attention(q, k, v, mixer, **options, backend=backend), expected)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("far", FAR)
    @pytest.mark.parametrize("backend", ["reference", "torch"])
    @pytest.mark.parametrize(("length", "window"), [(12, 12), (12, 13), (11, 64), (16, 8)])
    def test_all_in_the_window_is_softmax_attention(self, length, window, backend, far, dtype):
        q, k, v, *rest = make_inputs((2, 4, 2, length, 8, 5, window, 3, 8), dtype)
        mixer, mix_logit, mix = far_options(far, *rest)
        out = near_far_attention(q, k, v, mixer, mix_logit, window=window, sinks=3, mix=mix, backend=backend)
        assert_near(out, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))

    def test_the_far_side_matters(self):
        """Or the comparisons above would show little."""
        q, k, v, mixer, mix_logit = make_inputs(SHAPES[-1])
        window_only = near_far_attention(q, k, v, window=9, sinks=5)
        for mix in MIXES:
            out = near_far_attention(q, k, v, mixer, mix_logit, window=9, sinks=5, mix=mix)
            assert_near(out[:, :, :18], window_only[:, :, :18])  # chunks 0 and 1 have no far term
            assert (out[:, :, 23:] - window_only[:, :, 23:]).abs().mean() > 1e-2

    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_padding_tokens_are_never_read(self, backend):
        q, k, v, mixer, mix_logit = make_inputs(SHAPES[5])
        for padding in PADDING[1:]:
            mask = make_mask(padding, 2, 13)
            options = {"window": 3, "sinks": 1, "mask": mask, "backend": backend}
            out = near_far_attention(q, k, v, mixer, mix_logit, **options)
            loud = [x.masked_fill(~mask[:, None, :, None], 1e4) for x in (q, k, v)]
            loud_logit = mix_logit.masked_fill(~mask[:, None], 1e4)
            assert torch.equal(near_far_attention(*loud, mixer, loud_logit, **options), out)
            assert bool((out.transpose(1, 2)[~mask] == 0).all())

    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_row_of_padding_only(self, backend):
        q, k, v, mixer, mix_logit = make_inputs(SHAPES[5], grad=True)
        mask = torch.ones(2, 13, dtype=torch.bool)
        mask[1] = False
        out = near_far_attention(q, k, v, mixer, mix_logit, window=3, sinks=1, mask=mask, backend=backend)
        out.square().sum().backward()
        assert bool((out[1] == 0).all())
        assert all(bool(x.grad.isfinite().all()) for x in (q, k, v, mix_logit, *mixer.parameters()))
        assert bool((q.grad[1] == 0).all())

    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_integer_mask(self, backend):
        q, k, v, mixer, mix_logit = make_inputs(SHAPES[5])
        mask = make_mask("holes", 2, 13)
        options = {"window": 3, "sinks": 1, "backend": backend}
        expected = near_far_attention(q, k, v, mixer, mix_logit, mask=mask, **options)
        assert torch.equal(near_far_attention(q, k, v, mixer, mix_logit, mask=mask.long(), **options), expected)

    @pytest.mark.parametrize("far", FAR)
    def test_strided_inputs(self, far):
        """The layout that a model hands over: (B, T, H, D) transposed."""
        q, k, v, *rest = make_inputs(SHAPES[5])
        mixer, mix_logit, mix = far_options(far, *rest)
        strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        options = {"window": 3, "sinks": 1, "mix": mix}
        out = near_far_attention(*strided, mixer, mix_logit, **options)
        assert_near(out, near_far_attention(q, k, v, mixer, mix_logit, **options))

    @pytest.mark.parametrize("far", FAR)
    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_no_future_token_counts(self, backend, far):
        q, k, v, *rest = make_inputs(SHAPES[6])
        mixer, mix_logit, mix = far_options(far, *rest)
        options = {"window": 4, "sinks": 2, "mix": mix, "backend": backend}
        out = near_far_attention(q, k, v, mixer, mix_logit, **options)
        for t in (0, 3, 4, 11, 12, 28):
            changed = [x.clone() for x in (q, k, v)]
            for x in changed:
                x[:, :, t] += 5.0
            other = near_far_attention(*changed, mixer, mix_logit, **options)
            assert_near(other[:, :, :t], out[:, :, :t])
            assert worst(other[:, :, t], out[:, :, t]) > 1e-3


class TestGradients:
    @pytest.mark.parametrize("padding", PADDING)
    @pytest.mark.parametrize("far", FAR)
    @pytest.mark.parametrize("shape", [SHAPES[i] for i in (2, 5, 7, 9, 11, 13)], ids=str)
    def test_chunked(self, shape, far, padding):
        batch, length, window, sinks = shape[0], shape[3], shape[6], shape[7]
        gradients = {}
        for backend in ("reference", "torch"):
            q, k, v, *rest = make_inputs(shape, grad=True)
            mixer, mix_logit, mix = far_options(far, *rest)
            mask = make_mask(padding, batch, length)
            out = near_far_attention(
                q, k, v, mixer, mix_logit, window=window, sinks=sinks, mix=mix, mask=mask, backend=backend
            )
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
            (out * weight).sum().backward()
            named = {"q": q, "k": k, "v": v}
            if mixer is not None:
                named |= {"mix_logit": mix_logit} | dict(mixer.named_parameters())
            gradients[backend] = {name: x.grad for name, x in named.items()}
        for name, expected in gradients["reference"].items():
            assert_near(gradients["torch"][name], expected)
        for name in ("query_weight", "mix_logit"):
            if far != "none" and padding == "full" and length > 2 * window + sinks:
                assert gradients["torch"][name].abs().max() > 1e-3

    @pytest.mark.parametrize("far", FAR)
    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_numerical(self, backend, far):
        shape = (1, 2, 1, 7, 3, 2, 2, 1, 2)
        q, k, v, mixer, mix_logit = make_inputs(shape, grad=True)
        mask = torch.tensor([[False, True, True, True, True, True, True]])
        names = [name for name, _ in mixer.named_parameters()]

        def run(q, k, v, mix_logit, *weights):
            functional = Functional(mixer, dict(zip(names, weights, strict=True)))
            chosen, logit, mix = far_options(far, functional, mix_logit)
            logit = mix_logit[0, :, 0] if far == "one a head" else logit  # not a leaf of its own
            return near_far_attention(q, k, v, chosen, logit, window=2, sinks=1, mix=mix, mask=mask, backend=backend)

        assert torch.autograd.gradcheck(run, (q, k, v, mix_logit, *mixer.parameters()))


def piece_lengths(kind, length, window):
    """Lengths that add up to `length`."""
    if kind == "tokens":
        return [1] * length
    if kind == "prefill":
        first = max(1, length - 2 * window - 1)
        return [first] + [1] * (length - first)
    pattern = {
        "uneven": (1, 7, max(1, window - 1), window, window + 1, 3 * window + 5),
        "chunks": (window,),
        "mixed": (2 * window, 1, 1, 2, 1, window + 1, 1),
    }[kind]
    pieces, left = [], length
    while left:
        pieces.append(min(pattern[len(pieces) % len(pattern)], left))
        left -= pieces[-1]
    return pieces


class TestStep:
    # W = 1, S > W, S > T, a tail, T far above W; 43 tokens hold the whole uneven pattern.
    SHAPES = (
        (2, 2, 1, 12, 4, 3, 1, 2, 4),
        (2, 4, 2, 43, 4, 6, 4, 3, 5),
        (2, 3, 3, 29, 4, 4, 3, 10, 4),
        (1, 2, 1, 11, 4, 4, 2, 40, 4),
        (2, 4, 2, 33, 4, 4, 16, 0, 4),
    )

    @pytest.mark.parametrize("kind", ["tokens", "prefill", "uneven", "chunks", "mixed"])
    @pytest.mark.parametrize("padding", ["full", "left", "holes"])
    @pytest.mark.parametrize("far", FAR)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_equals_full_form(self, shape, far, padding, kind):
        batch, length, window, sinks = shape[0], shape[3], shape[6], shape[7]
        q, k, v, *rest = make_inputs(shape)
        mixer, mix_logit, mix = far_options(far, *rest)
        options = {"window": window, "sinks": sinks, "mix": mix}
        mask = make_mask(padding, batch, length)
        expected = near_far_attention(q, k, v, mixer, mix_logit, mask=mask, **options)
        with torch.no_grad():
            out, memory = in_steps(piece_lengths(kind, length, window), q, k, v, mixer, mix_logit, mask, **options)
        assert_near(out, expected)
        real = torch.full((batch,), length) if mask is None else mask.sum(-1)
        assert torch.equal(memory.lengths, real)

    @pytest.mark.parametrize("far", FAR)
    def test_with_gradients_on(self, far):
        """A single token takes another path there."""
        q, k, v, *rest = make_inputs(self.SHAPES[1], grad=True)
        mixer, mix_logit, mix = far_options(far, *rest)
        options = {"window": 4, "sinks": 3, "mix": mix}
        out, memory = in_steps([9, 1, 1, 1, 1, 30], q, k, v, mixer, mix_logit, **options)
        assert_near(out, near_far_attention(q, k, v, mixer, mix_logit, **options))
        assert not any(x.requires_grad for x in (memory.near_k, memory.near_v, memory.sink_k, memory.sink_v))
        assert memory.state is None or not any(x.requires_grad for x in memory.state)

    @pytest.mark.parametrize("padding", PADDING)
    @pytest.mark.parametrize("far", FAR[:3])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_gradients_of_one_piece(self, shape, far, padding):
        """Those of the full form: training with a cache, transformers' default, is training."""
        batch, length, window, sinks = shape[0], shape[3], shape[6], shape[7]
        gradients = []
        for form in ("full", "step"):
            q, k, v, *rest = make_inputs(shape, grad=True)
            mixer, mix_logit, mix = far_options(far, *rest)
            options = {"window": window, "sinks": sinks, "mix": mix}
            mask = make_mask(padding, batch, length)
            if form == "full":
                out = near_far_attention(q, k, v, mixer, mix_logit, mask=mask, **options)
            else:
                out, _ = in_steps([length], q, k, v, mixer, mix_logit, mask, **options)
            leaves = [q, k, v] if mixer is None else [q, k, v, mix_logit, *mixer.parameters()]
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
            gradients.append(torch.autograd.grad((out * weight).sum(), leaves))
        for full, step in zip(*gradients, strict=True):
            assert_near(step, full)

    def test_bytes_are_constant(self):
        q, k, v, mixer, mix_logit = make_inputs((2, 4, 2, 200, 4, 6, 4, 3, 5), torch.float32)
        sizes = set()
        with torch.no_grad():
            memory = Memory.empty(k, v, mixer, window=4, sinks=3)
            for piece in (1, 1, 5, 40, 1, 3, 100, 1, 1, 1):
                x = (q[:, :, :piece], k[:, :, :piece], v[:, :, :piece])
                _, memory = near_far_step(*x, memory, mixer, mix_logit[:, :, :piece], window=4, sinks=3)
                sizes.add(memory.nbytes())
        # (3 W + S) keys of D and values of V, and twice F (V + 1) of state: a batch row and a key head each, 4 bytes.
        assert sizes == {(2 * 2 * (12 + 3) * (4 + 6) * 4, 2 * 2 * 2 * 10 * (6 + 1) * 4)}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("pieces", ["tokens", "uneven"])
    def test_state_stays_float32(self, pieces, dtype):
        """And exact: sums of hundreds of tokens in bfloat16 would be off by percents."""
        shape = (1, 2, 1, 403, 4, 6, 4, 3, 5)
        q, k, v, mixer, mix_logit = make_inputs(shape, dtype)
        assert {x.dtype for x in Memory.empty(k, v, mixer, window=4, sinks=3).state} == {torch.float32}
        with torch.no_grad():
            out, memory = in_steps(
                piece_lengths(pieces, 403, 4), q, k, v, mixer, mix_logit, window=4, sinks=3, mix="normalizer"
            )
            full = near_far_attention(q, k, v, mixer, mix_logit, window=4, sinks=3)
        assert out.dtype == full.dtype == memory.near_k.dtype == memory.sink_v.dtype == dtype
        assert memory.state.s.dtype == memory.state.z.dtype == torch.float32
        # Tokens 3 .. 395 have left the window when the newest is token 402, in chunk 100.
        phi = torch.stack([hedgehog(k[0, 0].double(), mixer.key_weight[0].double())])[None, :, 3:396]
        expected = State(phi.transpose(-1, -2) @ v[:, :, 3:396].double(), phi.sum(-2))
        for name in ("s", "z"):
            assert_near(getattr(memory.state, name), getattr(expected, name).float())


class TestHalfPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("far", ["window", *FAR])
    @pytest.mark.parametrize("form", ["reference", "torch", "step"])
    def test_error(self, form, far, dtype):
        """At most twice that of plain PyTorch in that dtype, both against float64; in fact one rounding."""
        window = 64 if far == "window" else 8
        shape = (2, 4, 2, 61, 16, 16, window, 4, 16)
        q, k, v, *rest = make_inputs(shape, dtype)
        mixer, mix_logit, mix = far_options("none" if far == "window" else far, *rest)
        options = {"window": window, "sinks": 4, "mix": mix}
        wide = [x.double() for x in (q, k, v)]
        truth = by_hand(*wide, mixer, mix_logit, **options)
        if far == "window":
            logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 16**-0.5
            future = torch.ones(61, 61, dtype=torch.bool).triu(1)
            plain = logits.masked_fill(future, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
        else:
            plain = by_hand(q, k, v, mixer, mix_logit, **options)
        with torch.no_grad():
            if form == "step":
                out, _ = in_steps(piece_lengths("prefill", 61, 8), q, k, v, mixer, mix_logit, **options)
            else:
                out = near_far_attention(q, k, v, mixer, mix_logit, **options, backend=form)
        assert out.dtype == plain.dtype == dtype
        assert worst(out, truth) <= 2 * worst(plain, truth)
        torch.testing.assert_close(out.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-5)

    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_exponentials_and_products_are_float32(self, backend):
        q, k, v, mixer, mix_logit = make_inputs(SHAPES[5], torch.bfloat16, grad=True)
        with ResultDtypes() as record:
            near_far_attention(q, k, v, mixer, mix_logit, window=3, sinks=1, backend=backend)
        watched = ("exp", "_softmax", "logsumexp", "log", "sigmoid", "bmm")
        made = {op: dtypes for op, dtypes in record.dtypes.items() if op.split(".")[1] in watched}
        assert {"aten._softmax.default", "aten.bmm.default", "aten.sigmoid.default"} <= made.keys()
        assert set().union(*made.values()) == {torch.float32}


class TestAnyLogitScale:
    """Queries and keys are small integers times powers of two, so logits up to 1e4 are exact in float32 too."""

    @staticmethod
    def make(dtype, size, grad=False, key_size=1.0):
        """Logits from -size to size."""
        generator = torch.Generator().manual_seed(3)

        def integers(*sizes):
            return torch.randint(-4, 5, sizes, generator=generator).double()

        q, k, v = integers(2, 4, 29, 16), integers(2, 2, 29, 16), torch.randn(2, 2, 29, 8, generator=generator)
        raw = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)).abs().max() * 0.25
        q = q * 2.0 ** torch.log2(size / key_size / raw).ceil()
        k = k * key_size
        mixer = Hedgehog(4, 2, 16)
        with torch.no_grad():
            for weight in mixer.parameters():
                weight.copy_(torch.eye(16) / 2)  # its products are exact as well
        mix_logit = torch.tensor([0.5, -0.5, 2.0, 0.0])[:, None].repeat(2, 1, 29)
        if dtype == torch.float64:
            mixer, mix_logit = mixer.double(), mix_logit.double()
        leaves = [x.to(dtype).requires_grad_(grad) for x in (q, k, v)]
        return *leaves, mixer, mix_logit.requires_grad_(grad)

    @pytest.mark.parametrize("key_size", [1.0, 64.0])
    @pytest.mark.parametrize("size", [1e2, 1e3, 1e4])
    @pytest.mark.parametrize("far", FAR)
    @pytest.mark.parametrize("form", ["reference", "torch", "tokens", "uneven"])
    def test_right_answer(self, form, far, size, key_size):
        q, k, v, *rest = self.make(torch.float32, size, key_size=key_size)
        mixer, mix_logit, mix = far_options(far, *rest)
        options = {"window": 4, "sinks": 2, "mix": mix}
        logits = (q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2)) * 0.25
        assert logits.min() < -size / 2
        assert logits.max() > size / 2
        with torch.no_grad():
            if form in ("reference", "torch"):
                out = near_far_attention(q, k, v, mixer, mix_logit, **options, backend=form)
            else:
                out, _ = in_steps(piece_lengths(form, 29, 4), q, k, v, mixer, mix_logit, **options)
        q, k, v, *rest = self.make(torch.float64, size, key_size=key_size)
        mixer, mix_logit, mix = far_options(far, *rest)
        truth = by_hand(q, k, v, mixer, mix_logit, **options)
        assert_near(out, truth.float())

    @pytest.mark.parametrize("size", [1e2, 1e4])
    @pytest.mark.parametrize("far", FAR)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_gradients(self, backend, dtype, far, size):
        def gradients(kind, form):
            q, k, v, *rest = self.make(kind, size, grad=True)
            mixer, mix_logit, mix = far_options(far, *rest)
            options = {"window": 4, "sinks": 2, "mix": mix, "mask": make_mask("left", 2, 29)}
            form(q, k, v, mixer, mix_logit, **options).square().sum().backward()
            leaves = [q, k, v] if mixer is None else [q, k, v, mix_logit, *mixer.parameters()]
            return [x.grad for x in leaves]

        got = gradients(dtype, lambda *args, **options: near_far_attention(*args, **options, backend=backend))
        truth = gradients(torch.float64, by_hand)
        for actual, expected in zip(got, truth, strict=True):
            assert bool(actual.isfinite().all())
            # Gradients of weights are sums of terms as large as q: relative to the largest of them.
            top = expected.abs().max()
            assert worst(actual, expected) <= (1e-10 if dtype == torch.float64 else 1e-4) * max(float(top), 1.0)

    @pytest.mark.parametrize("mix", MIXES)
    @pytest.mark.parametrize("logit", [-1e4, 1e4])
    @pytest.mark.parametrize("form", ["reference", "torch", "tokens", "uneven"])
    def test_all_logits_alike(self, form, logit, mix):
        """All at -1e4: the far side has the whole shared denominator. All at 1e4: none of it."""
        q, k, v, mixer, mix_logit = make_inputs((1, 2, 1, 29, 4, 3, 4, 0, 4), torch.float32)
        q, k = torch.ones_like(q), torch.full_like(k, logit / 2)  # 4 * logit / 2 * 4^(-1/2)
        mixer.reset_parameters()
        options = {"window": 4, "sinks": 0, "mix": mix}
        with torch.no_grad():
            if form in ("reference", "torch"):
                out = near_far_attention(q, k, v, mixer, mix_logit, **options, backend=form)
            else:
                out, _ = in_steps(piece_lengths(form, 29, 4), q, k, v, mixer, mix_logit, **options)
        for t in (3, 8, 28):
            start = max(0, t // 4 - 1) * 4
            near = v[0, 0, start : t + 1].mean(0)
            far = v[0, 0, :start].mean(0) if start else near
            for head in range(2):
                share = float(logit < 0) if mix == "normalizer" else float(mix_logit[0, head, t].sigmoid())
                assert_near(out[0, head, t], near + share * (far - near))

    @pytest.mark.parametrize("exponent", [10, 40, 80])
    @pytest.mark.parametrize("form", ["reference", "torch", "tokens", "uneven"])
    def test_small_far_masses_count(self, form, exponent):
        """Features that hardly overlap: a far mass of about e^-exponent, which a large mix_logit brings back."""
        q, k, v, mixer, _ = make_inputs((1, 2, 1, 29, 2, 3, 4, 0, 2), torch.float32)
        with torch.no_grad():
            for weight in mixer.parameters():
                weight.copy_(torch.eye(2))
        q, k = torch.zeros_like(q), torch.zeros_like(k)
        q[..., 0], k[..., 1] = exponent, exponent
        mix_logit = torch.full((1, 2, 29), exponent - 1.0)
        options = {"window": 4, "sinks": 0}
        truth = by_hand(q.double(), k.double(), v.double(), mixer, mix_logit, **options)
        window_only = by_hand(q.double(), k.double(), v.double(), **options)
        assert (truth - window_only)[:, :, 8:].abs().max() > 0.1
        with torch.no_grad():
            if form in ("reference", "torch"):
                out = near_far_attention(q, k, v, mixer, mix_logit, **options, backend=form)
            else:
                out, _ = in_steps(piece_lengths(form, 29, 4), q, k, v, mixer, mix_logit, mix="normalizer", **options)
        assert_near(out, truth.float())

    @pytest.mark.parametrize("mix", MIXES)
    @pytest.mark.parametrize("form", ["reference", "torch", "tokens", "uneven"])
    def test_no_far_mass_is_no_far_term(self, form, mix):
        """Features that do not overlap at all, whatever mix_logit says."""
        q, k, v, *_ = make_inputs((1, 2, 1, 29, 2, 3, 4, 0, 2), torch.float32)
        mixer = Functional(Hedgehog(2, 1, 2), {})
        mixer.query_features = lambda q: torch.eye(4)[0].expand(*q.shape[:3], 4)
        mixer.key_features = lambda k: torch.eye(4)[1].expand(*k.shape[:3], 4)
        mix_logit = torch.full((1, 2, 29), 30.0)
        options = {"window": 4, "sinks": 0}
        with torch.no_grad():
            if form in ("reference", "torch"):
                out = near_far_attention(q, k, v, mixer, mix_logit, mix=mix, **options, backend=form)
            else:
                out, _ = in_steps(piece_lengths(form, 29, 4), q, k, v, mixer, mix_logit, mix=mix, **options)
        assert_near(out, by_hand(q, k, v, **options))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("far", FAR)
    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_half_precision_is_finite(self, backend, far, dtype):
        q, k, v, *rest = self.make(dtype, 1e4, grad=True)
        mixer, mix_logit, mix = far_options(far, *rest)
        out = near_far_attention(q, k, v, mixer, mix_logit, window=4, sinks=2, mix=mix, backend=backend)
        out.float().square().sum().backward()
        leaves = [q, k, v] if mixer is None else [q, k, v, mix_logit, *mixer.parameters()]
        assert all(bool(x.isfinite().all()) for x in (out, *(leaf.grad for leaf in leaves)))
        wide = near_far_attention(
            *(x.detach().float() for x in (q, k, v)), mixer, mix_logit, window=4, sinks=2, mix=mix, backend=backend
        )
        torch.testing.assert_close(out.float(), wide, rtol=torch.finfo(dtype).eps, atol=1e-5)


class ResultDtypes(TorchDispatchMode):
    """While it is on: the dtypes of every operation's results, by its name."""

    def __init__(self):
        super().__init__()
        self.dtypes: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.dtypes.setdefault(str(func), set()).update(x.dtype for x in tree_leaves(out) if isinstance(x, Tensor))
        return out


class TestLinearCost:
    """Training: forward and backward, 4096 tokens against 1024."""

    H, K, D, W, S = 4, 2, 64, 64, 4

    def runs(self, far):
        """A training step by length."""

        def run(length):
            shape = (1, self.H, self.K, length, self.D, self.D, self.W, self.S, self.D)
            q, k, v, *rest = make_inputs(shape, torch.float32, grad=True)
            mixer, mix_logit, mix = far_options(far, *rest)
            leaves = [q, k, v] if mixer is None else [q, k, v, mix_logit, *mixer.parameters()]

            def step():
                out = near_far_attention(q, k, v, mixer, mix_logit, window=self.W, sinks=self.S, mix=mix)
                torch.autograd.grad(out.sum(), leaves)

            return step

        return {length: run(length) for length in (1024, 4096)}

    @pytest.mark.parametrize("far", FAR)
    def test_no_tensor_of_length_squared(self, far):
        largest = {}
        for length, run in self.runs(far).items():
            with LargestTensor() as record:
                run()
            largest[length] = record.bytes
        assert largest[4096] <= 4.1 * largest[1024]
        # The widest is near weights: 2 W + S a query.
        assert largest[4096] <= 1.1 * 4 * self.H * 4096 * (2 * self.W + self.S)

    @pytest.mark.parametrize("far", FAR)
    def test_peak_memory(self, far):
        peak = {length: peak_bytes(run) for length, run in self.runs(far).items()}
        assert peak[4096] <= 5 * peak[1024]

    @pytest.mark.parametrize("far", FAR)
    def test_work(self, far):
        """The arithmetic, which no busy machine moves; `test_time` is for a quiet one."""
        work = {length: flops(run) for length, run in self.runs(far).items()}
        assert 0 < work[4096] <= 4.1 * work[1024]

    @pytest.mark.slow
    @pytest.mark.parametrize("far", FAR)
    def test_time(self, far):
        assert growth_of_time(self.runs(far), limit=5) <= 5


class TestInterface:
    def test_signatures_agree(self):
        reference = inspect.signature(near_far_reference)
        assert inspect.signature(near_far_chunked) == reference
        public = inspect.signature(near_far_attention)
        *parameters, documents, backend = public.parameters.values()
        assert parameters == list(reference.parameters.values())
        assert public.return_annotation == reference.return_annotation
        assert (backend.name, backend.default) == ("backend", "auto")
        assert (documents.name, documents.default) == ("cu_seqlens", None)
        # The step takes the same, with the memory after the inputs.
        step = list(inspect.signature(near_far_step).parameters.values())
        assert step.pop(3).name == "memory"
        assert step.pop().name == "backend"
        assert step == list(reference.parameters.values())

    def test_auto_is_the_chunked_form_here(self):
        q, k, v, mixer, mix_logit = make_inputs(SHAPES[5])
        auto = near_far_attention(q, k, v, mixer, mix_logit, window=3)
        assert torch.equal(auto, near_far_attention(q, k, v, mixer, mix_logit, window=3, backend="torch"))

    def test_public_name(self):
        import linearize

        assert linearize.near_far_attention is near_far_attention

    def test_mixers_by_name(self):
        assert dict(MIXERS) == {"none": None, "hedgehog": Hedgehog, "gla": Gla}

    def test_hedgehog_is_native_to_grouped_queries(self):
        mixer = Hedgehog(6, 2, 8, 5)
        assert {name: tuple(x.shape) for name, x in mixer.named_parameters()} == {
            "query_weight": (6, 8, 5),
            "key_weight": (2, 8, 5),
        }
        k = torch.randn(3, 2, 7, 8)
        state = mixer.empty_state(k, torch.randn(3, 2, 7, 4))
        assert (state.s.shape, state.z.shape) == ((3, 2, 10, 4), (3, 2, 10))
        assert bool((mixer.key_features(k) >= 0).all())


def _call(**changes):
    """The arguments of a small correct call, with some of them changed."""
    arguments = {"q": torch.zeros(2, 4, 6, 8), "k": torch.zeros(2, 2, 6, 8), "v": torch.zeros(2, 2, 6, 5), "window": 3}
    return arguments | changes


class TestBadInputs:
    def test_the_call_itself_is_right(self):
        assert near_far_attention(**_call()).shape == (2, 4, 6, 5)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"q": torch.zeros(4, 6, 8)}, "q has shape (4, 6, 8); it needs 4 dimensions (batch, heads, tokens, size)"),
            ({"v": torch.zeros(6)}, "v has shape (6,); it needs 4 dimensions (batch, heads, tokens, size)"),
            ({"q": torch.zeros(2, 4, 6, 8).long()}, "q is torch.int64; convert it to a float dtype"),
            (
                {"k": torch.zeros(2, 2, 6, 8).half()},
                "k is torch.float16 but q is torch.float32; convert them to one dtype",
            ),
            (
                {"v": torch.zeros(2, 2, 6, 5, device="meta")},
                "v is on meta but q is on cpu; move them to one device",
            ),
            ({"k": torch.zeros(1, 2, 6, 8)}, "k has batch 1 but q has 2; make them equal"),
            ({"v": torch.zeros(2, 2, 7, 5)}, "v has 7 tokens but q has 6; make them equal"),
            ({"v": torch.zeros(2, 4, 6, 5)}, "k has 2 heads but v has 4; make them equal"),
            (
                {"k": torch.zeros(2, 3, 6, 8), "v": torch.zeros(2, 3, 6, 5)},
                "4 query heads are no multiple of 3 key heads; k and v need a divisor of 4",
            ),
            (
                {"k": torch.zeros(2, 0, 6, 8), "v": torch.zeros(2, 0, 6, 5)},
                "4 query heads are no multiple of 0 key heads; k and v need a divisor of 4",
            ),
            ({"k": torch.zeros(2, 2, 6, 4)}, "q has head size 8 but k has 4; make them equal"),
            ({name: torch.zeros(2, 2, 0, 8) for name in "qkv"}, "0 tokens; give at least 1"),
            ({"window": 0}, "window 0 is below 1; use at least 1"),
            ({"window": -3}, "window -3 is below 1; use at least 1"),
            ({"sinks": -1}, "sinks -1 is below 0; use 0 for none"),
            ({"mix": "blend"}, "mix 'blend' is unknown; known: normalizer, gate, peak"),
            ({"backend": "cuda"}, "backend 'cuda' is unknown; known: auto, reference, torch, triton"),
            (
                {"mix_logit": torch.zeros(2)},
                "mix_logit has shape (2,); it needs (4,), one a query head, or (2, 4, 6), one a head and query",
            ),
            (
                {"mix_logit": torch.zeros(2, 4, 1)},
                "mix_logit has shape (2, 4, 1); it needs (4,), one a query head, or (2, 4, 6), one a head and query",
            ),
            (
                {"mask": torch.zeros(2, 6)},
                "mask is torch.float32; give a boolean or integer mask, true for real tokens",
            ),
            (
                {"mixer": "hedgehog"},
                "mixer is a str; give a Mixer, such as Hedgehog(heads, kv_heads, head_dim), or None",
            ),
            ({"mask": torch.ones(2, 5).bool()}, "mask has shape (2, 5); it needs (2, 6)"),
            (
                {"mask": torch.ones(2, 6, device="meta").bool()},
                "mask is on meta but q is on cpu; move them to one device",
            ),
            (
                {"mix_logit": torch.zeros(4, device="meta")},
                "mix_logit is on meta but q is on cpu; move them to one device",
            ),
            (
                {"mixer": Hedgehog(4, 2, 8).to("meta")},
                "the mixer is on meta but q is on cpu; move them to one device",
            ),
            (
                {"mixer": Hedgehog(2, 1, 8)},
                "mixer Hedgehog is for 2 heads on 1 of size 8, not 4 on 2 of size 8; make one with Hedgehog(4, 2, 8)",
            ),
            (
                {"mixer": Hedgehog(4, 2, 4)},
                "mixer Hedgehog is for 4 heads on 2 of size 4, not 4 on 2 of size 8; make one with Hedgehog(4, 2, 8)",
            ),
            (
                {"q": torch.zeros(2, 4, 6, 8).to(torch.float8_e4m3fn)},
                "q is torch.float8_e4m3fn; convert it to float32, bfloat16, float16 or float64",
            ),
            ({"mask": torch.ones(2, 1, 6, 6).bool()}, "mask has shape (2, 1, 6, 6); it needs (2, 6)"),
        ],
        ids=lambda value: value[:40] if isinstance(value, str) else "",
    )
    def test_message(self, changes, message):
        with pytest.raises(LinearizeError) as error:
            near_far_attention(**_call(**changes))
        assert str(error.value) == f"near_far_attention: {message}"

    def test_no_triton_on_a_cpu(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(LinearizeError) as error:
            near_far_attention(**_call(backend="triton"))
        assert str(error.value) == (
            "backend: 'triton' cannot run here: Triton has no kernels for cpu tensors; use backend='auto' or 'torch', "
            "which runs on any device"
        )

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"mask": torch.ones(1, 6).bool()}, "mask and cu_seqlens are both given; give the one that applies"),
            ({"q": torch.zeros(2, 4, 6, 8)}, "cu_seqlens goes with batch 1, not 2; lay the documents end to end"),
            (
                {"cu_seqlens": torch.tensor([6])},
                "cu_seqlens is torch.int64 of shape (1,); it needs (N + 1,) integers for N >= 1 documents",
            ),
            (
                {"cu_seqlens": torch.tensor([0.0, 6.0])},
                "cu_seqlens is torch.float32 of shape (2,); it needs (N + 1,) integers for N >= 1 documents",
            ),
            (
                {"cu_seqlens": torch.tensor([0, 6], device="meta")},
                "cu_seqlens is on meta but q is on cpu; move it there",
            ),
            (
                {"cu_seqlens": torch.tensor([0, 5])},
                "cu_seqlens runs from 0 to 5; it must rise from 0 to the 6 tokens without falling",
            ),
            (
                {"cu_seqlens": torch.tensor([0, 4, 3, 6])},
                "cu_seqlens runs from 0 to 6; it must rise from 0 to the 6 tokens without falling",
            ),
        ],
        ids=lambda value: value[:40] if isinstance(value, str) else "",
    )
    def test_documents(self, changes, message):
        inputs = {"q": torch.zeros(1, 4, 6, 8), "k": torch.zeros(1, 2, 6, 8), "v": torch.zeros(1, 2, 6, 5)}
        if "q" in changes:
            inputs = {"q": torch.zeros(2, 4, 6, 8), "k": torch.zeros(2, 2, 6, 8), "v": torch.zeros(2, 2, 6, 5)}
        with pytest.raises(LinearizeError) as error:
            near_far_attention(**(inputs | {"window": 3, "cu_seqlens": torch.tensor([0, 6])} | changes))
        assert str(error.value) == f"near_far_attention: {message}"

    def test_empty_batch(self):
        """An empty result, and no gradient but an empty one."""
        q, k, v = (torch.zeros(0, h, 6, 8, requires_grad=True) for h in (4, 2, 2))
        for backend in ("auto", "reference", "torch"):
            out = near_far_attention(q, k, v[..., :5], window=3, backend=backend)
            assert out.shape == (0, 4, 6, 5)
        out.sum().backward()
        assert q.grad.shape == q.shape


class TestStepsThatDoNotFit:
    """A kernel would read and write beyond a memory that is not that of these tensors."""

    @pytest.mark.parametrize(
        "changes",
        [
            {"batch": 3},
            {"kv_heads": 4},
            {"size": 16},
            {"window": 8},
            {"sinks": 2},
            {"dtype": torch.float64},
            {"mixer": None},
            {"mixer": Hedgehog(4, 2, 8, 5)},
            {"device": "meta"},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_other_than_the_memory(self, changes):
        kept = {"batch": 2, "kv_heads": 2, "size": 8, "dtype": torch.float32, "device": "cpu"}
        k = torch.zeros(2, 2, 1, 8)
        mixer = Hedgehog(4, 2, 8)
        memory = Memory.empty(k, k, mixer, window=4, sinks=1)
        new = kept | {name: x for name, x in changes.items() if name in kept}
        q, k = (
            torch.zeros(new["batch"], heads, 1, new["size"], dtype=new["dtype"], device=new["device"])
            for heads in (4, new["kv_heads"])
        )
        options = {"window": changes.get("window", 4), "sinks": changes.get("sinks", 1)}
        mixer = changes.get("mixer", mixer)
        if "size" in changes:
            mixer = Hedgehog(4, 2, 16, 8)
        if "kv_heads" in changes:
            mixer = Hedgehog(4, 4, 8)
        if "device" in changes:
            mixer = mixer.to("meta")
        with (
            torch.no_grad(),
            pytest.raises(LinearizeError, match="near_far_step: the memory holds 2 rows of 2 key heads"),
        ):
            near_far_step(q, k, k, memory, mixer, **options)

    def test_wrong_by_themselves(self):
        k = torch.zeros(2, 2, 1, 8)
        memory = Memory.empty(k, k, None, window=4, sinks=1)
        with pytest.raises(LinearizeError, match="near_far_step: 3 query heads are no multiple of 2 key heads"):
            near_far_step(torch.zeros(2, 3, 1, 8), k, k, memory, window=4, sinks=1)


class TestAutocast:
    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_float32_stays_float32(self, backend):
        """Features sit in exponents; in mixed-precision training they are computed as outside of it."""
        q, k, v, mixer, mix_logit = make_inputs((1, 2, 1, 29, 6, 4, 4, 2, 6), torch.float32)
        options = {"window": 4, "sinks": 2, "backend": backend}
        expected = near_far_attention(q, k, v, mixer, mix_logit, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(near_far_attention(q, k, v, mixer, mix_logit, **options), expected)
            steps, _ = in_steps([20, 1, 1, 7], q, k, v, mixer, mix_logit, window=4, sinks=2, mix="normalizer")
        assert_near(steps, expected)


class TestDocuments:
    @pytest.mark.parametrize("backend", ["reference", "torch"])
    @pytest.mark.parametrize("far", FAR)
    def test_each_is_a_sequence_of_its_own(self, far, backend):
        q, k, v, *rest = make_inputs((1, 4, 2, 43, 4, 6, 4, 3, 5))
        mixer, mix_logit, mix = far_options(far, *rest)
        options = {"window": 4, "sinks": 3, "mix": mix, "backend": backend}
        borders = [0, 17, 17, 20, 43]
        out = near_far_attention(q, k, v, mixer, mix_logit, cu_seqlens=torch.tensor(borders), **options)
        for begin, end in itertools.pairwise(borders):
            if begin == end:
                continue
            part = slice(begin, end)
            logit = mix_logit[:, :, part] if mix_logit is not None and mix_logit.ndim == 3 else mix_logit
            alone = near_far_attention(q[:, :, part], k[:, :, part], v[:, :, part], mixer, logit, **options)
            assert_near(out[:, :, part], alone)


class TestHedgehogStart:
    @pytest.mark.parametrize("feature_dim", [4, 8, 20])
    def test_no_two_features_are_alike(self, feature_dim):
        """Columns that repeat would get the same gradients for ever."""
        mixer = Hedgehog(4, 2, 8, feature_dim)
        for weight in (mixer.query_weight, mixer.key_weight):
            gram = weight[0].T @ weight[0] / weight[0, :, 0].square().sum()
            assert (gram - torch.eye(feature_dim)).abs().max() < 0.99
            assert torch.equal(weight[0], weight[1])

    def test_start_is_the_identity(self):
        weight = Hedgehog(4, 2, 8, 8).query_weight
        assert torch.equal(weight[0], weight[0, 0, 0] * torch.eye(8))

    def test_under_another_default_device(self):
        """`convert` builds a mixer on the model's device; the start must not depend on it."""
        with torch.device("meta"):
            assert Hedgehog(4, 2, 8, 20).query_weight.is_meta
            on_cpu = torch.nn.Parameter(torch.empty(2, 8, 20, device="cpu"))
            mixer = Hedgehog(4, 2, 8, 20)
            mixer.query_weight = mixer.key_weight = on_cpu
            mixer.reset_parameters()
        assert torch.equal(on_cpu, Hedgehog(4, 2, 8, 20).key_weight)
