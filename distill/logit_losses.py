"""Losses on next-token logits, with their gradient in the same pass.

Autograd would keep float32 copies of (tokens, vocabulary) tensors alive, or compute them twice. Here a few rows at a
time are compared with the teacher and turned into d loss / d logits at once, so what remains is one tensor of the size
and dtype of the logits, on request in their own place. With q the student's probabilities at temperature tau, p the
teacher's:

    KL(p || q) tau^2                       d/dz_j = tau (q_j - p_j)
    over the k listed tokens and the rest  d/dz_j = tau (q_j - p_j)               j listed
                                                    tau q_j (1 - p_rest / q_rest) j in the rest
    cross-entropy of token y               d/dz_j = q_j - [j = y]
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Listed", "kl_divergence", "list_likeliest", "logit_losses", "rows_of"]

ROWS_AT_ONCE = 128  # rows whose logits are in float32 at a time
LEAST_REST = 1e-7  # of probability, outside the listed tokens: keeps its logarithm finite


@dataclass(frozen=True)
class Listed:
    """A teacher's k likeliest next tokens a row: log_p (N, k) float32 and index (N, k) integers; the rest of the
    probability, 1 - sum p, counts as one more outcome."""

    log_p: Tensor
    index: Tensor


def logit_losses(
    logits: Tensor,
    *,
    teacher: Tensor | Listed | None = None,
    compared: Tensor | None = None,
    tokens: Tensor | None = None,
    scored: Tensor | None = None,
    kl_weight: float | Tensor = 1.0,
    ce_weight: float | Tensor = 0.0,
    temperature: float = 1.0,
    overwrite: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """kl_weight * `kl` + ce_weight * `ce`, and both terms detached.

    kl: mean KL(teacher || student) of the compared rows, at temperature tau, times tau^2 (Hinton et al. 2015, arXiv
    1503.02531). ce: mean cross-entropy of the scored rows. A term without rows is 0.

    Args:
        logits: (N, vocabulary), any float dtype; differentiable.
        teacher: the teacher's logits (N, vocabulary), or `Listed` of the same temperature; None leaves the KL out.
        compared: (N,) bool, rows whose KL counts; None is all.
        tokens: (N,) the next tokens; None leaves the cross-entropy out.
        scored: (N,) bool, rows whose token counts; None is all.
        kl_weight, ce_weight, temperature: as above.
        overwrite: where logits ask for a gradient, it takes their place in memory: nobody may read them afterwards.

    The gradient is there once: a second backward pass raises a RuntimeError.

    Returns:
        The loss, a float32 scalar, and `{"kl": ..., "ce": ...}` with the terms that there are.
    """
    every = torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
    nothing = torch.zeros_like(every)
    compared = nothing if teacher is None else every if compared is None else compared
    scored = nothing if tokens is None else every if scored is None else scored
    weights = kl_weight, ce_weight, temperature
    # Asked for here: inside of a Function gradients are off, and its inputs ask for one all the same.
    place = None
    if torch.is_grad_enabled() and logits.requires_grad:
        # Detached, so that autograd does not take it for a change of what earlier operations gave. They need their
        # inputs, and their outputs only where these are bounded, as before a soft cap's last product.
        place = logits.detach() if overwrite else torch.zeros_like(logits)
    total, kl, ce = _LogitLosses.apply(logits, place, teacher, compared, tokens, scored, weights)
    terms = {"kl": kl} if teacher is not None else {}
    return total, terms | ({"ce": ce} if tokens is not None else {})


@torch.no_grad()
def list_likeliest(logits: Tensor, top_k: int, temperature: float) -> Listed:
    """The teacher's `top_k` likeliest tokens at a temperature. logits: (N, vocabulary), top_k <= vocabulary."""
    parts = [
        (part.float() / temperature).log_softmax(-1).topk(top_k, dim=-1, sorted=False)
        for part in logits.split(ROWS_AT_ONCE)
    ]
    return Listed(*(torch.cat([getattr(part, name) for part in parts]) for name in ("values", "indices")))


