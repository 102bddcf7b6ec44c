"""Calibration: the mix in closed form, and feature maps by a few steps, before any training."""

import copy
import re

import pytest
import torch

from linearize import LinearizeConfig, LinearizeError, convert, original_attention
from linearize.attention import Mix, Observation
from linearize.convert import added_parameters, converted_layers
from linearize.distill.calibration import LR, UPDATES, Calibration, MixFit
from linearize.distill.objectives import FarTarget, decomposed_loss, output_loss
from linearize.distill.transfer import calibrate, observe
from tests.far_truth import (
    HEADS,
    KV_HEADS,
    MIXES,
    SIZE,
    fit_mix,
    gathered,
    make_seen,
    set_mix,
    student_log_odds,
    truth,
)
from tests.tiny_models import make_model, make_student, make_tokens, pad
from tests.tiny_training import TokenRows


def log_odds_errors(seen):
    """Teacher's far log-odds minus the student's, and the weights of calibration: each (H, N) of counted tokens."""
    mix = seen.layer.linearize_config.mix
    rows = truth(seen)
    wanted = torch.cat([(row.far_lse - row.near_lse)[:, row.counted] for row in rows], 1)
    got = torch.cat([student_log_odds(row, mix)[:, row.counted] for row in rows], 1).detach()
    rho = (-wanted).sigmoid()
    return wanted - got, rho * (1 - rho) + 1e-2


def solution(*batches):
    """The mix in closed form, (H, D) and (H,), and the layer's own left as it is."""
    layer = batches[0].layer
    own, layer.mix = layer.mix, copy.deepcopy(layer.mix)
    fit_mix(*batches)
    fitted, layer.mix = layer.mix, own
    return fitted.weight.detach(), fitted.bias.detach()


