"""The Triton kernels of near-and-far attention: the same numbers as the formula, forward and backward.

They run on a GPU where there is one, else in Triton's interpreter on the CPU (`tests/interpreter.py`).
"""

import itertools
import random

import pytest
import torch
from torch import Tensor

from linearize.errors import LinearizeError
from linearize.kernels.launch import launch
from linearize.kernels.near_far import Hedgehog, near_far_attention, near_far_reference
from linearize.kernels.near_far.ops import far_read
from tests.near_far_cases import FAR, Functional, far_options, in_steps, make_inputs, make_mask
from tests.tolerance import worst

pytestmark = pytest.mark.interpret

LENGTHS = (1, 17, 63, 64, 65, 200)
WINDOWS = (16, 32)
SINKS = (0, 4)
SIZES = (16, 32, 64)  # of D, and of F
GROUPS = (1, 3)
DTYPES = (torch.float32, torch.bfloat16)
PADDING = ("full", "left", "right", "holes", "documents")
WHOLE = list(itertools.product(LENGTHS, WINDOWS, SINKS, SIZES, SIZES, GROUPS, DTYPES, FAR, PADDING))


def covering(cases: list[tuple], seed: int = 0) -> list[tuple]:
    """A few of the cases in which every pair of values of any two settings occurs."""
    order = random.Random(seed).sample(cases, len(cases))

    def pairs(case: tuple) -> set:
        return set(itertools.combinations(enumerate(case), 2))

    missing = set().union(*(pairs(case) for case in cases))
    chosen = []
    while missing:
        # The best of a sample: nearly as few cases as the best of all.
        best = max(random.Random(len(chosen)).sample(order, 60), key=lambda case: len(pairs(case) & missing))
        if pairs(best) & missing:
            chosen.append(best)
            missing -= pairs(best)
        elif len(missing) < 20:
            best = next(case for case in order if pairs(case) & missing)
            chosen.append(best)
            missing -= pairs(best)
    return chosen