def kl_divergence(logits: Tensor, teacher_logits: Tensor, top_k: int | None, temperature: float) -> Tensor:
    """KL(teacher || student) a row, times temperature^2: the formula, differentiable by autograd.

    With `top_k` the distributions are compared over the teacher's k likeliest tokens and one more outcome, "any
    other token", so the tail's mass counts exactly and only its shape is ignored.

    logits, teacher_logits: (N, vocabulary) -> (N,), float32.
    """
    log_q = (logits.float() / temperature).log_softmax(-1)
    log_p = (teacher_logits.float() / temperature).log_softmax(-1)
    if top_k is not None and top_k < log_p.shape[-1]:
        log_p, index = log_p.topk(top_k, dim=-1)
        log_q = log_q.gather(-1, index)
        log_p, log_q = (torch.cat([x, _log_rest(x)], dim=-1) for x in (log_p, log_q))
    return (log_p.exp() * (log_p - log_q)).sum(-1) * temperature**2


def rows_of(teacher: Tensor | Listed | None, rows: Tensor) -> Any:
    """Some rows of a teacher's side, by their indices."""
    if isinstance(teacher, Listed):
        return Listed(teacher.log_p[rows], teacher.index[rows])
    return None if teacher is None else teacher[rows]


class _LogitLosses(torch.autograd.Function):
    """(loss, kl, ce); the first has the gradient, computed on the way forward into a place that is given."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        gradient: Tensor | None,
        teacher: Tensor | Listed | None,
        compared: Tensor,
        tokens: Tensor | None,
        scored: Tensor,
        weights: tuple[float | Tensor, float | Tensor, float],
    ) -> tuple[Tensor, Tensor, Tensor]:
        kl_weight, ce_weight, temperature = weights
        kl_share = compared.float() / compared.sum().clamp_min(1)
        ce_share = scored.float() / scored.sum().clamp_min(1)
        kl, ce = (torch.zeros((), dtype=torch.float32, device=logits.device) for _ in range(2))
        for rows in (compared | scored).nonzero().squeeze(-1).split(ROWS_AT_ONCE):
            z = logits[rows].float()
            slope = torch.zeros_like(z)
            if teacher is not None:
                value, change = _divergence(z, rows_of(teacher, rows), temperature)
                kl += (value * kl_share[rows]).sum()
                slope = change.mul_((kl_weight * kl_share[rows])[:, None])
            if tokens is not None:
                share, wanted = ce_share[rows], tokens[rows, None]
                log_q = z.log_softmax(-1)
                ce -= (log_q.gather(-1, wanted).squeeze(-1) * share).sum()
                share = (ce_weight * share)[:, None]
                slope.add_(log_q.exp_().mul_(share)).scatter_add_(-1, wanted, -share)
            if gradient is not None:
                gradient[rows] = slope.to(gradient.dtype)
        if gradient is not None:
            gradient[~(compared | scored)] = 0
        ctx.gradient = gradient
        ctx.mark_non_differentiable(kl, ce)
        return kl_weight * kl + ce_weight * ce, kl, ce

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("logit_losses: the gradient has been used; compute the loss again")
        return gradient.mul_(upstream[0].to(gradient.dtype)), None, None, None, None, None, None


def _divergence(z: Tensor, teacher: Tensor | Listed, temperature: float) -> tuple[Tensor, Tensor]:
    """KL times temperature^2 of rows z (R, vocabulary) in float32, and its gradient with respect to z."""
    log_q = (z / temperature).log_softmax(-1)
    if isinstance(teacher, Listed):
        index = teacher.index.long()
        log_p, log_q_listed = (torch.cat([x, _log_rest(x)], -1) for x in (teacher.log_p, log_q.gather(-1, index)))
        value = (log_p.exp() * (log_p - log_q_listed)).sum(-1)
        excess = 1 - (log_p[:, -1:] - log_q_listed[:, -1:]).exp()
        slope = log_q.exp_()
        listed = slope.gather(-1, index) - teacher.log_p.exp()
        slope.mul_(excess).scatter_(-1, index, listed)
    else:
        log_p = (teacher.float() / temperature).log_softmax(-1)
        p = log_p.exp()
        value = (p * (log_p - log_q)).sum(-1)
        slope = log_q.exp_().sub_(p)
    return value * temperature**2, slope.mul_(temperature)


def _log_rest(log_p: Tensor) -> Tensor:
    """log (1 - sum p), (N, 1), kept finite where the listed tokens have all the mass."""
    listed = log_p.logsumexp(-1, keepdim=True).clamp_max(-LEAST_REST)
    return torch.log(-torch.expm1(listed))
