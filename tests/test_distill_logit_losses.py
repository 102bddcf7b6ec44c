"""Losses on logits: the formulas, and the pass that computes values and gradients at once."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from linearize.distill.logit_losses import ROWS_AT_ONCE, Listed, kl_divergence, list_likeliest, logit_losses

VOCAB = 50


class TestDivergence:
    def make(self, rows=40, factor=3.0):
        return factor * torch.randn(rows, VOCAB), factor * torch.randn(rows, VOCAB)

    @pytest.mark.parametrize("temperature", [1.0, 2.5, 0.5])
    def test_full(self, temperature):
        mine, wanted = self.make()
        p, q = (torch.softmax(x.double() / temperature, -1) for x in (wanted, mine))
        expected = temperature**2 * (p * (p.log() - q.log())).sum(-1)
        actual = kl_divergence(mine, wanted, None, temperature)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    @pytest.mark.parametrize("top_k", [1, 5, VOCAB - 1])
    def test_top_k_and_one_more_outcome(self, top_k, temperature):
        mine, wanted = self.make()
        p, q = (torch.softmax(x.double() / temperature, -1) for x in (wanted, mine))
        expected = []
        for row_p, row_q in zip(p, q):
            listed = row_p.argsort(descending=True)[:top_k]
            row_p, row_q = (torch.cat([x[listed], 1 - x[listed].sum()[None]]) for x in (row_p, row_q))
            expected.append(temperature**2 * (row_p * (row_p / row_q).log()).sum())
        actual = kl_divergence(mine, wanted, top_k, temperature)
        torch.testing.assert_close(actual, torch.stack(expected).float(), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("top_k", [VOCAB, VOCAB + 7])
    def test_top_k_of_the_whole_vocabulary_is_full(self, top_k):
        mine, wanted = self.make()
        assert torch.equal(kl_divergence(mine, wanted, top_k, 1.0), kl_divergence(mine, wanted, None, 1.0))

    def test_less_than_full_never_more(self):
        mine, wanted = self.make()
        values = [kl_divergence(mine, wanted, k, 1.0) for k in (1, 5, 20, 49, None)]
        for coarse, fine in pairwise(values):
            assert (coarse <= fine + 1e-5).all()
        assert (values[0] < values[-1] - 0.1).all()

    def test_mass_moved_within_the_tail_does_not_count(self):
        mine, wanted = self.make()
        tail = wanted.argsort(-1, descending=True)[:, 5:]
        moved = mine.scatter(-1, tail, mine.gather(-1, tail).flip(-1))
        assert not torch.equal(moved, mine)
        before, after = (kl_divergence(x, wanted, 5, 1.0) for x in (mine, moved))
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
        assert (kl_divergence(moved, wanted, None, 1.0) - kl_divergence(mine, wanted, None, 1.0)).abs().max() > 0.1

    def test_mass_moved_out_of_the_tail_counts_exactly(self):
        mine, wanted = self.make(factor=1.0)
        q, p = mine.double().softmax(-1), wanted.double().softmax(-1)
        first, *_, last = wanted.argsort(-1, descending=True).T
        amount = 0.5 * q.gather(-1, last[:, None])
        moved = q.scatter_add(-1, first[:, None], amount).scatter_add(-1, last[:, None], -amount)
        listed = p.topk(5).indices
        p_first, p_tail = p.gather(-1, first[:, None]), 1 - p.gather(-1, listed).sum(-1, keepdim=True)
        q_first, q_tail = q.gather(-1, first[:, None]), 1 - q.gather(-1, listed).sum(-1, keepdim=True)
        expected = -p_first * (1 + amount / q_first).log() - p_tail * (1 - amount / q_tail).log()
        change = kl_divergence(moved.log().float(), wanted, 5, 1.0) - kl_divergence(mine, wanted, 5, 1.0)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(change, expected[:, 0].float(), rtol=1e-3, atol=2e-6)

    @pytest.mark.parametrize("top_k", [None, 1, 5])
    def test_of_oneself_is_zero_with_no_gradient(self, top_k):
        mine, _ = self.make()
        mine.requires_grad_(True)
        value = kl_divergence(mine, mine.detach(), top_k, 1.0)
        value.sum().backward()
        assert value.abs().max() < 1e-6
        assert mine.grad.abs().max() < 1e-6

    @pytest.mark.parametrize("top_k", [None, 3])
    def test_certain_teachers_and_students_are_finite(self, top_k):
        certain = torch.full((1, VOCAB), -200.0)
        certain[:, 7] = 200.0
        mine, _ = self.make(rows=1)
        for student, teacher in ((mine, certain), (certain, mine), (certain, certain), (-certain, certain)):
            student = student.clone().requires_grad_(True)
            value = kl_divergence(student, teacher, top_k, 1.0)
            value.sum().backward()
            assert value.isfinite().all()
            assert student.grad.isfinite().all()
        # And a certain teacher's KL is the cross-entropy of its token.
        expected = F.cross_entropy(mine, torch.tensor([7]))
        torch.testing.assert_close(kl_divergence(mine, certain, top_k, 1.0)[0], expected, rtol=1e-4, atol=1e-4)


class TestOnePass:
    """`logit_losses` against the formulas and autograd."""

    ROWS = 2 * ROWS_AT_ONCE + 44

    def make(self, dtype=torch.float32):
        mine = (3 * torch.randn(self.ROWS, VOCAB)).to(dtype).requires_grad_(True)
        return mine, 3 * torch.randn(self.ROWS, VOCAB), torch.randint(VOCAB, (self.ROWS,))

    def expected(self, mine, wanted, tokens, compared, scored, kl_weight, ce_weight, temperature, top_k):
        kl = kl_divergence(mine[compared], wanted[compared], top_k, temperature).mean()
        ce = F.cross_entropy(mine[scored].float(), tokens[scored])
        return kl_weight * kl + ce_weight * ce, kl, ce

    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    @pytest.mark.parametrize("top_k", [None, 1, 7])
    @pytest.mark.parametrize("weights", [(1.0, 0.0), (0.7, 0.4), (0.0, 1.0)])
    def test_values_and_gradients(self, weights, top_k, temperature):
        mine, wanted, tokens = self.make()
        compared, scored = torch.rand(2, self.ROWS) < 0.6
        total, kl, ce = self.expected(mine, wanted, tokens, compared, scored, *weights, temperature, top_k)
        (slope,) = torch.autograd.grad(5 * total, mine)
        told = wanted if top_k is None else list_likeliest(wanted, top_k, temperature)
        loss, terms = logit_losses(
            mine,
            teacher=told,
            compared=compared,
            tokens=tokens,
            scored=scored,
            kl_weight=weights[0],
            ce_weight=weights[1],
            temperature=temperature,
        )
        (got,) = torch.autograd.grad(5 * loss, mine)
        torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.stack([terms["kl"], terms["ce"]]), torch.stack([kl, ce]))
        torch.testing.assert_close(got, slope, rtol=1e-4, atol=1e-7)
        assert not terms["kl"].requires_grad
        assert not got[~(compared | scored)].any()

    def test_all_rows_count_where_none_is_named(self):
        mine, wanted, tokens = self.make()
        every = torch.ones(self.ROWS, dtype=torch.bool)
        named = logit_losses(mine, teacher=wanted, compared=every, tokens=tokens, scored=every, ce_weight=1.0)
        loss, terms = logit_losses(mine, teacher=wanted, tokens=tokens, ce_weight=1.0)
        assert loss == named[0]
        assert terms == named[1]

    def test_no_row_counts(self):
        mine, wanted, _ = self.make()
        loss, _ = logit_losses(mine, teacher=wanted, compared=torch.zeros(self.ROWS, dtype=torch.bool))
        loss.backward()
        assert loss == 0
        assert not mine.grad.any()

    @pytest.mark.parametrize("top_k", [None, 5])
    def test_half_precision_keeps_its_dtype(self, top_k):
        mine, wanted, _ = self.make(torch.bfloat16)
        told = wanted if top_k is None else list_likeliest(wanted, top_k, 1.0)
        loss, _ = logit_losses(mine, teacher=told)
        loss.backward()
        assert loss.dtype == torch.float32
        assert mine.grad.dtype == torch.bfloat16
        wide = mine.detach().float().requires_grad_(True)
        kl_divergence(wide, wanted, top_k, 1.0).mean().backward()
        torch.testing.assert_close(mine.grad.float(), wide.grad, rtol=1e-2, atol=1e-6)

    @pytest.mark.parametrize("capped", [False, True])
    def test_the_gradient_takes_the_logits_place(self, capped):
        """Also behind a head, and behind a soft cap, whose backward pass reads what it gave before the last product."""
        mine, wanted, tokens = self.make()
        head = torch.randn(VOCAB, VOCAB, requires_grad=True)
        compared, scored = torch.rand(2, self.ROWS) < 0.6
        found = {}
        for overwrite in (False, True):
            logits = mine.view(2, -1, VOCAB) @ head
            logits = 3 * torch.tanh(logits / 3) if capped else logits
            place, before = logits.data_ptr(), logits.detach().clone()
            loss, terms = logit_losses(
                logits.flatten(0, 1),
                teacher=wanted,
                compared=compared,
                tokens=tokens,
                scored=scored,
                ce_weight=0.5,
                overwrite=overwrite,
            )
            assert logits.data_ptr() == place
            assert torch.equal(logits, before) != overwrite
            found[overwrite] = [loss, terms["kl"], terms["ce"], *torch.autograd.grad(3 * loss, [mine, head])]
        for plain, overwritten in zip(found[False], found[True], strict=True):
            assert torch.equal(plain, overwritten)

    def test_a_second_backward_pass_is_refused(self):
        mine, wanted, _ = self.make()
        loss, _ = logit_losses(mine, teacher=wanted)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="logit_losses: the gradient has been used; compute the loss again"):
            loss.backward()

    def test_without_gradient_nothing_is_overwritten(self):
        mine, wanted, _ = self.make()
        before = mine.detach().clone()
        with torch.no_grad():
            logit_losses(mine, teacher=wanted, overwrite=True)
        assert torch.equal(mine, before)

    def test_nothing_is_kept_without_gradient(self):
        mine, wanted, _ = self.make()
        with torch.no_grad():
            loss, _ = logit_losses(mine, teacher=wanted)
        assert not loss.requires_grad
        assert loss == logit_losses(mine, teacher=wanted)[0]

    def test_certain_students_of_a_list(self):
        """Where the student has no mass left for the rest, value and gradient stay finite and point the right way."""
        certain = torch.full((1, VOCAB), -50.0)
        certain[:, 7] = 50.0
        certain.requires_grad_(True)
        loss, _ = logit_losses(certain, teacher=Listed(torch.tensor([[-0.7]]), torch.tensor([[7]])))
        loss.backward()
        assert loss.isfinite()
        assert certain.grad.isfinite().all()
        assert certain.grad[0, 7] > 0

    def test_the_list_is_of_the_likeliest(self):
        _, wanted, _ = self.make()
        listed = list_likeliest(wanted, 7, 2.0)
        assert listed.log_p.shape == listed.index.shape == (self.ROWS, 7)
        p = (wanted / 2).softmax(-1)
        torch.testing.assert_close(listed.log_p.exp().sum(-1), p.topk(7).values.sum(-1))
        torch.testing.assert_close(listed.log_p.exp(), p.gather(-1, listed.index))
