"""What a layer is taught: the teacher's near, far and shares, the losses, and the mix in closed form.

The truths here are explicit T x T masks in float64, one row and one head at a time, without padding.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from linearize.attention import Observation
from linearize.convert import converted_layers
from linearize.distill.objectives import (
    OBJECTIVES,
    FarTarget,
    calibrated_mix,
    decomposed_loss,
    hidden_loss,
    output_loss,
    weights_loss,
)
from linearize.distill.transfer import calibrate, observe
from linearize.errors import LinearizeError
from linearize.kernels.near_far import near_far_attention
from tests.cost import LargestTensor
from tests.tiny_models import make_student, make_tokens, pad
from tests.tolerance import assert_near

HEADS, KV_HEADS, SIZE = 4, 2, 16
MIXES = ("normalizer", "gate")
PADDING = ("full", "left", "right", "holes")
# T, W, S
SHAPES = [
    (37, 4, 2),
    (37, 4, 0),
    (32, 4, 4),  # S = W, no tail
    (37, 4, 8),  # S = 2 W
    (37, 3, 7),  # S > 2 W
    (37, 12, 5),
    (9, 1, 0),
]


def make_mask(padding, batch, length):
    """(B, T) bool or None; the rows differ, and the last one is too short for any far key."""
    if padding == "full":
        return None
    column = torch.arange(length)
    amount = torch.tensor([0, 5, length - 2])[:batch, None]
    if padding == "left":
        return column >= amount
    if padding == "right":
        return column < length - amount
    mask = (column * 7 + torch.arange(batch)[:, None] * 3) % 5 > 0
    mask[-1] = column % 19 == 3
    return mask


def make_seen(mix="normalizer", shape=SHAPES[0], padding="full", batch=3, factor=1.5, dtype=torch.float32):
    """What a layer with random mixer and mix saw: random q, k, v."""
    length, window, sinks = shape
    student = make_student("llama", mix, window=window, sinks=sinks)
    q = factor * torch.randn(batch, HEADS, length, SIZE)
    k, v = torch.randn(batch, KV_HEADS, length, SIZE), torch.randn(batch, KV_HEADS, length, SIZE)
    layer = converted_layers(student)[1]
    return Observation(layer, *(x.to(dtype) for x in (q, k, v)), make_mask(padding, batch, length))


def truth(seen):
    """By row, of its real tokens, in float64: out, near, far (H, n, V), log z_near, log z_far (H, n), and which
    tokens have far keys (n,); the student's value and log n of the far side, with gradient."""
    config, layer = seen.layer.linearize_config, seen.layer
    rows = []
    for b in range(seen.q.shape[0]):
        real = torch.arange(seen.q.shape[2]) if seen.mask is None else seen.mask[b].nonzero()[:, 0]
        n = len(real)
        near, far = torch.zeros(n, n, dtype=torch.bool), torch.zeros(n, n, dtype=torch.bool)
        for t in range(n):
            for i in range(t + 1):
                is_near = i < config.sinks or i // config.window >= t // config.window - 1
                (near if is_near else far)[t, i] = True
        heads = []
        for h in range(HEADS):
            kv = h // (HEADS // KV_HEADS)
            q, k, v = seen.q[b, h, real].double(), seen.k[b, kv, real].double(), seen.v[b, kv, real].double()
            logits = q @ k.T * layer.scaling
            inside = {name: logits.masked_fill(~keys, -torch.inf) for name, keys in (("near", near), ("far", far))}
            phi_q = features(q, layer.mixer.query_weight[h])
            phi_k = features(k, layer.mixer.key_weight[kv])
            weights = (phi_q @ phi_k.T) * far
            mass = weights.sum(-1)
            heads.append(
                {
                    "q": q,
                    "logits": logits.masked_fill(~(near | far), -torch.inf),
                    "weights": weights,
                    "out": logits.masked_fill(~(near | far), -torch.inf).softmax(-1) @ v,
                    "near": inside["near"].softmax(-1) @ v,
                    "far": inside["far"].softmax(-1).nan_to_num() @ v,
                    "near_lse": inside["near"].logsumexp(-1),
                    "far_lse": inside["far"].logsumexp(-1),
                    "state": (weights @ v) / mass.clamp_min(1e-300)[:, None],
                    "log_mass": mass.clamp_min(1e-300).log(),
                    "mix": q @ layer.mix.weight[h].double() + layer.mix.bias[h].double(),
                }
            )
        row = {key: torch.stack([head[key] for head in heads]) for key in heads[0]}
        rows.append(SimpleNamespace(**row, is_near=near, is_far=far, counted=far.any(-1), count=n))
    return rows