class TestMixFit:
    @pytest.mark.parametrize("padding", ["full", "left"])
    @pytest.mark.parametrize("mix", [*MIXES, "peak"])
    def test_no_head_is_off_on_average(self, mix, padding):
        student = make_student("llama", mix, window=4, sinks=2)
        tokens, mask = make_tokens(3, 64), None
        if padding == "left":
            tokens, mask = pad(tokens, [0, 11, 30], "left")
        batch = {"input_ids": tokens} | ({} if mask is None else {"attention_mask": mask})
        before = []
        observe(student, batch, before.append)
        assert len(before) == 3
        for seen in before:
            error, weight = log_odds_errors(seen)
            assert ((error * weight).sum(-1) / weight.sum(-1)).abs().mean() > 0.1
        for seen in before:
            fit_mix(seen)
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
        loss = self.loss_with(seen, *solution(seen))
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
        weight, bias = solution(seen)
        assert (weight.shape, bias.shape) == ((HEADS, SIZE), (HEADS,))
        assert weight.dtype == bias.dtype == torch.float32
        set_mix(seen.layer, torch.zeros(HEADS, SIZE), torch.zeros(HEADS))
        wanted, importance = log_odds_errors(seen)
        (queries,) = gathered(truth(seen), "q")
        for h in range(HEADS):
            inputs = torch.cat([queries[h], torch.ones(len(queries[h]), 1)], 1)
            root = importance[h].sqrt()[:, None]
            ridge = torch.eye(SIZE, SIZE + 1, dtype=torch.float64)  # on the weight only
            expected = torch.linalg.lstsq(
                torch.cat([inputs * root, ridge]), torch.cat([wanted[h, :, None] * root, torch.zeros(SIZE, 1)])
            ).solution[:, 0]
            torch.testing.assert_close(weight[h], expected[:-1].float(), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(bias[h], expected[-1].float(), rtol=1e-3, atol=1e-4)

    def test_exact_where_the_log_odds_are_linear(self):
        """Keys that are all k0 have log Z_far = scale q.k0 + log of their number, and features that do not know q
        have log n = log of their number + log of a constant: what is wanted is linear in q."""
        seen = make_seen("normalizer", (256, 4, 2), batch=8, factor=6.0)
        key = torch.randn(KV_HEADS, SIZE)
        seen = Observation(seen.layer, seen.q, key[None, :, None].expand_as(seen.k), seen.v, None)
        torch.nn.init.zeros_(seen.layer.mixer.query_weight)
        weight, bias = solution(seen)
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
        set_mix(seen.layer, *solution(zeros))
        with torch.no_grad():
            assert decomposed_loss(zeros) < 1e-6
            assert output_loss(zeros) < 1e-6

    @pytest.mark.parametrize("mix", MIXES)
    def test_nothing_to_learn_from_leaves_a_mix_of_zero(self, mix):
        weight, bias = solution(make_seen(mix, (8, 4, 2)))
        assert not weight.any()
        assert not bias.any()

    def test_several_batches_are_one_large_one(self):
        seen = make_seen("normalizer", (64, 4, 2), batch=4)
        parts = [
            Observation(seen.layer, *(x[rows] for x in (seen.q, seen.k, seen.v)), None) for rows in ([0, 1], [2, 3])
        ]
        for one, other in zip(solution(seen), solution(*parts)):
            torch.testing.assert_close(one, other)
        assert (solution(seen)[1] - solution(parts[0])[1]).abs().max() > 1e-3

    def test_a_mix_without_a_weight_is_the_mean_error_of_a_head(self):
        seen = make_seen("normalizer")
        set_mix(seen.layer, torch.zeros(HEADS, SIZE), torch.zeros(HEADS))
        error, weight = log_odds_errors(seen)
        expected = (error * weight).sum(-1) / weight.sum(-1)
        seen.layer.mix = Mix(HEADS, SIZE, of_query=False)
        fit_mix(seen)
        torch.testing.assert_close(seen.layer.mix.bias.detach(), expected.float())


def decomposed(student, batch):
    """Mean decomposed loss of all layers."""
    losses = []
    observe(student, batch, lambda seen: losses.append(float(decomposed_loss(seen))))
    return sum(losses) / len(losses)


def untrained(**options):
    """A student as conversion leaves it."""
    return convert(make_model("llama"), LinearizeConfig(**({"window": 8, "sinks": 2} | options)))


def divergence(logits, teacher):
    """Mean KL(teacher || student) of the next token."""
    p, q = teacher.log_softmax(-1), logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


class TestCalibrate:
    @pytest.mark.parametrize("mix", MIXES)
    def test_far_side_on_other_text(self, mix):
        """Better than as converted, and than with the mix in closed form alone."""
        other = TokenRows(2, 128).at(100)
        student, mixed = untrained(mix=mix), untrained(mix=mix)
        before = decomposed(student, other)
        observe(mixed, TokenRows(2, 128).at(0), fit_mix)
        calibrate(student, TokenRows(2, 128), 1000)
        assert decomposed(student, other) < 0.9 * decomposed(mixed, other)
        assert decomposed(mixed, other) < 0.9 * before

    def test_predictions_are_nearer_to_the_teachers(self):
        student, tokens = untrained(), make_tokens(2, 128)
        with torch.no_grad():
            with original_attention(student):
                teacher = student(tokens).logits
            before = student(tokens).logits
            calibrate(student, TokenRows(2, 128), 1000)
            after = student(tokens).logits
        assert divergence(after, teacher) < 0.7 * divergence(before, teacher)

    @pytest.mark.parametrize("mix_input", ["query", "head", "fixed"])
    def test_changes_all_mixers_and_mixes_and_nothing_else(self, mix_input):
        student = untrained(mix_input=mix_input, softmax_layers=[1])
        added = added_parameters(student)
        before = {name: x.clone() for name, x in student.state_dict().items()}
        losses = calibrate(student, TokenRows(2, 40), 200)
        assert list(losses) == [0, 2]
        same = {name for name, x in student.state_dict().items() if torch.equal(x, before[name])}
        assert same == before.keys() - added.keys()
        assert all(p.isfinite().all() for p in added.values())
        assert all(p.grad is None for p in student.parameters())

    def test_whole_batches_until_there_are_enough_real_tokens(self):
        for tokens, padded, drawn in ((1, None, 1), (80, None, 1), (81, None, 2), (81, [0, 20], 2), (121, [0, 20], 3)):
            rows = TokenRows(2, 40, padded)
            losses = calibrate(make_student("llama", "normalizer"), rows, tokens)
            assert rows.drawn == drawn
            assert [len(x) for x in losses.values()] == [drawn] * 3

    @pytest.mark.parametrize("batches", [1, 3, 40])
    def test_about_as_many_updates_however_many_batches(self, batches, monkeypatch):
        rates = []

        def step(self):
            rates.append(self.param_groups[0]["lr"])

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        seen = make_seen()
        calibration = Calibration(batches)
        for _ in range(batches):
            calibration(seen)
        assert len(rates) == batches * max(1, round(UPDATES / batches))
        assert rates[0] == pytest.approx(LR)
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] < 0.2 * LR

    def test_the_first_loss_is_that_of_the_mix_alone(self):
        seen = make_seen()
        calibration = Calibration(1)
        twin = copy.deepcopy(seen.layer)
        calibration(seen)
        other = Observation(twin, seen.q, seen.k, seen.v, None)
        fit_mix(other)
        with torch.no_grad():
            assert calibration.losses == {1: [float(decomposed_loss(other))]}

    def test_the_mix_afterwards_is_that_of_all_batches(self):
        """With the feature map held, the closed form of both."""
        first, second = make_seen(), make_seen()
        second = Observation(first.layer, second.q, second.k, second.v, None)
        calibration = Calibration(2)
        calibration(first)
        held = {name: p.detach().clone() for name, p in first.layer.mixer.named_parameters()}
        calibration(second)
        calibration.finish()
        ours = [p.detach().clone() for p in (first.layer.mix.weight, first.layer.mix.bias)]
        last = {name: p.detach().clone() for name, p in first.layer.mixer.named_parameters()}
        assert any(not torch.equal(held[name], last[name]) for name in held)
        # Each batch's sums are under the feature map after the steps on that batch.
        fit = MixFit()
        for seen, features in ((first, held), (second, last)):
            first.layer.mixer.load_state_dict(features)
            fit.add(seen, FarTarget(seen))
        fit.set(first.layer.mix)
        assert torch.equal(first.layer.mix.weight, ours[0])
        assert torch.equal(first.layer.mix.bias, ours[1])

    def test_each_layer_alone_and_each_time_alike(self):
        def fitted(spoil=()):
            student = make_student("llama", "normalizer")
            with torch.no_grad():
                for index in spoil:
                    converted_layers(student)[index].mixer.query_weight.mul_(-3)
            calibrate(student, TokenRows(2, 40), 200)
            return {name: p.detach() for name, p in added_parameters(student).items()}

        one, again, spoilt = fitted(), fitted(), fitted([0, 2])
        assert all(torch.equal(one[name], again[name]) for name in one)
        same = {name for name in one if torch.equal(one[name], spoilt[name])}
        assert same == {name for name in one if ".layers.1." in name}

    @pytest.mark.parametrize(
        ("student", "rows", "message"),
        [
            (lambda: make_model("llama"), TokenRows(1, 40), "LlamaForCausalLM is not converted"),
            (lambda: make_student("llama", "none"), TokenRows(1, 40), "calibrate: mixer 'none' has no far side"),
            (lambda: make_student("llama", "gate"), TokenRows(1, 8), "data.seq_len: in rows of 8 tokens nothing has"),
        ],
    )
    def test_nothing_to_fit(self, student, rows, message):
        with pytest.raises(LinearizeError, match=re.escape(message)):
            calibrate(student(), rows, 100)
        assert not rows.drawn
