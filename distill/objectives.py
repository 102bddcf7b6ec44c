"""What a converted layer is taught, from one forward pass of the original.

With rho = Z_near / (Z_near + Z_far), softmax attention factorises exactly over the near and far keys:

    o = rho o_near + (1 - rho) o_far

so the far side has a target of its own, o_far, that the exact window cannot absorb, and rho = sigmoid(log Z_near -
log Z_far) needs only log-sum-exps. Nothing here is ever T x T: see `linearize.kernels.near_far.transfer`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.attention import Observation
from linearize.config import LinearizeConfig
from linearize.errors import LinearizeError
from linearize.kernels.near_far.chunked import far_log_odds, mix_near_far, near_chunked, pad_to_chunks
from linearize.kernels.near_far.mixers import Mixer
from linearize.kernels.near_far.ops import far_read
from linearize.kernels.near_far.pack import pack_rows, unpack_rows
from linearize.kernels.near_far.transfer import far_divergence, split_attention

__all__ = [
    "OBJECTIVES",
    "FarTarget",
    "check_far_queries",
    "decomposed_loss",
    "first_far_query",
    "hidden_loss",
    "output_loss",
    "student_far",
    "weights_loss",
]

NO_SHARE = -100.0  # log-odds that stand for a far mass of zero in a logarithm


class FarTarget:
    """The teacher's side of one layer, no gradient: rows with their real tokens first, padded to whole chunks, or as
    they are where they hold several documents (`documents`; else None).

    q: (B, H, T', D), k, v: (B, K, T', .), out: (B, H, T', V) softmax attention, near and far: the same over the near
    or the far keys only, near_lse, far_lse: (B, H, T') log Z_near and log Z_far, far_log_odds: (B, H, T')
    log (Z_far / Z_near), far_share: 1 - rho, counted: (B, 1, T') the tokens that have far keys and are real, mix_lse:
    near_lse as the student's mix compares it with its far mass, under "peak" less the largest near logit.
    Where there is no far key, far and far_share are 0, and far_lse and far_log_odds are -inf.
    """

    @torch.no_grad()
    def __init__(self, seen: Observation):
        config = seen.layer.linearize_config
        window, sinks, softmax = config.window, config.sinks, seen.layer.softmax
        rows = pack_rows(seen.mask, *(x.detach() for x in (seen.q, seen.k, seen.v)))
        batch, _, length, _ = rows[0].shape
        self.documents = seen.documents
        self.q, self.k, self.v = rows if self.documents is not None else (pad_to_chunks(x, window) for x in rows)
        self.near, self.near_lse, self.far, self.far_lse = split_attention(
            self.q, self.k, self.v, window=window, sinks=sinks, **softmax, documents=self.documents
        )
        self.mix_lse = self.near_lse
        if config.mix == "peak":
            self.mix_lse = self._lse_from_peak(window, sinks, softmax)
        self.far_log_odds = self.far_lse - self.near_lse
        self.far_share = self.far_log_odds.sigmoid()
        self.out = torch.lerp(self.near, self.far, self.far_share[..., None])
        if self.documents is not None:
            self.counted = (self.documents.positions >= first_far_query(config))[:, None]
            return
        position = torch.arange(self.q.shape[2], device=self.q.device)
        lengths = torch.full((batch,), length, device=position.device) if seen.mask is None else seen.mask.sum(-1)
        self.counted = ((position >= first_far_query(config)) & (position < lengths[:, None]))[:, None]

    def _lse_from_peak(self, window: int, sinks: int, softmax: dict[str, Any]) -> Tensor:
        """log Z_near less the largest near logit, (B, H, T')."""

        def lse(rows: tuple[Tensor, ...]) -> Tensor:
            q, k, v = (pad_to_chunks(x, window) for x in rows)
            first = k[:, :, :sinks], v[:, :, :sinks]
            _, found = near_chunked(q, k, v, *first, window=window, **softmax, from_peak=True)
            return found[:, :, : rows[0].shape[2], None]

        rows = self.q, self.k, self.v
        if self.documents is None:
            return lse(rows).squeeze(-1)
        return self.documents.join([lse(part) for part in self.documents.split(*rows)]).squeeze(-1)

    def attention(self, seen: Observation) -> Tensor:
        """`out` of the tokens as they were seen, (B, H, T, V), 0 at padding."""
        return unpack_rows(seen.mask, self.out[:, :, : seen.q.shape[2]])

    def mix_logit(self, seen: Observation) -> Tensor:
        """The student's mix for these queries, (B, H, T'), or (H,) where they have no say."""
        logit = seen.layer.mix_logit(self.q)
        assert logit is not None, "a layer without a state has nothing to learn: run_transfer refuses it"
        return logit


def first_far_query(config: LinearizeConfig) -> int:
    """Position of the first query that has a far key: a key that is no sink, in the chunk before the chunk before."""
    return (config.sinks // config.window + 2) * config.window


def check_far_queries(config: LinearizeConfig, seq_len: int, setting: str) -> None:
    """Raise a LinearizeError, which names `setting`, where rows of so many tokens have no query with a far key."""
    needed = first_far_query(config)
    if seq_len <= needed:
        raise LinearizeError(
            f"{setting}: in rows of {seq_len} tokens nothing has left a window of {config.window} (two chunks) and "
            f"{config.sinks} sinks; use more than {needed}, better {needed + 14 * config.window}"
        )


def decomposed_loss(seen: Observation, target: FarTarget | None = None) -> Tensor:
    """Far error under the teacher's own mix, plus the mix's own error.

    mean |(1 - rho) (o_state - o_far)|^2 / mean |(1 - rho) o_far|^2  +  KL(far share of teacher || of student)

    The first term can be lowered by the state alone; the second by the mix (and by log n under "normalizer").
    `target` is the teacher's side where it is known already; None computes it.
    """
    target = target or FarTarget(seen)
    far, log_mass = student_far(seen, target)
    counted, share = target.counted, target.far_share[..., None]
    wanted = share * target.far
    error = share * (far - target.far)
    far_term = _mean(error.square().sum(-1), counted) / _mean(wanted.square().sum(-1), counted).clamp_min(1e-12)
    return far_term + _mean(_share_divergence(seen, target, log_mass), counted)


def weights_loss(seen: Observation, target: FarTarget | None = None) -> Tensor:
    """mean KL(a || s) of the teacher's attention weights a and the student's s, over all keys that a query sees.

    By the chain rule of relative entropy that is

        KL(far share of teacher || of student)  +  (1 - rho) KL(a within the far keys || s within the far keys)

    in nats a query and head: near keys have the same weights on both sides but for the shares. It is the cross-entropy
    of the two maps less the teacher's entropy: 0 where they are equal, with the same gradient. Values have no say.
    `target` as above.

    Raises:
        LinearizeError: a mixer whose state is no plain sum, so that its weights are no products of features.
    """
    target = target or FarTarget(seen)
    mixer, config = _mixer(seen), seen.layer.linearize_config
    if (type(mixer).scan, type(mixer).read) != (Mixer.scan, Mixer.read):
        raise LinearizeError(
            f"transfer.objective: 'weights' needs weights phi_q.phi_k, and mixer {config.mixer!r} has others; use "
            "'decomposed' or 'output'"
        )
    within, log_mass = far_divergence(
        target.q,
        target.k,
        target.far_lse,
        mixer.query_features(target.q),
        mixer.key_features(target.k),
        window=config.window,
        sinks=config.sinks,
        scale=seen.layer.scaling,
        soft_cap=seen.layer.soft_cap,
        documents=target.documents,
    )
    return _mean(_share_divergence(seen, target, log_mass) + target.far_share * within, target.counted)


def output_loss(seen: Observation, target: FarTarget | None = None) -> Tensor:
    """mean |o_student - o|^2 / mean |o|^2 of the attention outputs, before the output projection. `target` as above."""
    target = target or FarTarget(seen)
    error = (_student_out(seen, target) - target.out).square().sum(-1)
    return _mean(error, target.counted) / _mean(target.out.square().sum(-1), target.counted).clamp_min(1e-12)


def hidden_loss(seen: Observation, target: FarTarget | None = None) -> Tensor:
    """mean |P (o_student - o)|^2 / mean |P o|^2: the error of what the layer adds to the hidden states.

    P (hidden, H V) is the weight of the output projection, with whatever LoRA is active on it, and o stands for all
    heads' outputs of a token beside each other: errors of heads that cancel cost nothing, and errors in directions
    that P drops do not either. A bias of the projection is the same on both sides; it is left out of |P o| too, so
    that a layer that puts out nothing has a loss of 1. Linear in time. `target` as above.
    """
    target = target or FarTarget(seen)
    weight = _projection(seen)
    error = _through(weight, _student_out(seen, target) - target.out)
    return _mean(error, target.counted) / _mean(_through(weight, target.out), target.counted).clamp_min(1e-12)


OBJECTIVES: dict[str, Callable[[Observation, FarTarget | None], Tensor]] = {
    "decomposed": decomposed_loss,
    "output": output_loss,
    "weights": weights_loss,
    "hidden": hidden_loss,
}


def _mixer(seen: Observation) -> Mixer:
    mixer = seen.layer.mixer
    assert mixer is not None, "a layer without a state has nothing to learn: run_transfer refuses it"
    return mixer


def student_far(seen: Observation, target: FarTarget) -> tuple[Tensor, Tensor]:
    """What the student reads from its state for the queries of `target`: o_far (B, H, T', V) and log n (B, H, T')."""
    config = seen.layer.linearize_config
    return far_read(
        target.q,
        target.k,
        target.v,
        _mixer(seen),
        window=config.window,
        sinks=config.sinks,
        documents=target.documents,
    )


def _student_out(seen: Observation, target: FarTarget) -> Tensor:
    """o of the student, (B, H, T', V)."""
    far, log_mass = student_far(seen, target)
    return mix_near_far(
        target.near, target.mix_lse, far, log_mass, target.mix_logit(seen), seen.layer.linearize_config.mix
    )


def _projection(seen: Observation) -> Tensor:
    """The weight (hidden, H V) of the layer's output projection, LoRA included; no gradient."""
    projection: Any = seen.layer.output
    if not hasattr(projection, "get_base_layer"):
        return projection.weight.detach()
    weight = projection.get_base_layer().weight.detach()
    if not (projection.merged or projection.disable_adapters):
        for name in projection.active_adapters:
            if name in projection.lora_A:
                weight = weight + projection.get_delta_weight(name).detach()
    return weight


def _through(weight: Tensor, x: Tensor) -> Tensor:
    """|P x|^2 of every token, (B, 1, T), from x (B, H, T, V), in x's dtype."""
    return F.linear(x.transpose(1, 2).flatten(2), weight.to(x.dtype)).square().sum(-1)[:, None]


def _share_divergence(seen: Observation, target: FarTarget, log_mass: Tensor) -> Tensor:
    """KL(far share of teacher || of student) of every query, (B, H, T'); log_mass: log n of the student."""
    student = far_log_odds(target.mix_lse, log_mass, target.mix_logit(seen), seen.layer.linearize_config.mix)
    # From log-odds: a share that has rounded to 0 or 1 would have no gradient left.
    student = student.masked_fill(student == -torch.inf, NO_SHARE)
    share = target.far_share
    return F.binary_cross_entropy_with_logits(student, share, reduction="none") - F.binary_cross_entropy(
        share, share, reduction="none"
    )


def _mean(x: Tensor, counted: Tensor) -> Tensor:
    """Mean of x (B, H, T) over the counted (B, 1, T) tokens and all heads; 0 where none is counted."""
    return (x * counted).sum() / (counted.sum() * x.shape[1]).clamp_min(1)