def features(x, weight):
    projected = x @ weight.double()
    return torch.cat([projected.softmax(-1), (-projected).softmax(-1)], -1)


def gathered(rows, *names):
    """The counted tokens of all rows, each (H, N, ...)."""
    return [torch.cat([getattr(row, name)[:, row.counted] for row in rows], 1) for name in names]


def true_terms(seen):
    """(far term, mix term, output loss, weights loss, hidden loss) by their formulas, with gradient to mixer and mix."""
    rows = truth(seen)
    out, near, far, near_lse, far_lse, state, log_mass, logit = gathered(
        rows, "out", "near", "far", "near_lse", "far_lse", "state", "log_mass", "mix"
    )
    share = (far_lse - near_lse).sigmoid()  # 1 - rho
    wanted = share[..., None] * far
    far_term = (share[..., None] * (state - far)).square().sum(-1).mean() / wanted.square().sum(-1).mean()
    if seen.layer.linearize_config.mix == "normalizer":
        logit = logit + log_mass - near_lse
    r = logit.sigmoid()
    mix_term = (share * (share.log() - r.log()) + (1 - share) * ((1 - share).log() - (1 - r).log())).mean()
    student = near + r[..., None] * (state - near)
    output = (student - out).square().sum(-1).mean() / out.square().sum(-1).mean()
    divergences = [map_divergence(row, seen.layer.linearize_config.mix) for row in rows]
    p = seen.layer.o_proj.weight.detach().double()
    error, whole = (x.transpose(0, 1).flatten(1) @ p.T for x in (student - out, out))  # (N, hidden)
    hidden = error.square().sum(-1).mean() / whole.square().sum(-1).mean()
    return far_term, mix_term, output, torch.cat(divergences, 1).mean(), hidden


def map_divergence(row, mix):
    """sum_i a_i (log a_i - log s_i) of the counted tokens (H, N), from the two T x T maps."""
    teacher = row.logits.softmax(-1)
    odds = student_log_odds(row, mix)[..., None]
    near = row.logits.masked_fill(~row.is_near, -torch.inf).softmax(-1)
    far = row.weights / row.weights.sum(-1, keepdim=True).clamp_min(1e-300)
    student = torch.where(row.is_near, (-odds).sigmoid() * near, odds.sigmoid() * far)
    assert torch.allclose(student.sum(-1)[:, row.counted], torch.ones((), dtype=student.dtype))
    seen = row.is_near | row.is_far
    ratio = torch.where(seen, teacher, 1.0).log() - torch.where(seen, student, 1.0).clamp_min(1e-300).log()
    return (teacher * ratio).sum(-1)[:, row.counted]


def trained(seen):
    """The parameters of mixer and mix by name."""
    return dict(seen.layer.mixer.named_parameters(prefix="mixer")) | dict(seen.layer.mix.named_parameters(prefix="mix"))