def plain(q, k, v, mixer, mix_logit, *, window, sinks, mix, mask):
    """The formula in one dtype throughout, as one would write it in PyTorch: how large an error of that dtype is."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    position = mask.long().cumsum(-1) - 1
    query, key = position[:, None, :, None], position[:, None, None, :]
    seen = (key <= query) & mask[:, None, None, :]
    near = seen & ((key < sinks) | (key >= (query // window - 1) * window))
    near = near | (torch.eye(q.shape[2], dtype=torch.bool, device=q.device) & ~mask[:, None, :, None])
    logits = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~near, -torch.inf)
    out = logits.softmax(-1) @ v
    if mixer is not None:
        phi_q, phi_k = (
            torch.cat([(x @ w.to(x.dtype)).softmax(-1), (-(x @ w.to(x.dtype))).softmax(-1)], -1)
            for x, w in ((q, mixer.query_weight), (k, mixer.key_weight.repeat_interleave(group, 0)))
        )
        weights = (phi_q @ phi_k.transpose(-1, -2)) * (seen & ~near)
        mass = weights.sum(-1, keepdim=True)
        logit = (mix_logit[:, None] if mix_logit.ndim == 1 else mix_logit).to(q.dtype)[..., None]
        if mix == "normalizer":
            logit = logit + mass.clamp_min(1e-30).log() - logits.logsumexp(-1, keepdim=True)
        share = torch.where(mass > 0, logit.sigmoid(), 0.0)
        out = out + share * (weights @ v / mass.clamp_min(1e-30) - out)
    return out * mask[:, None, :, None]


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Of a random linear function of the output, the same one each time."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(torch.autograd.grad((out * weight.to(out.device, out.dtype)).sum(), leaves))


def check(case: tuple, device: torch.device) -> None:
    """Forward and backward of one case of the grid against the formula in float64."""
    length, window, sinks, size, features, group, dtype, far, padding = case
    batch = 1 if padding == "documents" else 2
    shape = (batch, group, 1, length, size, size, window, sinks, features // 2)
    q, k, v, *rest = make_inputs(shape, dtype, grad=True)
    mixer, mix_logit, mix = far_options(far, *rest)
    mask, cu_seqlens = None, None
    if padding == "documents":
        third = length // 3
        cu_seqlens = torch.tensor([0, third, third, length])
    else:
        mask = make_mask(padding, batch, length)
    leaves = [q, k, v] if mixer is None else [q, k, v, mix_logit, *mixer.parameters()]
    options = {"window": window, "sinks": sinks, "mix": mix}

    def run(kind: str, per_token: bool = False) -> list[Tensor]:
        to = {"truth": torch.float64, "plain": dtype, "triton": dtype}[kind]
        own = [x.detach().to(device if kind == "triton" else "cpu", to) for x in (q, k, v)]
        own = [x.requires_grad_() for x in own]
        own_mixer, own_logit = None, None
        parameters: list[Tensor] = []
        if mixer is not None:
            wide = torch.float64 if kind == "truth" else torch.float32
            own_mixer = Hedgehog(group, 1, size, features // 2).to(own[0].device, wide)
            own_mixer.load_state_dict(mixer.state_dict())
            own_logit = mix_logit.detach().to(own[0].device, wide)
            if per_token:
                own_logit = own_logit[None, :, None].repeat(batch, 1, length)
            own_logit.requires_grad_()
            parameters = [own_logit, *own_mixer.parameters()]
        extra = {"mask": None if mask is None else mask.to(own[0].device)}
        if kind == "plain":
            real = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
            out = plain(*own, own_mixer, own_logit, **options, mask=real)
        else:
            extra["cu_seqlens"] = None if cu_seqlens is None else cu_seqlens.to(own[0].device)
            backend = "triton" if kind == "triton" else "reference"
            out = near_far_attention(*own, own_mixer, own_logit, **options, **extra, backend=backend)
        assert out.dtype == to
        return [x.detach().cpu().double() for x in (out, *gradients(out, [*own, *parameters]))]

    truth, got = run("truth"), run("triton")
    assert len(truth) == len(leaves) + 1
    if dtype == torch.float32:
        for actual, expected in zip(got, truth, strict=True):
            assert bool(actual.isfinite().all())
            top = max(float(expected.detach().abs().max()), 1.0)
            assert worst(actual, expected) <= 2e-5 * top
        return
    # Documents have no plain form here; theirs is as large as that of one sequence.
    bounds = run("plain") if padding != "documents" else [None] * len(truth)
    for i, (actual, expected, own_error) in enumerate(zip(got, truth, bounds, strict=True)):
        assert bool(actual.isfinite().all())
        norm = float(expected.norm()) + 1e-3
        if far == "one a head" and i == 4:
            # A sum over tokens of either sign: an error is relative to what was summed, not to what was left.
            norm = max(norm, float(run("truth", per_token=True)[4].norm()))
        bound = 2 * float((own_error - expected).norm()) / norm if own_error is not None else 0.0
        assert float((actual - expected).norm()) / norm <= max(bound, 2 * torch.finfo(dtype).eps)


def case_id(case: tuple) -> str:
    length, window, sinks, size, features, group, dtype, far, padding = case
    return f"T{length}-W{window}-S{sinks}-D{size}-F{features}-G{group}-{str(dtype)[6:]}-{far}-{padding}"


class TestGrid:
    @pytest.mark.parametrize("case", covering(WHOLE), ids=case_id)
    def test_pairs(self, case, device):
        """Every pair of settings."""
        check(case, device)

    @pytest.mark.kernels
    @pytest.mark.parametrize("part", list(itertools.product(SIZES, SIZES, DTYPES, FAR)), ids=str)
    def test_whole(self, part, device):
        for case in WHOLE:
            if (case[3], case[4], case[6], case[7]) == part:
                check(case, device)


class TestShapes:
    # batch, H, K, T, D, V, W, S, feature_dim
    SHAPES = (
        (1, 2, 1, 40, 20, 24, 8, 0, 12),  # nothing is a power of two
        (2, 4, 2, 90, 32, 16, 24, 5, 16),  # several key heads; W no power of two
        (1, 2, 2, 50, 16, 48, 5, 7, 4),  # S > W
        (1, 3, 1, 70, 16, 16, 16, 40, 8),  # S > 2 W
        (1, 8, 1, 140, 16, 16, 32, 4, 8),  # tiles across heads
        (2, 2, 1, 11, 16, 16, 64, 3, 8),  # W > T
        (1, 2, 1, 9, 16, 16, 1, 0, 8),  # chunks of one token
    )

    @pytest.mark.parametrize("far", FAR)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_equals_the_formula(self, shape, far, device):
        results = []
        for backend in ("reference", "triton"):
            q, k, v, *rest = make_inputs(shape, torch.float32, grad=True)
            mixer, mix_logit, mix = far_options(far, *rest)
            leaves = [q, k, v] if mixer is None else [q, k, v, mix_logit, *mixer.parameters()]
            place = device if backend == "triton" else "cpu"
            moved = None if mixer is None else mixer_on(mixer, place)
            logit = None if mix_logit is None else mix_logit.to(place)
            out = near_far_attention(
                *(x.to(place) for x in (q, k, v)),
                moved,
                logit,
                window=shape[6],
                sinks=shape[7],
                mix=mix,
                backend=backend,
            )
            results.append([out.detach().cpu(), *gradients(out, leaves)])
        for actual, expected in zip(*reversed(results), strict=True):
            assert worst(actual, expected) <= 2e-5 * max(float(expected.detach().abs().max()), 1.0)

    @pytest.mark.parametrize("mix", ["normalizer", "gate"])
    def test_features_by_another_mixer(self, mix, device):
        """Features that PyTorch computes, and their gradients; as many as are no multiple of a block."""
        results = []
        for backend in ("reference", "triton"):
            q, k, v, mixer, mix_logit = make_inputs((2, 4, 2, 70, 16, 16, 16, 3, 21), torch.float32, grad=True)
            leaves = [q, k, v, mix_logit, *mixer.parameters()]
            place = device if backend == "triton" else torch.device("cpu")
            functional = Functional(mixer, {n: p.to(place) for n, p in mixer.named_parameters()})
            out = near_far_attention(
                *(x.to(place) for x in (q, k, v, )), functional, mix_logit.to(place), window=16, sinks=3, mix=mix,
                backend=backend,
            )  # fmt: skip
            results.append([out.detach().cpu(), *gradients(out, leaves)])
        for actual, expected in zip(*reversed(results), strict=True):
            assert worst(actual, expected) <= 2e-5 * max(float(expected.detach().abs().max()), 1.0)

    @pytest.mark.parametrize("feature_dim", [144, 256])
    def test_more_features_than_fit_a_tile(self, feature_dim, device):
        """Hedgehog's are then computed by PyTorch; F up to 512."""
        q, k, v, mixer, mix_logit = make_inputs((1, 2, 1, 40, 16, 16, 8, 2, feature_dim), torch.float32)
        expected = near_far_attention(q, k, v, mixer, mix_logit, window=8, sinks=2, backend="reference")
        moved = [x.to(device) for x in (q, k, v)]
        out = near_far_attention(*moved, mixer.to(device), mix_logit.to(device), window=8, sinks=2, backend="triton")
        assert worst(out.cpu(), expected) <= 2e-5 * float(expected.detach().abs().max())

    @pytest.mark.parametrize(
        "layout", ["tokens before heads", "every other token", "last dimension strided", "expanded"]
    )
    def test_strides(self, layout, device):
        q, k, v, mixer, mix_logit = make_inputs((1, 2, 1, 70, 16, 16, 16, 3, 8), torch.float32)
        expected = near_far_attention(q, k, v, mixer, mix_logit, window=16, sinks=3, backend="reference")

        def laid(x):
            x = x.to(device)
            if layout == "tokens before heads":
                return x.transpose(1, 2).contiguous().transpose(1, 2)
            if layout == "every other token":
                wide = torch.full((*x.shape[:2], 2 * x.shape[2], x.shape[3]), torch.nan, device=device)
                wide[:, :, ::2] = x
                return wide[:, :, ::2]
            if layout == "last dimension strided":
                return x.transpose(2, 3).contiguous().transpose(2, 3)
            return x

        logit = mix_logit.to(device)
        if layout == "expanded":
            logit = logit[..., :1].expand(-1, -1, 70)
            expected = near_far_attention(q, k, v, mixer, logit.cpu(), window=16, sinks=3, backend="reference")
        out = near_far_attention(
            *(laid(x) for x in (q, k, v)), mixer.to(device), logit, window=16, sinks=3, backend="triton"
        )
        assert worst(out.cpu(), expected) <= 2e-5 * float(expected.detach().abs().max())

    def test_deterministic(self, device):
        """No atomics: the same bits each time."""
        runs = []
        for _ in range(2):
            q, k, v, mixer, mix_logit = make_inputs((1, 2, 1, 70, 16, 16, 16, 3, 8), torch.float32, grad=True)
            out = near_far_attention(
                *(x.to(device) for x in (q, k, v)), mixer_on(mixer, device), mix_logit.to(device), window=16, sinks=3,
                backend="triton",
            )  # fmt: skip
            runs.append([out, *gradients(out, [q, k, v, mix_logit, *mixer.parameters()])])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def mixer_on(mixer: Hedgehog, place) -> Hedgehog:
    """The mixer with its weights on a device, still the leaves that gradients are asked for."""
    if torch.device(place).type == "cpu":
        return mixer
    moved = Hedgehog.__new__(Hedgehog)
    torch.nn.Module.__init__(moved)
    moved.num_features = mixer.num_features
    for name, parameter in mixer.named_parameters():
        moved.__dict__[name] = parameter.to(place)
    return moved


