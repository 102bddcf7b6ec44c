"""What a layer is taught: the teacher's near, far and shares, and the losses, against explicit T x T maps."""

import pytest
import torch
import torch.nn.functional as F

from linearize.attention import Observation
from linearize.distill.objectives import (
    OBJECTIVES,
    FarTarget,
    decomposed_loss,
    hidden_loss,
    output_loss,
    weights_loss,
)
from linearize.errors import LinearizeError
from linearize.kernels.near_far import near_far_attention
from tests.cost import LargestTensor
from tests.far_truth import (
    HEADS,
    MIXES,
    PADDING,
    SHAPES,
    SIZE,
    fit_mix,
    gathered,
    make_seen,
    set_mix,
    student_log_odds,
    truth,
)
from tests.tolerance import assert_near


def true_terms(seen):
    """(far term, mix term, output loss, weights loss, hidden loss), with gradient to mixer and mix."""
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
        fit_mix(seen)
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
        fit_mix(seen)
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
        fit_mix(seen)
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
        fit_mix(zeros)
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