class TestFarTarget:
    @pytest.mark.parametrize("padding", PADDING)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_near_far_and_shares(self, shape, padding):
        seen = make_seen(shape=shape, padding=padding)
        target = FarTarget(seen)
        assert target.counted.shape == (3, 1, target.q.shape[2])
        assert target.q.shape[2] % shape[1] == 0
        for b, row in enumerate(truth(seen)):
            n = row.count
            assert torch.equal(target.counted[b, 0, :n], row.counted)
            assert not target.counted[b, 0, n:].any()
            for name, expected in (("out", row.out), ("near", row.near), ("near_lse", row.near_lse), ("far", row.far)):
                assert_near(getattr(target, name)[b, :, :n], expected.float())
            assert (target.far_lse[b, :, :n][:, ~row.counted] == -torch.inf).all()
            assert not target.far_share[b, :, :n][:, ~row.counted].any()
            some = row.counted
            rho = 1 - target.far_share[b, :, :n][:, some]
            near, far, near_lse, far_lse, out = gathered([row], "near", "far", "near_lse", "far_lse", "out")
            assert_near(rho, (near_lse - far_lse).sigmoid().float())
            assert_near(target.far_log_odds[b, :, :n][:, some], (far_lse - near_lse).float())
            # The identity that the objective rests on: o = rho near + (1 - rho) far.
            rho = rho.double()[..., None]
            assert_near((rho * near + (1 - rho) * far).float(), out.float())

    def test_some_tokens_count_in_each_shape(self):
        assert all(FarTarget(make_seen(shape=shape)).counted.any() for shape in SHAPES)

    def test_no_gradient(self):
        # 32 tokens in chunks of 4: nothing is copied by padding.
        seen = make_seen(shape=(32, 4, 2))
        for x in (seen.q, seen.k, seen.v):
            x.requires_grad_(True)
        target = FarTarget(seen)
        tensors = [x for x in vars(target).values() if isinstance(x, torch.Tensor)]
        assert len(tensors) >= 7
        assert not any(x.requires_grad for x in tensors)

    @pytest.mark.parametrize("factor", [1e-3, 1e2])
    def test_shares_at_the_ends_are_finite(self, factor):
        seen = make_seen(factor=factor)
        target = FarTarget(seen)
        counted = target.counted.expand_as(target.far_log_odds)
        assert bool(target.far_log_odds[counted].isfinite().all())
        # log Z_far is summed for itself: no share is too small to be told apart from none.
        odds = torch.cat([(row.far_lse - row.near_lse)[:, row.counted] for row in truth(seen)], 1)
        actual = torch.cat([target.far_log_odds[b][:, target.counted[b, 0]] for b in range(3)], 1)
        torch.testing.assert_close(actual, odds.float(), rtol=1e-5, atol=1e-4)
        assert factor < 1 or odds.min() < -100