class TestFarRead:
    @pytest.mark.parametrize("shape", [(2, 2, 1, 64, 16, 24, 16, 3, 8), (1, 3, 1, 96, 16, 16, 32, 0, 16)], ids=str)
    def test_equals_the_chunked_form(self, shape, device):
        results = []
        for backend in ("torch", "triton"):
            q, k, v, mixer, _ = make_inputs(shape, torch.float32, grad=True)
            place = device if backend == "triton" else torch.device("cpu")
            value, log_mass = far_read(
                *(x.to(place) for x in (q, k, v)), mixer_on(mixer, place), window=shape[6], sinks=shape[7],
                backend=backend,
            )  # fmt: skip
            some = log_mass > -torch.inf
            assert bool(value.isfinite().all())
            value, log_mass = value * some[..., None], log_mass.masked_fill(~some, 0.0)
            both = torch.cat([value, log_mass[..., None].sin()], -1)
            results.append([both.detach().cpu(), *gradients(both, [q, k, v, *mixer.parameters()])])
        for actual, expected in zip(*reversed(results), strict=True):
            assert worst(actual, expected) <= 2e-5 * max(float(expected.detach().abs().max()), 1.0)

    def test_whole_chunks_only(self):
        q, k, v, mixer, _ = make_inputs((1, 2, 1, 65, 16, 16, 16, 3, 8), torch.float32)
        with pytest.raises(LinearizeError, match="65 tokens are no multiple of window 16; pad them to one"):
            far_read(q, k, v, mixer, window=16)

    def test_the_formula_has_none(self):
        q, k, v, mixer, _ = make_inputs((1, 2, 1, 64, 16, 16, 16, 3, 8), torch.float32)
        with pytest.raises(LinearizeError, match="use 'torch'"):
            far_read(q, k, v, mixer, window=16, backend="reference")


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPU kernels have no float64")
class TestFloat64:
    """In the interpreter kernels take float64: there the backward pass can be compared with finite differences."""

    @pytest.mark.parametrize("far", FAR)
    def test_gradcheck(self, far):
        q, k, v, mixer, mix_logit = make_inputs((1, 2, 1, 11, 3, 2, 2, 1, 2), grad=True)
        mask = torch.tensor([[False] + [True] * 10])
        weights = list(mixer.parameters())

        def run(q, k, v, mix_logit, *weights):
            own = mixer_of(*weights)
            chosen, logit, mix = far_options(far, own, mix_logit)
            logit = mix_logit[0, :, 0] if far == "one a head" else logit
            return near_far_attention(q, k, v, chosen, logit, window=2, sinks=1, mix=mix, mask=mask, backend="triton")

        assert torch.autograd.gradcheck(run, (q, k, v, mix_logit, *weights), fast_mode=True)

    def test_gradcheck_of_the_far_side(self):
        q, k, v, mixer, _ = make_inputs((1, 2, 1, 12, 3, 2, 2, 1, 2), grad=True)

        def run(q, k, v, *weights):
            value, log_mass = far_read(q, k, v, mixer_of(*weights), window=2, sinks=1, backend="triton")
            return value, log_mass.masked_fill(log_mass == -torch.inf, 0.0)

        assert torch.autograd.gradcheck(run, (q, k, v, *mixer.parameters()), fast_mode=True)

    @pytest.mark.parametrize("far", FAR)
    def test_equals_the_formula(self, far):
        results = []
        for backend in ("reference", "triton"):
            q, k, v, *rest = make_inputs((1, 3, 1, 70, 16, 24, 16, 4, 8), grad=True)
            mixer, mix_logit, mix = far_options(far, *rest)
            leaves = [q, k, v] if mixer is None else [q, k, v, mix_logit, *mixer.parameters()]
            out = near_far_attention(q, k, v, mixer, mix_logit, window=16, sinks=4, mix=mix, backend=backend)
            results.append([out.detach(), *gradients(out, leaves)])
        for actual, expected in zip(*reversed(results), strict=True):
            assert worst(actual, expected) <= 1e-12


