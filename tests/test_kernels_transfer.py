"""Streamed attention transfer: softmax attention in its two halves, and the divergence of far weights.

The truths are explicit T x T maps in float64. "triton" runs in Triton's interpreter where there is no GPU.
"""

import itertools

import pytest
import torch

from linearize.errors import LinearizeError
from linearize.kernels.near_far import transfer
from linearize.kernels.near_far.transfer import far_divergence, split_attention
from tests.cost import LargestTensor
from tests.mutations import mutated
from tests.tolerance import assert_near, worst

FORMS = ["torch", pytest.param("triton", marks=pytest.mark.interpret)]
SCALE = 0.3
# batch, H, K, T, D, V, F, W, S
SHAPES = [
    (2, 4, 2, 37, 16, 8, 24, 4, 2),
    (1, 2, 1, 130, 8, 8, 40, 10, 13),  # more than one tile of queries, W no power of two, S > W
    (1, 3, 1, 70, 16, 16, 16, 16, 0),
    (1, 2, 2, 9, 4, 4, 4, 1, 0),
    (1, 1, 1, 33, 8, 6, 8, 5, 5),
    (1, 2, 1, 8, 8, 8, 8, 4, 2),  # two chunks: nothing is far
    (1, 2, 1, 1, 8, 8, 8, 4, 0),
]
# Smaller tiles of the PyTorch form, so that small inputs have several.
FORMS_AND_TILES = [("torch", None), ("torch", (16, 24)), pytest.param("triton", None, marks=pytest.mark.interpret)]