class TestLosses:
    @pytest.mark.parametrize("padding", PADDING)
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("mix", MIXES)
    def test_formulas(self, mix, shape, padding):
        seen = make_seen(mix, shape, padding)
        with torch.no_grad():
            far_term, mix_term, output, weights, hidden = true_terms(seen)
            assert far_term > 0.05
            assert mix_term > 0.001
            assert weights > mix_term
            assert_near(weights_loss(seen), weights.float())
            assert_near(decomposed_loss(seen), (far_term + mix_term).float())
            assert_near(output_loss(seen), output.float())
            assert_near(hidden_loss(seen), hidden.float())

    @pytest.mark.parametrize("padding", ["full", "left"])
    @pytest.mark.parametrize("mix", MIXES)
    def test_output_loss_is_the_error_of_what_the_layer_puts_out(self, mix, padding):
        seen = make_seen(mix, padding=padding)
        config, layer = seen.layer.linearize_config, seen.layer
        with torch.no_grad():
            out = near_far_attention(
                *(seen.q, seen.k, seen.v, layer.mixer, layer.mix(seen.q)),
                window=config.window,
                sinks=config.sinks,
                mix=mix,
                scale=layer.scaling,
                mask=seen.mask,
            )
            loss = output_loss(seen)
        error = norm = 0.0
        for b, row in enumerate(truth(seen)):
            real = torch.arange(37) if seen.mask is None else seen.mask[b].nonzero()[:, 0]
            student = out[b, :, real].double()
            # Without far keys the student is the teacher: all the error is in the counted tokens.
            assert_near(student[:, ~row.counted].float(), row.out[:, ~row.counted].float())
            error += (student - row.out).square().sum()
            norm += row.out[:, row.counted].square().sum()
        assert_near(loss, (error / norm).detach().float())

    @pytest.mark.parametrize("padding", ["full", "right"])
    @pytest.mark.parametrize("objective", OBJECTIVES)
    @pytest.mark.parametrize("mix", MIXES)
    def test_gradients(self, mix, objective, padding):
        seen = make_seen(mix, (32, 4, 2), padding)
        for x in (seen.q, seen.k, seen.v):
            x.requires_grad_(True)
        OBJECTIVES[objective](seen).backward()
        parameters = trained(seen)
        actual = {name: p.grad for name, p in parameters.items()}
        for parameter in parameters.values():
            parameter.grad = None
        far_term, mix_term, output, weights, hidden = true_terms(seen)
        truths = {"decomposed": far_term + mix_term, "output": output, "weights": weights, "hidden": hidden}
        truths[objective].backward()
        for name, parameter in parameters.items():
            assert actual[name].abs().max() > 1e-4, name
            assert_near(actual[name], parameter.grad)

    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_gradients_reach_mixer_and_mix_only(self, objective):
        seen = make_seen(shape=(32, 4, 2))
        for x in (seen.q, seen.k, seen.v):
            x.requires_grad_(True)
        OBJECTIVES[objective](seen).backward()
        assert [x.grad for x in (seen.q, seen.k, seen.v)] == [None] * 3
        reached = {name for name, p in seen.layer.named_parameters() if p.grad is not None}
        assert reached == trained(seen).keys()
        assert all(p.grad is None for p in seen.layer.original.parameters())

    def test_the_far_term_has_no_gradient_to_the_mix(self):
        """Decomposed: what reaches the mix is the mix term's gradient; under gate, the mixer gets only the far's."""
        for mix in MIXES:
            seen = make_seen(mix)
            decomposed_loss(seen).backward()
            far_term, mix_term, *_ = true_terms(seen)
            for name, parameter in trained(seen).items():
                term = far_term if name.startswith("mixer") else mix_term
                (expected,) = torch.autograd.grad(term, parameter, retain_graph=True)
                if name.startswith("mix.") or mix == "gate":
                    assert_near(parameter.grad, expected)
                else:
                    # Under normalizer log n is a part of the share, so the mixer gets both.
                    assert not torch.allclose(parameter.grad, expected, rtol=1e-2, atol=1e-5)

    @pytest.mark.parametrize("objective", OBJECTIVES)
    @pytest.mark.parametrize("mix", MIXES)
    def test_padding_has_no_influence(self, mix, objective):
        seen = make_seen(mix, padding="holes")
        hole = ~seen.mask[:, None, :, None]
        other = Observation(seen.layer, *(x.masked_fill(hole, 50.0) for x in (seen.q, seen.k, seen.v)), mask=seen.mask)
        with torch.no_grad():
            assert torch.equal(OBJECTIVES[objective](seen), OBJECTIVES[objective](other))

    @pytest.mark.parametrize("objective", OBJECTIVES)
    @pytest.mark.parametrize("mix", MIXES)
    def test_nothing_to_learn_from_is_a_loss_of_zero(self, mix, objective):
        seen = make_seen(mix, (8, 4, 2))  # two chunks: nothing has left the window
        loss = OBJECTIVES[objective](seen)
        loss.backward()
        assert loss == 0
        assert all(p.grad is None or not p.grad.any() for p in trained(seen).values())

    @pytest.mark.parametrize("objective", OBJECTIVES)
    @pytest.mark.parametrize("mix", MIXES)
    def test_half_precision_is_float32_inside(self, mix, objective):
        seen = make_seen(mix, dtype=torch.bfloat16)
        loss = OBJECTIVES[objective](seen)
        loss.backward()
        wide = Observation(seen.layer, seen.q.float(), seen.k.float(), seen.v.float(), None)
        assert_near(loss.detach(), OBJECTIVES[objective](wide).detach())
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trained(seen).values())

    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_no_tensor_of_length_squared(self, objective):
        largest = {}
        for length in (512, 2048):
            seen = make_seen(shape=(length, 16, 2), batch=1)
            with LargestTensor() as record:
                OBJECTIVES[objective](seen).backward()
            largest[length] = record.bytes
        assert largest[2048] <= 4.1 * largest[512]
        assert largest[2048] < 4 * HEADS * 2048 * 2048 / 8