def mixer_of(query_weight: Tensor, key_weight: Tensor) -> Hedgehog:
    """A Hedgehog of these very tensors."""
    mixer = Hedgehog.__new__(Hedgehog)
    torch.nn.Module.__init__(mixer)
    mixer.num_features = 2 * query_weight.shape[-1]
    mixer.__dict__ |= {"query_weight": query_weight, "key_weight": key_weight}
    return mixer


class TestAnyLogitScale:
    @pytest.mark.parametrize("size", [1e2, 1e4])
    @pytest.mark.parametrize("far", FAR)
    def test_right_answer(self, far, size, device):
        """Small integers times powers of two: logits up to 1e4 that are exact in float32."""
        generator = torch.Generator().manual_seed(3)
        q = torch.randint(-4, 5, (2, 4, 70, 16), generator=generator).float()
        k = torch.randint(-4, 5, (2, 2, 70, 16), generator=generator).float()
        v = torch.randn(2, 2, 70, 8, generator=generator)
        raw = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)).abs().max() * 0.25
        q = q * 2.0 ** torch.log2(size / raw).ceil()
        mixer = Hedgehog(4, 2, 16)
        with torch.no_grad():
            for weight in mixer.parameters():
                weight.copy_(torch.eye(16) / 2)
        chosen, logit, mix = far_options(far, mixer, torch.tensor([0.5, -0.5, 2.0, 0.0])[:, None].repeat(2, 1, 70))
        wide = None if chosen is None else Hedgehog(4, 2, 16).double()
        if wide is not None:
            wide.load_state_dict(mixer.state_dict())
        expected = near_far_reference(
            *(x.double() for x in (q, k, v)),
            wide,
            None if logit is None else logit.double(),
            window=8,
            sinks=2,
            mix=mix,
        )
        moved = [x.to(device).requires_grad_() for x in (q, k, v)]
        out = near_far_attention(
            *moved, None if chosen is None else chosen.to(device), None if logit is None else logit.to(device),
            window=8, sinks=2, mix=mix, backend="triton",
        )  # fmt: skip
        assert worst(out.cpu(), expected) <= 2e-4
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.square().sum(), moved))

    def test_no_far_mass_is_no_far_term(self, device):
        """Features that do not overlap, whatever mix_logit says."""
        q, k, v, *_ = make_inputs((1, 2, 1, 40, 16, 3, 8, 0, 2), torch.float32)
        mixer = Functional(Hedgehog(2, 1, 16), {})
        mixer.num_features = 4
        mixer.query_features = lambda q: torch.eye(4, device=q.device)[0].expand(*q.shape[:3], 4)
        mixer.key_features = lambda k: torch.eye(4, device=k.device)[1].expand(*k.shape[:3], 4)
        expected = near_far_attention(q, k, v, window=8)
        for mix in ("normalizer", "gate"):
            logit = torch.full((1, 2, 40), 30.0, device=device)
            out = near_far_attention(
                *(x.to(device) for x in (q, k, v)), mixer, logit, window=8, mix=mix, backend="triton"
            )
            assert worst(out.cpu(), expected) <= 1e-5

    @pytest.mark.parametrize(("logit", "near"), [(1e30, False), (-torch.inf, True)])
    def test_switched_off(self, logit, near, device):
        """What `window_off` and `state_off` put in the place of the mix; the gradients stay finite."""
        q, k, v, mixer, _ = make_inputs((1, 2, 1, 40, 16, 16, 8, 2, 8), torch.float32, grad=True)
        odds = torch.full((2,), logit)
        for mix in ("normalizer", "gate"):
            expected = near_far_attention(q, k, v, mixer, odds, window=8, sinks=2, mix=mix, backend="reference")
            if near:
                assert worst(expected, near_far_attention(q, k, v, window=8, sinks=2)) <= 1e-5
            out = near_far_attention(
                *(x.to(device) for x in (q, k, v)), mixer_on(mixer, device), odds.to(device),
                window=8, sinks=2, mix=mix, backend="triton",
            )  # fmt: skip
            assert worst(out.cpu(), expected) <= 2e-5
            grads = torch.autograd.grad(out.square().sum(), [q, k, v, *mixer.parameters()])
            assert all(bool(g.isfinite().all()) for g in grads)


