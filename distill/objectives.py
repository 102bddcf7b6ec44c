"""What a converted layer is taught, from one forward pass of the original.

With rho = Z_near / (Z_near + Z_far), softmax attention factorises exactly over the near and far keys:

    o = rho o_near + (1 - rho) o_far

so the far side has a target of its own, (1 - rho) o_far = o - rho o_near, that the exact window cannot absorb.
rho = exp(log Z_near - log Z) needs only log-sum-exps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.attention import Observation
from linearize.config import LinearizeConfig
from linearize.kernels.near_far.chunked import far_chunked, far_log_odds, mix_near_far, near_chunked, pad_to_chunks
from linearize.kernels.near_far.pack import pack_rows
from linearize.kernels.near_far.softmax import softmax_attention

__all__ = ["OBJECTIVES", "FarTarget", "calibrated_mix", "decomposed_loss", "first_far_query", "output_loss"]

NO_SHARE = -100.0  # log-odds that stand for a far mass of zero in a logarithm


class FarTarget:
    """The teacher's side of one layer, packed (real tokens first) and padded to whole chunks; no gradient.

    q: (B, H, T', D), k, v: (B, K, T', .), out: (B, H, T', V) softmax attention, near: the same over the near keys
    only, near_lse: (B, H, T') log Z_near, far_log_odds: (B, H, T') log (Z_far / Z_near), counted: (B, 1, T') the
    tokens that have far keys and are real.
    """

    @torch.no_grad()
    def __init__(self, seen: Observation):
        config = seen.layer.linearize_config
        window, sinks, scale = config.window, config.sinks, seen.layer.scaling
        q, k, v = (x.detach() for x in pack_rows(seen.mask, seen.q, seen.k, seen.v))
        batch, _, length, _ = q.shape
        out, lse = softmax_attention(q, k, v, scale=scale)
        sink_k, sink_v = k[:, :, :sinks], v[:, :, :sinks]
        self.q, self.k, self.v, self.out = (pad_to_chunks(x, window) for x in (q, k, v, out))
        self.near, self.near_lse = near_chunked(self.q, self.k, self.v, sink_k, sink_v, window=window, scale=scale)
        lse = pad_to_chunks(lse[..., None], window).squeeze(-1)
        # log (Z - Z_near): by log1p of the ratio, and bounded where rounding makes Z_near exceed Z.
        near_share = (self.near_lse - lse).clamp_max(-1e-6)
        self.near_log_share = near_share
        self.far_log_odds = torch.log1p(-near_share.exp()) - near_share
        position = torch.arange(self.q.shape[2], device=q.device)
        lengths = torch.full((batch,), length, device=q.device) if seen.mask is None else seen.mask.sum(-1)
        self.counted = ((position >= first_far_query(config)) & (position < lengths[:, None]))[:, None]

    def mix_logit(self, seen: Observation) -> Tensor:
        """The student's mix for these queries, (B, H, T')."""
        assert seen.layer.mix is not None, "a layer without a state has nothing to learn: run_transfer refuses it"
        return seen.layer.mix(self.q)


def first_far_query(config: LinearizeConfig) -> int:
    """Position of the first query that has a far key: a key that is no sink, in the chunk before the chunk before."""
    return (config.sinks // config.window + 2) * config.window


def decomposed_loss(seen: Observation, target: FarTarget | None = None) -> Tensor:
    """Far error under the teacher's own mix, plus the mix's own error.

    mean |(1 - rho) (o_state - o_far)|^2 / mean |(1 - rho) o_far|^2  +  KL(far share of teacher || of student)

    The first term can be lowered by the state alone; the second by the mix (and by log n under "normalizer").
    `target` is the teacher's side where it is known already; None computes it.
    """
    target = target or FarTarget(seen)
    far, log_mass = _student_far(seen, target)
    config = seen.layer.linearize_config
    counted = target.counted
    teacher_near = target.near_log_share.exp()
    wanted = target.out - teacher_near[..., None] * target.near
    error = (1 - teacher_near)[..., None] * far - wanted
    far_term = _mean(error.square().sum(-1), counted) / _mean(wanted.square().sum(-1), counted).clamp_min(1e-12)

    # From log-odds: a share that has rounded to 0 or 1 would have no gradient left.
    student = far_log_odds(target.near_lse, log_mass, target.mix_logit(seen), config.mix)
    student = student.masked_fill(student == -torch.inf, NO_SHARE)
    teacher_share = 1 - teacher_near
    mix_term = F.binary_cross_entropy_with_logits(student, teacher_share, reduction="none") - F.binary_cross_entropy(
        teacher_share, teacher_share, reduction="none"
    )
    return far_term + _mean(mix_term, counted)


def output_loss(seen: Observation, target: FarTarget | None = None) -> Tensor:
    """mean |o_student - o|^2 / mean |o|^2 of the attention outputs, before the output projection. `target` as above."""
    target = target or FarTarget(seen)
    far, log_mass = _student_far(seen, target)
    out = mix_near_far(
        target.near, target.near_lse, far, log_mass, target.mix_logit(seen), seen.layer.linearize_config.mix
    )
    error = (out - target.out).square().sum(-1)
    return _mean(error, target.counted) / _mean(target.out.square().sum(-1), target.counted).clamp_min(1e-12)


def calibrated_mix(seen: Observation) -> tuple[Tensor, Tensor]:
    """The mix, weight (H, D) and bias (H,), under which the student's far log-odds are the teacher's, in closed form.

    For each head, least squares over tokens of

        w.q + b  ~  log (Z_far / Z_near) of the teacher - (log n - log Z_near) of the student

    (under "gate": of the teacher's log-odds alone), each token weighed by rho (1 - rho), by which an error of its
    log-odds changes the output; a small ridge keeps w bounded where a head's queries do not span D dimensions.
    """
    with torch.no_grad():
        target = FarTarget(seen)
        wanted, counted = target.far_log_odds, target.counted.expand_as(target.far_log_odds)
        if seen.layer.linearize_config.mix == "normalizer":
            _, log_mass = _student_far(seen, target)
            counted = counted & (log_mass > -torch.inf)
            wanted = wanted + target.near_lse - log_mass.masked_fill(~counted, 0.0)
        rho = target.near_log_share.exp()
        weight = ((rho * (1 - rho) + 1e-2) * counted).double()
        inputs = torch.cat([target.q.double(), torch.ones_like(target.q[..., :1], dtype=torch.float64)], dim=-1)
        weighted = inputs * weight[..., None]
        gram = (inputs.transpose(-1, -2) @ weighted).sum(0)
        moment = (weighted.transpose(-1, -2) @ wanted.masked_fill(~counted, 0.0).double()[..., None]).sum(0)
        ridge = torch.ones(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        ridge[-1] = 1e-8  # the bias is free: no head starts too loud or too quiet on average
        solution = torch.linalg.solve(gram + ridge.diag(), moment).squeeze(-1).float()
        return solution[:, :-1], solution[:, -1]


OBJECTIVES = {"decomposed": decomposed_loss, "output": output_loss}


def _student_far(seen: Observation, target: FarTarget) -> tuple[Tensor, Tensor]:
    config, mixer = seen.layer.linearize_config, seen.layer.mixer
    assert mixer is not None, "a layer without a state has nothing to learn: run_transfer refuses it"
    far, log_mass, _ = far_chunked(target.q, target.k, target.v, mixer, window=config.window, sinks=config.sinks)
    return far, log_mass


def _mean(x: Tensor, counted: Tensor) -> Tensor:
    """Mean of x (B, H, T) over the counted (B, 1, T) tokens and all heads; 0 where none is counted."""
    return (x * counted).sum() / (counted.sum() * x.shape[1]).clamp_min(1)