class TestBypass:
    """Negative control of all objectives: right state and right mix are a loss of 0, either of them wrong is not.

    The teacher is uniform (q = k = 0): its far side is a mean over the far keys, which the state of any feature map
    holds, and its share follows from counting.
    """

    @pytest.fixture
    def seen(self):
        seen = make_seen("normalizer", (64, 4, 2))
        seen = Observation(seen.layer, torch.zeros_like(seen.q), torch.zeros_like(seen.k), seen.v, None)
        set_mix(seen.layer, *calibrated_mix(seen))
        return seen

    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_right_state_and_right_mix(self, objective, seen):
        with torch.no_grad():
            assert OBJECTIVES[objective](seen).abs() < 1e-6

    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_wrong_state(self, objective, seen):
        """Later keys count more; the mix is calibrated to it, and cannot make up for it."""
        mixer = seen.layer.mixer
        right = mixer.key_features
        mixer.key_features = lambda k: right(k) * torch.arange(1.0, k.shape[2] + 1)[:, None]
        set_mix(seen.layer, *calibrated_mix(seen))
        with torch.no_grad():
            assert OBJECTIVES[objective](seen) > 1e-2

    @pytest.mark.parametrize("objective", OBJECTIVES)
    @pytest.mark.parametrize("bias", [1.0, -100.0])  # -100: the state is never read
    def test_wrong_mix(self, objective, bias, seen):
        seen.layer.mix.bias.data += bias
        with torch.no_grad():
            assert OBJECTIVES[objective](seen) > 1e-2


class TestHidden:
    def test_a_bias_of_the_projection_has_no_say(self):
        seen = make_seen()
        with torch.no_grad():
            expected = hidden_loss(seen)
            seen.layer.o_proj.bias = torch.nn.Parameter(torch.randn(seen.layer.o_proj.out_features))
            assert hidden_loss(seen) == expected

    def test_lora_on_the_projection_counts_while_it_is_active(self):
        from peft import LoraConfig, get_peft_model

        seen = make_seen()
        base = seen.layer.o_proj
        with torch.no_grad():
            bare = hidden_loss(seen)
        holder = get_peft_model(
            torch.nn.ModuleDict({"o_proj": base}), LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
        )
        seen.layer.o_proj = wrapped = holder.base_model.model["o_proj"]
        inputs = torch.eye(base.in_features)
        with torch.no_grad():
            active = hidden_loss(seen)
            seen.layer.o_proj = torch.nn.Linear(base.in_features, base.out_features, bias=False)
            seen.layer.o_proj.weight.copy_(wrapped(inputs).T)
            assert_near(active, hidden_loss(seen))
            assert (active - bare).abs() > 1e-3 * bare
            seen.layer.o_proj = wrapped
            wrapped.enable_adapters(False)
            assert hidden_loss(seen) == bare
            wrapped.enable_adapters(True)
            wrapped.merge()
            assert_near(hidden_loss(seen), active)

    def test_errors_that_the_projection_drops_cost_nothing(self):
        seen = make_seen()
        with torch.no_grad():
            kept = torch.zeros(HEADS, SIZE)
            kept[1] = 1.0
            seen.layer.o_proj.weight.mul_(kept.flatten())  # one head's outputs go on, the others' do not
            before = hidden_loss(seen)
            assert before > 0
            seen.layer.mixer.query_weight[0] *= -3
            assert hidden_loss(seen) == before
            seen.layer.mixer.query_weight[1] *= -3
            assert hidden_loss(seen) != before