class TestOddInputs:
    def test_empty_batch(self, device):
        q, k, v = (torch.zeros(0, h, 20, 16, device=device) for h in (4, 2, 2))
        out = near_far_attention(q, k, v, Hedgehog(4, 2, 16).to(device), window=8, backend="triton")
        assert out.shape == (0, 4, 20, 16)

    def test_documents_that_are_empty(self, device):
        q, k, v, mixer, mix_logit = make_inputs((1, 2, 1, 20, 16, 16, 8, 2, 8), torch.float32)
        options = {"window": 8, "sinks": 2}
        expected = near_far_attention(q, k, v, mixer, mix_logit, **options)
        borders = torch.tensor([0, 0, 20, 20], device=device)
        moved = [x.to(device) for x in (q, k, v)]
        out = near_far_attention(
            *moved, mixer.to(device), mix_logit.to(device), **options, cu_seqlens=borders, backend="triton"
        )
        assert worst(out.cpu(), expected) <= 2e-5

    @pytest.mark.parametrize("backend", ["torch", "triton"])
    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_nan(self, which, backend, device):
        """A NaN reaches outputs of its own sequence from the start of its chunk on, and nothing else."""
        place = device if backend == "triton" else torch.device("cpu")
        q, k, v, mixer, mix_logit = make_inputs((2, 2, 1, 40, 16, 16, 8, 2, 8), torch.float32)
        inputs = [x.to(place) for x in (q, k, v)]
        options = {"window": 8, "sinks": 2, "backend": backend}
        mixer, mix_logit = mixer.to(place), mix_logit.to(place)
        clean = near_far_attention(*inputs, mixer, mix_logit, **options)
        inputs[which][0, 0, 19, 3] = torch.nan
        out = near_far_attention(*inputs, mixer, mix_logit, **options)
        assert bool(out[0, 0, 19].isnan().any())
        assert torch.equal(out[1], clean[1])
        assert torch.equal(out[0, :, :16], clean[0, :, :16])

    @pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
    def test_nan_in_padding_is_never_read(self, backend, device):
        place = device if backend == "triton" else torch.device("cpu")
        q, k, v, mixer, mix_logit = make_inputs((2, 2, 1, 40, 16, 16, 8, 2, 8), torch.float32)
        mask = make_mask("left", 2, 40)
        options = {"window": 8, "sinks": 2, "backend": backend, "mask": mask.to(place)}
        inputs = [x.to(place) for x in (q, k, v)]
        mixer, mix_logit = mixer.to(place), mix_logit.to(place)
        clean = near_far_attention(*inputs, mixer, mix_logit, **options)
        loud = [x.masked_fill(~mask.to(place)[:, None, :, None], torch.nan) for x in inputs]
        assert torch.equal(near_far_attention(*loud, mixer, mix_logit, **options), clean)

    def test_head_size_beyond_the_limit(self, device):
        q = torch.zeros(1, 1, 4, 257, device=device)
        with pytest.raises(LinearizeError, match="q has head size 257, above 256; use backend='auto' or 'torch'"):
            near_far_attention(q, q, q, window=4, backend="triton")

    def test_features_beyond_the_limit(self, device):
        q = torch.zeros(1, 1, 4, 16, device=device)
        with pytest.raises(LinearizeError, match="the mixer has 514 features, above 512"):
            near_far_attention(q, q, q, Hedgehog(1, 1, 16, 257).to(device), window=4, backend="triton")

    def test_a_state_that_is_no_plain_sum(self, device):
        """Kernels that only add would be silently wrong."""

        class Fading(Hedgehog):
            def scan(self, state, phi_k, v):
                raise NotImplementedError

        q = torch.zeros(1, 1, 4, 16, device=device)
        mixer = Fading(1, 1, 16).to(device)
        with pytest.raises(LinearizeError, match="cannot run here: Fading has its own scan; use backend='auto'"):
            near_far_attention(q, q, q, mixer, window=4, backend="triton")

    @pytest.mark.gpu
    def test_float64_on_a_gpu(self):
        q = torch.zeros(1, 1, 4, 16, device="cuda", dtype=torch.float64)
        with pytest.raises(LinearizeError, match="not float64"):
            near_far_attention(q, q, q, window=4, backend="triton")