def make(shape, dtype=torch.float64, factor=2.0):
    """q, k, v, phi_q, phi_k."""
    batch, heads, kv_heads, length, size, value_size, features, _, _ = shape
    q = factor * torch.randn(batch, heads, length, size, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, length, size, dtype=torch.float64)
    v = torch.randn(batch, kv_heads, length, value_size, dtype=torch.float64)
    phi_q = torch.rand(batch, heads, length, features, dtype=torch.float64)
    phi_k = torch.rand(batch, kv_heads, length, features, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (*(x.to(dtype) for x in (q, k, v)), *(x.to(wide) for x in (phi_q, phi_k)))


def masks(length, window, sinks):
    """near, far: (T, T) bool."""
    near = torch.zeros(length, length, dtype=torch.bool)
    far = torch.zeros(length, length, dtype=torch.bool)
    for t, i in itertools.product(range(length), range(length)):
        if i <= t:
            (near if i < sinks or i // window >= t // window - 1 else far)[t, i] = True
    return near, far


def expanded(q, k):
    return k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)


def true_split(q, k, v, window, sinks):
    logits = q.double() @ expanded(q, k).mT * SCALE
    halves = [logits.masked_fill(~keys, -torch.inf) for keys in masks(q.shape[2], window, sinks)]
    values = expanded(q, v)
    return [x for half in halves for x in (half.softmax(-1).nan_to_num() @ values, half.logsumexp(-1))]


def true_divergence(q, k, phi_q, phi_k, window, sinks, tiny=1e-300):
    """(divergence, log n), log n as 0 where nothing is far."""
    _, far = masks(q.shape[2], window, sinks)
    logits = (q.double() @ expanded(q, k).mT * SCALE).masked_fill(~far, -torch.inf)
    p = logits.softmax(-1).nan_to_num()
    products = (phi_q.double() @ expanded(q, phi_k).mT).clamp_min(tiny)
    mass = (products * far).sum(-1, keepdim=True)
    student = torch.where(far, products, 1.0) / torch.where(mass > 0, mass, 1.0)
    # Teacher's weights that underflow in float64 have no part in the sum.
    terms = p * (torch.where(p > 0, p, 1.0).log() - student.log())
    return terms.sum(-1), torch.where(mass > 0, mass, 1.0).log().squeeze(-1)


def there(form, *tensors):
    """The tensors where the form runs: on the GPU, if there is one, for the kernels."""
    if form == "torch" or not torch.cuda.is_available():
        return tensors
    if tensors[0].dtype == torch.float64:
        pytest.skip("compiled kernels take no float64")
    return tuple(x.to("cuda") for x in tensors)


def split(form, q, k, v, window, sinks, scale=SCALE):
    parts = split_attention(*there(form, q, k, v), window=window, sinks=sinks, scale=scale, backend=form)
    return tuple(x.to(q.device) for x in parts)


def divergence(form, inputs, window, sinks, far_lse=None):
    """far_divergence of q, k, phi_q, phi_k with the form's own log Z_far."""
    q, k, phi_q, phi_k = inputs
    if far_lse is None:
        far_lse = split(form, q, k, k, window, sinks)[3]
    tensors = there(form, q, k, far_lse, phi_q, phi_k)
    outputs = far_divergence(*tensors, window=window, sinks=sinks, scale=SCALE, backend=form)
    return tuple(x.to(q.device) for x in outputs)


def set_tiles(monkeypatch, tiles):
    if tiles is not None:
        monkeypatch.setattr(transfer, "QUERIES", tiles[0])
        monkeypatch.setattr(transfer, "KEYS", tiles[1])


def known(log_mass):
    """log n, 0 where it is -inf."""
    return log_mass.masked_fill(log_mass == -torch.inf, 0.0)


class TestSplit:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize(("form", "tiles"), FORMS_AND_TILES)
    def test_equals_the_map(self, form, shape, dtype, tiles, monkeypatch):
        set_tiles(monkeypatch, tiles)
        q, k, v, _, _ = make(shape, dtype)
        window, sinks = shape[-2:]
        near, near_lse, far, far_lse = split(form, q, k, v, window, sinks)
        true_near, true_near_lse, true_far, true_far_lse = (x.to(dtype) for x in true_split(q, k, v, window, sinks))
        assert_near(near, true_near)
        assert_near(near_lse, true_near_lse)
        assert_near(far, true_far)
        some = masks(shape[3], window, sinks)[1].any(-1)
        assert_near(far_lse[:, :, some], true_far_lse[:, :, some])
        assert (far_lse[:, :, ~some] == -torch.inf).all()
        assert not far[:, :, ~some].any()

    def test_shapes_have_far_keys(self):
        far = [bool(masks(shape[3], *shape[-2:])[1].any()) for shape in SHAPES]
        assert far == [True] * 5 + [False] * 2

    @pytest.mark.parametrize("form", FORMS)
    def test_the_two_halves_are_causal_attention(self, form):
        q, k, v, _, _ = make(SHAPES[0], torch.float32)
        near, near_lse, far, far_lse = split(form, q, k, v, 4, 2, scale=None)
        rho = (near_lse - far_lse).sigmoid()[..., None]
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        assert_near(rho * near + (1 - rho) * far, expected)

    @pytest.mark.parametrize("form", FORMS)
    def test_a_later_token_changes_nothing(self, form):
        """So a padded token, behind the real ones, has no influence on them, whatever it holds."""
        q, k, v, _, _ = make(SHAPES[0], torch.float32)
        before = split(form, q, k, v, 4, 2, scale=None)
        for x in (q, k, v):
            x[:, :, 23:] = 50.0
        after = split(form, q, k, v, 4, 2, scale=None)
        for x, y in zip(before, after):
            assert torch.equal(x[:, :, :23], y[:, :, :23])
        assert not torch.equal(before[2], after[2])

    @pytest.mark.parametrize("form", FORMS)
    def test_large_logits(self, form):
        """At 1e4 float32 knows logits to 1e-3, so log Z is what is compared; weights still sum to 1."""
        q, k, v, _, _ = make(SHAPES[0], torch.float32, factor=1e4)
        parts = split(form, q, k, torch.ones_like(v), 4, 2)
        expected = true_split(q, k, v, 4, 2)
        some = expected[3] > -torch.inf
        assert expected[1].abs().max() > 1e4
        torch.testing.assert_close(parts[0], torch.ones_like(parts[0]), rtol=0, atol=1e-5)
        torch.testing.assert_close(parts[2][some], torch.ones_like(parts[2][some]), rtol=0, atol=1e-5)
        torch.testing.assert_close(parts[1], expected[1].float(), rtol=1e-6, atol=1e-2)
        torch.testing.assert_close(parts[3][some], expected[3][some].float(), rtol=1e-6, atol=1e-2)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, form, dtype):
        """Never more than twice the error of the same attention computed in that dtype throughout."""
        q, k, v, _, _ = make(SHAPES[1], dtype)
        parts = split(form, q, k, v, 10, 13)
        assert all(x.dtype == torch.float32 for x in parts)
        expected = true_split(q, k, v, 10, 13)
        logits = q @ k.repeat_interleave(2, 1).mT * SCALE
        for half, index in zip(masks(130, 10, 13), (0, 2)):
            plain = logits.masked_fill(~half, -torch.inf).softmax(-1).nan_to_num() @ v.repeat_interleave(2, 1)
            assert worst(parts[index], expected[index]) <= 2 * worst(plain, expected[index])

    @pytest.mark.parametrize("form", FORMS)
    def test_any_strides(self, form):
        q, k, v, _, _ = make(SHAPES[0])
        expected = split(form, q, k, v, 4, 2, scale=None)
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
        v = v.mT.contiguous().mT
        assert not any(x.is_contiguous() for x in (q, k, v))
        for x, y in zip(split(form, q, k, v, 4, 2, scale=None), expected):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)

    def test_no_gradient(self):
        inputs = [x.requires_grad_() for x in make(SHAPES[0])[:3]]
        assert not any(x.requires_grad for x in split_attention(*inputs, window=4, sinks=2))

    def test_empty(self):
        for batch, length in ((0, 37), (2, 0)):
            q, k, v, phi_q, phi_k = make((batch, 4, 2, length, 16, 8, 24, 4, 2), torch.float32)
            near, near_lse, far, far_lse = split_attention(q, k, v, window=4, sinks=2)
            assert near.shape == far.shape == (batch, 4, length, 8)
            assert near_lse.shape == far_lse.shape == (batch, 4, length)
            outputs = far_divergence(q, k, far_lse, phi_q.requires_grad_(), phi_k, window=4, sinks=2)
            assert [x.shape for x in outputs] == [(batch, 4, length)] * 2
            outputs[0].sum().backward()
            assert phi_q.grad.shape == phi_q.shape