class TestWeights:
    @pytest.mark.parametrize("mix", MIXES)
    def test_training_brings_the_students_output_nearer(self, mix):
        seen = make_seen(mix, (96, 4, 2), batch=4)
        set_mix(seen.layer, *calibrated_mix(seen))
        target = FarTarget(seen)
        optimizer = torch.optim.Adam(trained(seen).values(), lr=2e-2)
        losses = []
        with torch.no_grad():
            before = output_loss(seen, target)
        for _ in range(60):
            optimizer.zero_grad()
            loss = weights_loss(seen, target)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        with torch.no_grad():
            after = output_loss(seen, target)
        assert losses[-1] < 0.8 * losses[0]
        assert min(losses) > 0
        assert after < 0.8 * before

    def test_a_uniform_teacher_is_matched_exactly(self):
        seen = make_seen("normalizer", (64, 4, 2))
        zeros = Observation(seen.layer, torch.zeros_like(seen.q), torch.zeros_like(seen.k), seen.v, None)
        assert weights_loss(zeros) > 1e-3
        set_mix(seen.layer, *calibrated_mix(zeros))
        with torch.no_grad():
            assert weights_loss(zeros).abs() < 1e-6

    def test_values_have_no_say(self):
        seen = make_seen()
        other = Observation(seen.layer, seen.q, seen.k, torch.randn_like(seen.v), None)
        with torch.no_grad():
            assert weights_loss(seen) == weights_loss(other)
            assert decomposed_loss(seen) != decomposed_loss(other)

    def test_a_mixer_with_weights_of_another_kind_is_refused(self):
        class Decaying(type(make_seen().layer.mixer)):
            def scan(self, state, phi_k, v):
                return super().scan(state, 0.5 * phi_k, v)

        seen = make_seen()
        seen.layer.mixer.__class__ = Decaying
        with pytest.raises(LinearizeError) as error:
            weights_loss(seen)
        assert str(error.value) == (
            "transfer.objective: 'weights' needs weights phi_q.phi_k, and mixer 'hedgehog' has others; use "
            "'decomposed' or 'output'"
        )
        decomposed_loss(seen).backward()


def student_log_odds(row, mix):
    return row.mix + (row.log_mass - row.near_lse if mix == "normalizer" else 0)


def log_odds_errors(seen):
    """Teacher's far log-odds minus the student's, and the weights of calibration: each (H, N) of counted tokens."""
    mix = seen.layer.linearize_config.mix
    rows = truth(seen)
    wanted = torch.cat([(row.far_lse - row.near_lse)[:, row.counted] for row in rows], 1)
    got = torch.cat([student_log_odds(row, mix)[:, row.counted] for row in rows], 1).detach()
    rho = (-wanted).sigmoid()
    return wanted - got, rho * (1 - rho) + 1e-2


def set_mix(layer, weight, bias):
    layer.mix.weight.data.copy_(weight)
    layer.mix.bias.data.copy_(bias)


def observations(student, batch):
    """What each layer saw of a batch."""
    seen = []
    observe(student, batch, seen.append)
    return seen