class TestOperators:
    @pytest.mark.parametrize("far", ["none", "normalizer", "gate"])
    def test_opcheck(self, far, device):
        """Schema, fake kernels, autograd registration and tracing, with torch's own checks."""
        from linearize.kernels.near_far.rows import rows_of_batch
        from linearize.kernels.near_far.triton_operators import near_far_operator

        dtype = torch.float32 if device.type == "cuda" else torch.float64
        q, k, v, mixer, mix_logit = make_inputs((1, 2, 1, 20, 16, 16, 4, 2, 4), dtype, grad=True)
        weights = [w.detach().to(device).requires_grad_() for w in mixer.parameters()]
        q, k, v, mix_logit = (x.detach().to(device).requires_grad_() for x in (q, k, v, mix_logit))
        rows = rows_of_batch(1, 20, 4, 2, device)
        kind, extra, mix = "hedgehog", (mix_logit, *weights), far
        if far == "none":
            kind, extra, mix = "none", (None, None, None), "normalizer"
        arguments = (q, k, v, *extra, rows.chunks, rows.sequences, rows.count, False, 4, 2, mix, kind, 0.25)
        torch.library.opcheck(near_far_operator, arguments)

    def test_compiled_with_a_window_that_is_a_symbol(self, device):
        """As an int from a closure is to torch.compile once it has changed."""
        q, k, v, mixer, _ = make_inputs((1, 2, 1, 40, 16, 16, 8, 2, 8), torch.float32)
        inputs, mixer = [x.to(device) for x in (q, k, v)], mixer.to(device)

        def run(q, k, v, window):
            return near_far_attention(q, k, v, mixer, window=window, sinks=2, backend="torch")

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
        with torch.no_grad():
            for window in (8, 4):
                assert worst(compiled(*inputs, window).cpu(), run(*inputs, window).cpu()) <= 1e-5

    def test_every_output_is_written(self, device):
        """Memory that nobody wrote would be noise in whatever compares or hashes an operator's results."""
        from linearize.kernels.near_far.rows import rows_of_batch
        from linearize.kernels.near_far.triton_operators import near_far_operator

        q, k, v, *_ = make_inputs((1, 2, 1, 20, 16, 16, 4, 2, 4), torch.float32)
        rows = rows_of_batch(1, 20, 4, 2, device)
        inputs = [x.to(device) for x in (q, k, v)]
        used = torch.full((8, 3, 1, 2, 20), torch.nan, device=device)  # what the allocator may hand out again
        del used
        tables = rows.chunks, rows.sequences, rows.count, False
        _, stats = near_far_operator(*inputs, None, None, None, *tables, 4, 2, "normalizer", "none", 0.25)
        assert bool((stats[2] == 0).all())

    def test_compiled_without_graph_breaks(self, device):
        q, k, v, mixer, mix_logit = make_inputs((2, 2, 1, 40, 16, 16, 8, 2, 8), torch.float32, grad=True)
        inputs = [x.detach().to(device).requires_grad_() for x in (q, k, v)]
        mixer, mix_logit = mixer.to(device), mix_logit.detach().to(device)
        mask = make_mask("left", 2, 40).to(device)

        def run(q, k, v, mask):
            return near_far_attention(q, k, v, mixer, mix_logit, window=8, sinks=2, mask=mask, backend="triton")

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
        for own_mask in (None, mask):
            results = []
            for function in (run, compiled):
                out = function(*inputs, own_mask)
                results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
            for actual, expected in zip(*results, strict=True):
                assert worst(actual.cpu(), expected.cpu()) <= 1e-5 * max(float(expected.detach().abs().max()), 1.0)