def gradients_of(outputs, inputs, weights):
    value, log_mass = outputs
    return torch.autograd.grad((value * weights[0]).sum() + (known(log_mass) * weights[1]).sum(), inputs)


class TestDivergence:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize(("form", "tiles"), FORMS_AND_TILES)
    def test_equals_the_map(self, form, shape, dtype, tiles, monkeypatch):
        """Values and gradients, under weights a query that differ."""
        set_tiles(monkeypatch, tiles)
        self.compare(form, shape, dtype)

    @staticmethod
    def compare(form, shape, dtype):
        q, k, _, phi_q, phi_k = make(shape, dtype)
        window, sinks = shape[-2:]
        features = phi_q.requires_grad_(), phi_k.requires_grad_()
        weights = torch.randn(2, *q.shape[:3], dtype=torch.float64)
        outputs = divergence(form, (q, k, *features), window, sinks)
        expected = true_divergence(q, k, *features, window, sinks)
        some = masks(shape[3], window, sinks)[1].any(-1)
        assert_near(outputs[0].detach(), expected[0].detach().to(dtype))
        assert_near(known(outputs[1]).detach(), expected[1].detach().to(dtype))
        assert (outputs[1][:, :, ~some] == -torch.inf).all()
        assert not outputs[0][:, :, ~some].any()
        assert (outputs[0] > -1e-6).all()
        actual = gradients_of(outputs, features, weights.to(dtype))
        for x, y in zip(actual, gradients_of(expected, features, weights)):
            assert_near(x, y.to(dtype))
            assert bool(some.any()) == bool(x.any())

    @pytest.mark.parametrize("form", FORMS)
    def test_gradcheck(self, form):
        shape = (1, 2, 1, 13, 4, 4, 3, 3, 1)
        q, k, _, phi_q, phi_k = make(shape)
        far_lse = split(form, q, k, k, 3, 1)[3]

        def run(phi_q, phi_k):
            value, log_mass = divergence(form, (q, k, phi_q, phi_k), 3, 1, far_lse)
            return value, known(log_mass)

        features = (phi_q + 0.1).requires_grad_(), (phi_k + 0.1).requires_grad_()
        assert torch.autograd.gradcheck(run, features, atol=1e-7)

    @pytest.mark.parametrize("form", FORMS)
    def test_zero_where_the_maps_are_equal(self, form):
        """Keys of 5 kinds: features that say which kind a key is can hold every weight exactly."""
        q, k, _, _, _ = make(SHAPES[0])
        kinds = torch.arange(37).mul(7) % 5
        table = torch.randn(2, 2, 5, 16, dtype=torch.float64)
        k = table[:, :, kinds]
        phi_k = torch.nn.functional.one_hot(kinds, 5).double().expand(2, 2, 37, 5)
        phi_q = (q @ table.repeat_interleave(2, 1).mT * SCALE).exp() * torch.rand(2, 4, 37, 1, dtype=torch.float64)
        value, _ = divergence(form, (q, k, phi_q, phi_k), 4, 2)
        assert value.abs().max() < 1e-12
        value, _ = divergence(form, (q, k, phi_q.sqrt(), phi_k), 4, 2)
        assert value.max() > 0.1

    @pytest.mark.parametrize("form", FORMS)
    def test_rounding_of_the_log_sum_exp_does_no_harm(self, form):
        q, k, _, phi_q, phi_k = make(SHAPES[0])
        far_lse = split_attention(q, k, k, window=4, sinks=2, scale=SCALE)[3]
        value, _ = divergence(form, (q, k, phi_q, phi_k), 4, 2, far_lse)
        shifted, _ = divergence(form, (q, k, phi_q, phi_k), 4, 2, far_lse + 0.3)
        assert_near(shifted, value)

    @pytest.mark.parametrize("form", FORMS)
    def test_large_logits(self, form):
        """The teacher looks at one key. At 1e4 float32 knows logits to 1e-3, and weights with them."""
        q, k, _, phi_q, phi_k = make(SHAPES[0], torch.float32, factor=1e4)
        features = phi_q.requires_grad_(), phi_k.requires_grad_()
        outputs = divergence(form, (q, k, *features), 4, 2)
        expected = true_divergence(q, k, *features, 4, 2)
        weights = torch.ones(2, *q.shape[:3])
        torch.testing.assert_close(outputs[0], expected[0].float(), rtol=1e-3, atol=1e-2)
        for x, y in zip(gradients_of(outputs, features, weights), gradients_of(expected, features, weights)):
            assert x.isfinite().all()
            torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)

    @pytest.mark.parametrize("form", FORMS)
    def test_forgotten_keys(self, form):
        """f = 0: as the smallest normal number in the logarithm, without a gradient; n counts it as it is."""
        tiny = torch.finfo(torch.float32).tiny
        q, k, _, phi_q, phi_k = make(SHAPES[0], torch.float32)
        phi_k[:, :, ::2] = 0.0
        features = phi_q.requires_grad_(), phi_k.requires_grad_()
        outputs = divergence(form, (q, k, *features), 4, 2)
        expected = true_divergence(q, k, *features, 4, 2, tiny)
        torch.testing.assert_close(outputs[0], expected[0].float(), rtol=2e-4, atol=1e-4)
        assert outputs[0].max() > 10
        weights = torch.randn(2, *q.shape[:3])
        weights[1] = 0.0
        actual = gradients_of(outputs, features, weights)
        for x, y in zip(actual, gradients_of(expected, features, weights)):
            assert_near(x, y)
        assert not actual[1][:, :, ::2].any()
        assert actual[1][:, :, 3:25:2].any()
        # The far mass does have a gradient there: d log n / d f = 1 / n.
        outputs = divergence(form, (q, k, *features), 4, 2)
        assert torch.autograd.grad(known(outputs[1]).sum(), features[1])[0][:, :, 4:24:2].all()

    @pytest.mark.parametrize("form", FORMS)
    def test_no_far_mass_at_all(self, form):
        """The student's map counts as even: log of the number of keys less the teacher's entropy."""
        q, k, _, phi_q, phi_k = make(SHAPES[0], torch.float32)
        features = torch.zeros_like(phi_q, requires_grad=True), phi_k.requires_grad_()
        value, log_mass = divergence(form, (q, k, *features), 4, 2)
        assert (log_mass == -torch.inf).all()
        even, _ = true_divergence(q, k, torch.ones_like(phi_q), torch.ones_like(phi_k), 4, 2)
        # log M is that of 1e-38 and fewer than 64 keys: nothing cancels.
        torch.testing.assert_close(value, even.float(), rtol=1e-4, atol=1e-4)
        gradients = torch.autograd.grad(value.sum() + known(log_mass).sum(), features)
        assert not any(x.any() for x in gradients)

    @pytest.mark.parametrize("form", FORMS)
    def test_a_later_token_changes_nothing(self, form):
        """Padding behind the real tokens: no influence on their values, and none on the gradients they leave."""
        results = []
        q, k, _, phi_q, phi_k = make(SHAPES[0], torch.float32)
        for value in (0.0, 50.0):
            for x in (q, k, phi_q, phi_k):
                x[:, :, 23:] = value
            features = phi_q.clone().requires_grad_(), phi_k.clone().requires_grad_()
            outputs = divergence(form, (q, k, *features), 4, 2)
            kept = [x[:, :, :23] for x in outputs]
            gradients = gradients_of(kept, features, torch.ones(2, *q.shape[:2], 23))
            assert not any(x[:, :, 23:].any() for x in gradients)
            results.append([*(x.detach() for x in kept), *(x[:, :, :23] for x in gradients)])
        for x, y in zip(*results):
            assert torch.equal(x, y)

    @pytest.mark.parametrize("form", FORMS)
    def test_half_precision(self, form):
        """bfloat16 q and k, float32 features: sums are float32. The Triton form's products of features are bfloat16."""
        q, k, _, phi_q, phi_k = make(SHAPES[1], torch.bfloat16)
        features = phi_q.requires_grad_(), phi_k.requires_grad_()
        outputs = divergence(form, (q, k, *features), 10, 13)
        assert all(x.dtype == torch.float32 for x in outputs)
        expected = true_divergence(q, k, *features, 10, 13)
        rounded = true_divergence(q, k, *(x.bfloat16().double() for x in features), 10, 13)
        limit = 1e-5 if form == "torch" else 2 * worst(rounded[0], expected[0])
        assert worst(outputs[0], expected[0]) <= limit
        actual = gradients_of(outputs, features, torch.ones(2, *q.shape[:3]))
        for x, y in zip(actual, gradients_of(expected, features, torch.ones(2, *q.shape[:3]))):
            assert x.dtype == torch.float32
            # 2^-8, the rounding of weights and features to bfloat16, of the largest.
            assert worst(x, y) <= (1e-5 if form == "torch" else 2**-8) * float(y.abs().max())

    @pytest.mark.parametrize("form", FORMS)
    def test_any_strides(self, form):
        q, k, _, phi_q, phi_k = make(SHAPES[0])
        expected, _ = divergence(form, (q, k, phi_q, phi_k), 4, 2)
        views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, phi_q)] + [phi_k.mT.contiguous().mT]
        assert not any(x.is_contiguous() for x in views)
        actual, _ = divergence(form, views, 4, 2)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("form", FORMS)
    def test_the_same_every_time(self, form):
        q, k, _, phi_q, phi_k = make(SHAPES[1], torch.float32)
        features = phi_q.requires_grad_(), phi_k.requires_grad_()
        runs = []
        for _ in range(2):
            outputs = divergence(form, (q, k, *features), 10, 13)
            runs.append([*outputs, *gradients_of(outputs, features, torch.ones(2, *q.shape[:3]))])
        assert all(torch.equal(x, y) for x, y in zip(*runs))

    def test_the_teacher_gets_no_gradient(self):
        q, k, _, phi_q, phi_k = make(SHAPES[0])
        far_lse = split_attention(q, k, k, window=4, sinks=2)[3]
        inputs = [x.requires_grad_() for x in (q, k, far_lse, phi_q, phi_k)]
        value, _ = far_divergence(*inputs, window=4, sinks=2)
        value.sum().backward()
        assert [x.grad is None for x in inputs] == [True] * 3 + [False] * 2

    def test_no_second_derivative(self):
        q, k, _, phi_q, phi_k = make(SHAPES[0])
        phi_q.requires_grad_()
        value, _ = divergence("torch", (q, k, phi_q, phi_k), 4, 2)
        weights = torch.ones_like(value, requires_grad=True)
        (gradient,) = torch.autograd.grad((value * weights).sum(), phi_q, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_no_tensor_of_length_squared():
    largest = {}
    for length in (1024, 4096):
        q, k, v, phi_q, phi_k = make((1, 4, 2, length, 16, 16, 16, 16, 2), torch.float32)
        with LargestTensor() as record:
            far_lse = split_attention(q, k, v, window=16, sinks=2)[3]
            value, log_mass = far_divergence(
                q, k, far_lse, phi_q.requires_grad_(), phi_k.requires_grad_(), window=16, sinks=2
            )
            (value.sum() + known(log_mass).sum()).backward()
        largest[length] = record.bytes
    assert largest[4096] <= 4.1 * largest[1024]
    assert largest[4096] <= 4 * 4 * 4096 * 64  # float32, 4 heads, 64 queries by every key


BAD = {
    "window 0 is below 1; use at least 1": {"window": 0},
    "sinks -1 is below 0; use 0 for none": {"sinks": -1},
    "backend 'reference' has no streamed form; use 'auto', 'torch' or 'triton'": {"backend": "reference"},
    "k has shape (2, 2, 36, 16); it needs (2, 2, 37, 16)": {"k": torch.zeros(2, 2, 36, 16)},
    "k is torch.bfloat16 but q is torch.float32; convert them to one dtype": {
        "k": torch.zeros(2, 2, 37, 16, dtype=torch.bfloat16)
    },
    "q has shape (4, 37, 16); it needs 4 dimensions (batch, heads, tokens, size)": {"q": torch.zeros(4, 37, 16)},
    "4 query heads are no multiple of 3 key heads; k needs a divisor of 4": {
        "k": torch.zeros(2, 3, 37, 16),
        "v": torch.zeros(2, 3, 37, 8),
        "phi_k": torch.zeros(2, 3, 37, 24),
    },
}
BAD_VALUES = {"v has shape (2, 2, 35, 8); it needs (2, 2, 37) and a size": {"v": torch.zeros(2, 2, 35, 8)}}
BAD_FEATURES = {
    "phi_q has shape (2, 3, 37, 24); it needs (2, 4, 37, 24)": {"phi_q": torch.zeros(2, 3, 37, 24)},
    "phi_k has shape (2, 2, 37, 23); it needs (2, 2, 37, 24)": {"phi_k": torch.zeros(2, 2, 37, 23)},
    "far_lse has shape (2, 4, 36, 1); it needs (2, 4, 37, 1)": {"far_lse": torch.zeros(2, 4, 36)},
}


@pytest.mark.parametrize("message", [*BAD, *BAD_VALUES])
def test_bad_input_of_split_attention(message):
    q, k, v, _, _ = make(SHAPES[0], torch.float32)
    arguments = {"q": q, "k": k, "v": v, "window": 4, "sinks": 2} | (BAD | BAD_VALUES)[message]
    arguments.pop("phi_k", None)
    with pytest.raises(LinearizeError) as error:
        split_attention(**arguments)
    assert str(error.value) == f"split_attention: {message}"


@pytest.mark.parametrize("message", [*BAD, *BAD_FEATURES])
def test_bad_input_of_far_divergence(message):
    q, k, _, phi_q, phi_k = make(SHAPES[0], torch.float32)
    far_lse = torch.zeros(2, 4, 37)
    arguments = {"q": q, "k": k, "far_lse": far_lse, "phi_q": phi_q, "phi_k": phi_k, "window": 4, "sinks": 2}
    arguments |= (BAD | BAD_FEATURES)[message]
    arguments.pop("v", None)
    with pytest.raises(LinearizeError) as error:
        far_divergence(**arguments)
    assert str(error.value) == f"far_divergence: {message}"


# --- the whole grid, and whether it would notice ---------------------------------------------------------------------

GRID = [
    (2, 2 * group, 2, length, size, size, size, window, sinks)
    for length, window, sinks, size, group in itertools.product(
        (1, 17, 64, 65, 200), (16, 20, 32), (0, 4), (16, 64), (1, 3)
    )
]


@pytest.mark.kernels
@pytest.mark.interpret
@pytest.mark.parametrize("shape", GRID)
def test_grid(shape):
    TestSplit().test_equals_the_map("triton", shape, torch.float32, None, None)
    TestDivergence.compare("triton", shape, torch.float32)


MUTATIONS = {
    "a window too long": ("return tl.maximum((t // WINDOW - 1)", "return tl.maximum((t // WINDOW - 2)"),
    "not causal": ("(i[None, :] <= t[:, None])", "(i[None, :] <= t[:, None] + 1)"),
    "no rescale of the sum": ("total = total * shrink +", "total = total +"),
    "no rescale of the values": ("acc = acc * shrink[:, None]", "acc = acc"),
    "sinks twice": ("tl.minimum(window_begin, SINKS)", "tl.minimum(window_begin + WINDOW, SINKS)"),
    "only the first head of a group": ("for g in range(0, GROUP)", "for g in range(0, 1)"),
    "first queries of a key left out": ("// WINDOW + 2) * WINDOW", "// WINDOW + 3) * WINDOW"),
    "sinks get a gradient": ("(i >= SINKS)[:, None] & ", ""),
    "only the first block of features": ("for b in range(0, BLOCKS_F)", "for b in range(0, 1)"),
    "no mass in the gradient": ("steep, 0.0) + share", "steep, 0.0)"),
    "unbounded sum": ("tl.sum(tl.where(seen, bounded, 0.0), 1)", "tl.sum(bounded, 1)"),
}


IN_THE_INTERPRETER = pytest.mark.skipif(torch.cuda.is_available(), reason="float64, on the CPU")


def results(module, monkeypatch):
    """Everything the kernels compute of one case, in float64."""
    shape = (1, 4, 2, 75, 16, 8, 40, 6, 7)
    torch.manual_seed(0)
    q, k, v, phi_q, phi_k = make(shape)
    features = phi_q.requires_grad_(), phi_k.requires_grad_()
    form = "torch"
    if module is not None:
        form = "triton"
        monkeypatch.setattr(transfer, "_kernels", lambda *args, **kwargs: module)
    parts = split_attention(q, k, v, window=6, sinks=7, scale=SCALE, backend=form)
    outputs = far_divergence(q, k, parts[3], *features, window=6, sinks=7, scale=SCALE, backend=form)
    gradients = gradients_of(outputs, features, torch.ones(2, *q.shape[:3]))
    return [known(x).detach() for x in (*parts, *outputs, *gradients)]


@IN_THE_INTERPRETER
@pytest.mark.interpret
def test_results_agree(monkeypatch):
    """What the mutations below spoil."""
    from linearize.kernels.near_far import triton_transfer

    expected = results(None, monkeypatch)
    for x, y in zip(results(triton_transfer, monkeypatch), expected):
        assert_near(x, y)


@IN_THE_INTERPRETER
@pytest.mark.interpret
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_noticed(name, monkeypatch, tmp_path):
    from linearize.kernels.near_far import triton_transfer

    expected = results(None, monkeypatch)
    spoilt = results(mutated(triton_transfer, *MUTATIONS[name], tmp_path), monkeypatch)
    errors = [float((x - y).abs().max()) for x, y in zip(spoilt, expected)]
    assert not all(error < 1e-6 for error in errors), errors