class TestCalibration:
    @pytest.mark.parametrize("padding", ["full", "left"])
    @pytest.mark.parametrize("mix", MIXES)
    def test_no_head_is_off_on_average(self, mix, padding):
        student = make_student("llama", mix, window=4, sinks=2)
        tokens, mask = make_tokens(3, 64), None
        if padding == "left":
            tokens, mask = pad(tokens, [0, 11, 30], "left")
        batch = {"input_ids": tokens} | ({} if mask is None else {"attention_mask": mask})
        before = observations(student, batch)
        assert len(before) == 3
        for seen in before:
            error, weight = log_odds_errors(seen)
            assert ((error * weight).sum(-1) / weight.sum(-1)).abs().mean() > 0.1
        calibrate(student, batch)
        for seen in observations(student, batch):
            error, weight = log_odds_errors(seen)
            assert ((error * weight).sum(-1) / weight.sum(-1)).abs().max() < 1e-3

    @pytest.mark.parametrize("mix", MIXES)
    def test_beats_a_constant_a_head(self, mix):
        """Keys that drift, so that how far and near compare depends on the query."""
        seen = make_seen(mix, (128, 4, 2), factor=3.0)
        drift = torch.linspace(0, 3, 128)[:, None] * torch.randn(KV_HEADS, 1, SIZE)
        seen = Observation(seen.layer, seen.q, 0.3 * seen.k + drift, seen.v, None)
        nothing = torch.zeros(HEADS, SIZE)
        set_mix(seen.layer, nothing, torch.zeros(HEADS))
        error, weight = log_odds_errors(seen)
        constant = (error * weight).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True)
        spread = ((error - constant).square() * weight).sum(-1)
        loss_of_constant = self.loss_with(seen, nothing, constant[:, 0])
        loss = self.loss_with(seen, *calibrated_mix(seen))
        error, _ = log_odds_errors(seen)
        assert ((error.square() * weight).sum(-1) < 0.9 * spread).all()
        assert loss < 0.95 * loss_of_constant

    @staticmethod
    def loss_with(seen, weight, bias):
        set_mix(seen.layer, weight, bias)
        with torch.no_grad():
            return output_loss(seen)

    @pytest.mark.parametrize("padding", ["left", "right", "holes"])
    @pytest.mark.parametrize("mix", MIXES)
    def test_padded_batches(self, mix, padding):
        """The solution of weighted least squares over the counted tokens, by another solver."""
        seen = make_seen(mix, padding=padding)
        weight, bias = calibrated_mix(seen)
        assert (weight.shape, bias.shape) == ((HEADS, SIZE), (HEADS,))
        assert weight.dtype == bias.dtype == torch.float32
        set_mix(seen.layer, torch.zeros(HEADS, SIZE), torch.zeros(HEADS))
        wanted, importance = log_odds_errors(seen)
        (queries,) = gathered(truth(seen), "q")
        for h in range(HEADS):
            inputs = torch.cat([queries[h], torch.ones(len(queries[h]), 1)], 1)
            root = importance[h].sqrt()[:, None]
            ridge = torch.eye(SIZE, SIZE + 1, dtype=torch.float64)  # on the weight only
            solution = torch.linalg.lstsq(
                torch.cat([inputs * root, ridge]), torch.cat([wanted[h, :, None] * root, torch.zeros(SIZE, 1)])
            ).solution[:, 0]
            torch.testing.assert_close(weight[h], solution[:-1].float(), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(bias[h], solution[-1].float(), rtol=1e-3, atol=1e-4)

    def test_exact_where_the_log_odds_are_linear(self):
        """Keys that are all k0 have log Z_far = scale q.k0 + log of their number, and features that do not know q
        have log n = log of their number + log of a constant: what is wanted is linear in q."""
        seen = make_seen("normalizer", (256, 4, 2), batch=8, factor=6.0)
        key = torch.randn(KV_HEADS, SIZE)
        seen = Observation(seen.layer, seen.q, key[None, :, None].expand_as(seen.k), seen.v, None)
        torch.nn.init.zeros_(seen.layer.mixer.query_weight)
        weight, bias = calibrated_mix(seen)
        k0 = key.repeat_interleave(HEADS // KV_HEADS, 0)
        assert (weight - seen.layer.scaling * k0).abs().max() < 1e-3
        assert (bias - torch.tensor(SIZE / 2).log()).abs().max() < 1e-3
        set_mix(seen.layer, weight, bias)
        error, _ = log_odds_errors(seen)
        assert error.abs().max() < 0.02

    def test_a_uniform_teacher_is_matched_exactly(self):
        """q = k = 0: the far side is a mean, which the state holds, and its share follows from counting."""
        seen = make_seen("normalizer", (64, 4, 2))
        zeros = Observation(seen.layer, torch.zeros_like(seen.q), torch.zeros_like(seen.k), seen.v, None)
        set_mix(seen.layer, *calibrated_mix(zeros))
        with torch.no_grad():
            assert decomposed_loss(zeros) < 1e-6
            assert output_loss(zeros) < 1e-6

    @pytest.mark.parametrize("mix", MIXES)
    def test_nothing_to_learn_from_leaves_a_mix_of_zero(self, mix):
        weight, bias = calibrated_mix(make_seen(mix, (8, 4, 2)))
        assert not weight.any()
        assert not bias.any()

    def test_no_gradient(self):
        assert not any(x.requires_grad for x in calibrated_mix(make_seen()))


def test_losses_are_differentiable_through_the_share_at_its_ends():
    """A far side too loud by e^12 or too quiet by e^40 still gets a gradient back."""
    for bias, sign in ((12.0, 1), (-40.0, -1)):
        seen = make_seen("gate")
        set_mix(seen.layer, torch.zeros(HEADS, SIZE), torch.full((HEADS,), bias))
        decomposed_loss(seen).backward()
        assert (seen.layer.mix.bias.grad * sign > 1e-2).all()


def test_formulas_of_this_file_agree_with_torch():
    """The masks of `truth` make up causal attention."""
    seen = make_seen()
    expected = F.scaled_dot_product_attention(
        seen.q, *(x.repeat_interleave(2, 1) for x in (seen.k, seen.v)), is_causal=True, scale=seen.layer.scaling
    )
    assert_near(torch.stack([row.out for row in truth(seen)]).float(), expected)