class TestSteps:
    """Prefill, in one piece or several, with what is remembered between them."""

    @pytest.mark.parametrize("padding", ["full", "left", "holes"])
    @pytest.mark.parametrize("far", FAR)
    @pytest.mark.parametrize("pieces", [(43,), (9, 1, 20, 3, 10), (8, 8, 16, 11)], ids=str)
    def test_equals_the_full_form(self, pieces, far, padding, device):
        shape = (2, 4, 2, 43, 16, 16, 4, 3, 8)
        q, k, v, *rest = make_inputs(shape, torch.float32)
        mixer, mix_logit, mix = far_options(far, *rest)
        options = {"window": 4, "sinks": 3, "mix": mix}
        mask = make_mask(padding, 2, 43)
        expected = near_far_attention(q, k, v, mixer, mix_logit, mask=mask, **options)
        place = [x.to(device) for x in (q, k, v)]
        mixer = None if mixer is None else mixer.to(device)
        logit = None if mix_logit is None else mix_logit.to(device)
        moved = None if mask is None else mask.to(device)
        memories, outs = [], []
        with torch.no_grad():
            for backend in ("torch", "triton"):
                out, memory = in_steps(pieces, *place, mixer, logit, moved, **options, backend=backend)
                memories.append(memory)
                outs.append(out.cpu())
        assert worst(outs[1], expected) <= 2e-5
        for name in ("near_k", "near_v", "sink_k", "sink_v", "lengths"):
            assert torch.equal(getattr(memories[0], name), getattr(memories[1], name))
        if mixer is not None:
            for a, b in zip(memories[0].state, memories[1].state, strict=True):
                assert worst(b.cpu(), a.cpu()) <= 1e-4

    @pytest.mark.parametrize("far", FAR)
    def test_gradients_of_a_first_piece(self, far, device):
        """Training with a cache, transformers' default, is training; and it remembers the same."""
        results = []
        for backend in ("torch", "triton"):
            q, k, v, *rest = make_inputs((2, 2, 1, 30, 16, 16, 4, 3, 8), torch.float32, grad=True)
            mixer, mix_logit, mix = far_options(far, *rest)
            leaves = [q, k, v] if mixer is None else [q, k, v, mix_logit, *mixer.parameters()]
            place = device if backend == "triton" else torch.device("cpu")
            moved = None if mixer is None else mixer_on(mixer, place)
            logit = None if mix_logit is None else mix_logit.to(place)
            mask = make_mask("left", 2, 30).to(place)
            out, memory = in_steps(
                [30], *(x.to(place) for x in (q, k, v)), moved, logit, mask, window=4, sinks=3, mix=mix, backend=backend
            )
            state = [] if memory.state is None else [x.cpu() for x in memory.state]
            results.append([out.detach().cpu(), *gradients(out, leaves), memory.near_k.cpu(), *state])
        for actual, expected in zip(*reversed(results), strict=True):
            assert worst(actual, expected) <= 2e-5 * max(float(expected.detach().abs().max()), 1.0)


class TestTables:
    """The tables of rows are shared by calls that run under different modes."""

    def run(self, inputs, mixer):
        return near_far_attention(*inputs, mixer, window=8, sinks=2, backend="triton")

    def test_first_in_inference_mode(self, device):
        from linearize.kernels.near_far import rows

        rows._kept.clear()
        q, k, v, mixer, _ = make_inputs((1, 2, 1, 30, 16, 16, 8, 2, 8), torch.float32, grad=True)
        inputs, mixer = [x.detach().to(device).requires_grad_() for x in (q, k, v)], mixer.to(device)
        with torch.inference_mode():
            expected = self.run(inputs, mixer).clone()
        out = self.run(inputs, mixer)
        assert torch.equal(out, expected)
        out.sum().backward()

    def test_first_in_an_export(self, device):
        from linearize.kernels.near_far import rows

        rows._kept.clear()
        q, k, v, mixer, _ = make_inputs((1, 2, 1, 30, 16, 16, 8, 2, 8), torch.float32)
        inputs, mixer = [x.to(device) for x in (q, k, v)], mixer.to(device).requires_grad_(False)

        class Attention(torch.nn.Module):
            def forward(self, q, k, v):
                return near_far_attention(q, k, v, mixer, window=8, sinks=2, backend="triton")

        exported = torch.export.export(Attention(), tuple(inputs), strict=False)
        assert any("near_far" in str(node.target) for node in exported.graph.nodes)
        assert torch.equal(exported.module()(*inputs), self.run(inputs, mixer))

    def test_only_a_few_are_kept(self):
        from linearize.kernels.near_far import rows

        for length in range(1, 100):
            rows.rows_of_batch(1, length, 8, 0, torch.device("cpu"))
        assert len(rows._kept) == rows.KEPT

    def test_a_mask_is_looked_at_again_when_it_changes(self, device):
        q, k, v, mixer, _ = make_inputs((2, 2, 1, 30, 16, 16, 8, 2, 8), torch.float32)
        inputs, mixer = [x.to(device) for x in (q, k, v)], mixer.to(device)
        mask = make_mask("left", 2, 30).to(device)
        options = {"window": 8, "sinks": 2, "mask": mask}
        for change in (None, (0, slice(0, 9), False), (1, slice(12, 15), False), (1, slice(12, 15), True)):
            if change is not None:
                mask[change[0], change[1]] = change[2]
            expected = near_far_attention(*inputs, mixer, **options, backend="torch")
            for _ in range(2):
                out = near_far_attention(*inputs, mixer, **options, backend="triton")
                assert worst(out.cpu(), expected.cpu()) <= 2e-5

    def test_columns_of_sequences(self):
        from linearize.kernels.near_far.rows import real_tokens, rows_of_documents, rows_of_mask

        mask = make_mask("left", 3, 30)
        assert torch.equal(real_tokens(rows_of_mask(mask, 8, 2), 3, 30, 8), mask)
        assert bool(real_tokens(rows_of_documents(torch.tensor([0, 3, 3, 30]), 30, 8, 2), 1, 30, 8).all())


class TestOnlySomeGradients:
    @pytest.mark.parametrize("wanted", ["mix_logit", "weights", "q"])
    def test_the_same_numbers(self, wanted, device):
        results = []
        for everything in (True, False):
            q, k, v, mixer, mix_logit = make_inputs((1, 2, 1, 40, 16, 16, 8, 2, 8), torch.float32, grad=True)
            asked = {"mix_logit": [mix_logit], "weights": list(mixer.parameters()), "q": [q]}[wanted]
            if not everything:
                for x in (q, k, v, mix_logit, *mixer.parameters()):
                    x.requires_grad_(any(x is y for y in asked))
            out = near_far_attention(
                *(x.to(device) for x in (q, k, v)), mixer_on(mixer, device), mix_logit.to(device), window=8, sinks=2,
                backend="triton",
            )  # fmt: skip
            results.append(gradients(out, asked))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_the_far_side_alone_computes_none_of_the_inputs(self, device, monkeypatch):
        """Attention transfer trains the mixer: dq, dk and dv would be half of its backward pass."""
        from linearize.kernels.near_far import triton_near_far

        launched = []
        monkeypatch.setattr(
            triton_near_far,
            "launch",
            lambda kernel, *a, **k: (launched.append(kernel.__name__), launch(kernel, *a, **k)),
        )
        q, k, v, mixer, _ = make_inputs((1, 2, 1, 40, 16, 16, 8, 2, 8), torch.float32)
        mixer = mixer.to(device)
        value, _ = far_read(*(x.to(device) for x in (q, k, v)), mixer, window=8, sinks=2, backend="triton")
        torch.autograd.grad(value.sum(), list(mixer.parameters()))
        assert "far_backward_keys" in launched
        assert not {"near_backward_queries", "near_backward_keys"} & set(launched)


class TestPaddingThatIsNan:
    @pytest.mark.parametrize("features", ["inside", "given"])
    @pytest.mark.parametrize("padding", ["left", "holes"])
    def test_no_gradient_sees_it(self, padding, features, device):
        results = []
        for loud in (False, True):
            q, k, v, mixer, mix_logit = make_inputs((2, 2, 1, 40, 16, 16, 8, 2, 8), torch.float32, grad=True)
            mask = make_mask(padding, 2, 40)
            fill = torch.nan if loud else 0.0
            inputs = [x.masked_fill(~mask[:, None, :, None], fill).to(device) for x in (q, k, v)]
            own = mixer_on(mixer, device)
            if features == "given":
                own = Functional(mixer, {n: p.to(device) for n, p in mixer.named_parameters()})
            out = near_far_attention(
                *inputs, own, mix_logit.to(device), window=8, sinks=2, mask=mask.to(device), backend="triton"
            )
            results.append([out.detach(), *gradients(out, [q, k, v, mix_logit, *mixer.parameters()])])
        for loud, quiet in zip(*reversed(results), strict=True):
            assert torch.equal(loud, quiet)
